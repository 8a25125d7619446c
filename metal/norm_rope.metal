// RMS norms, rotary position embedding, sums, and what MLA keeps of a token: small ops, of which as many as meet are one
// dispatch. Rows lie a stride apart and are read where they lie, parts of whatever tensor they are. x and y are float, half
// or bfloat; norms' weights and angles float; sums always float.
//
// | kernel              | what                                            | threadgroup          | grid (x, y)                |
// |---------------------|-------------------------------------------------|----------------------|----------------------------|
// | rms_norm_<type>     | norm(x)                                         | a row                | rows                       |
// | add_rms_norm_<type> | s = x + delta, and norm(s)                      | a row                | rows                       |
// | rope_<type>         | each pair of x turned by its angle              | a thread a pair      | pairs of a token, tokens   |
// | latent_rows_<type>  | norm of kv's first part, its rest turned; with HAS_QUERIES the queries turned too | x 0: a row; else a thread a pair | 1 + queries' pairs of a token, tokens |
// | add_<type>          | x + delta                                       | 4 elements a thread  | elements of a row, rows    |
//
// A row's norm goes through it twice, and reads it from the cache the second time: each thread takes four elements (WIDE)
// or one in turn, keeps one sum in registers, and the simdgroups' sums meet in threadgroup memory.

#include <metal_stdlib>

#include "args.h"

using namespace metal;

namespace norm_rope {

// Rows begin at multiples of four elements, and are a multiple of four long: the host has checked it.
constant bool WIDE [[function_constant(16)]];
// Pairs are neighbours; otherwise the one is half a head behind the other.
constant bool INTERLEAVED [[function_constant(17)]];
constant bool HAS_QUERIES [[function_constant(18)]];

// A threadgroup's simdgroups, at most.
static constant constexpr ushort SIMDGROUPS = 32;

template <typename T>
static inline float4 load(device const T* from) {
    return float4(*(device const vec<T, 4>*)from);
}

template <typename T>
static inline void store(device T* to, float4 value) {
    *(device vec<T, 4>*)to = vec<T, 4>(T(value.x), T(value.y), T(value.z), T(value.w));
}

// The sum over all threads of what each has.
static inline float total(float own, threadgroup float* parts, ushort simdgroup, ushort lane, ushort simdgroups) {
    const float sum = simd_sum(own);
    if (lane == 0) {
        parts[simdgroup] = sum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return simd_sum(lane < simdgroups ? parts[lane] : 0.0f);
}

// The sum of the squares of a thread's elements of a row.
template <typename T>
static inline float squares(device const T* x, uint d, uint index, uint threads) {
    float sum = 0.0f;
    if (WIDE) {
        for (uint i = index * 4; i < d; i += threads * 4) {
            const float4 value = load(x + i);
            sum += dot(value, value);
        }
    } else {
        for (uint i = index; i < d; i += threads) {
            const float value = float(x[i]);
            sum = fma(value, value, sum);
        }
    }
    return sum;
}

// What a row of d elements with this sum of squares is multiplied by.
static inline float factor(float squares, uint d, float eps) { return precise::rsqrt(squares / float(d) + eps); }

// A thread's elements of a row, times the factor and the weight.
template <typename T>
static inline void scale(
    device const T* x,
    device const float* weight,
    device T* y,
    float by,
    uint d,
    uint index,
    uint threads
) {
    if (WIDE) {
        for (uint i = index * 4; i < d; i += threads * 4) {
            store(y + i, load(x + i) * by * load(weight + i));
        }
    } else {
        for (uint i = index; i < d; i += threads) {
            y[i] = T(float(x[i]) * by * weight[i]);
        }
    }
}

// Turns pair i of a head.
template <typename T>
static inline void turn(device const T* x, device T* y, uint i, uint pairs, float cosine, float sine) {
    const uint first = INTERLEAVED ? 2 * i : i;
    const uint second = INTERLEAVED ? 2 * i + 1 : i + pairs;
    const float a = float(x[first]), b = float(x[second]);
    y[first] = T(a * cosine - b * sine);
    y[second] = T(a * sine + b * cosine);
}

} // namespace norm_rope

// ---------------------------------------------------------------------------------------------------------------------
// | buffer | what      |       |
// |--------|-----------|-------|
// | 0      | x         | read  |
// | 1      | weight    | read  |
// | 2      | y         | write |
// | 3      | NormArgs  | bytes |

template <typename T>
[[kernel]] void rms_norm(
    device const T* x [[buffer(0)]],
    device const float* weight [[buffer(1)]],
    device T* y [[buffer(2)]],
    constant NormArgs& args [[buffer(3)]],
    uint row [[threadgroup_position_in_grid]],
    ushort index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]],
    ushort simdgroups [[simdgroups_per_threadgroup]]
) {
    threadgroup float parts[norm_rope::SIMDGROUPS];
    const uint threads = simdgroups * 32;
    device const T* from = x + ulong(row) * args.x_row;
    const float own = norm_rope::squares(from, args.d, index, threads);
    const float sum = norm_rope::total(own, parts, simdgroup, lane, simdgroups);
    const float by = norm_rope::factor(sum, args.d, args.eps);
    norm_rope::scale(from, weight, y + ulong(row) * args.d, by, args.d, index, threads);
}

// ---------------------------------------------------------------------------------------------------------------------
// | buffer | what      |                                                                                      |
// |--------|-----------|--------------------------------------------------------------------------------------|
// | 0      | x         | read                                                                                 |
// | 1      | delta     | read                                                                                 |
// | 2      | weight    | read                                                                                 |
// | 3      | s         | write; each thread reads again what it wrote: the norm is of sums as they are stored |
// | 4      | y         | write                                                                                |
// | 5      | NormArgs  | bytes                                                                                |

template <typename T>
[[kernel]] void add_rms_norm(
    device const T* x [[buffer(0)]],
    device const T* delta [[buffer(1)]],
    device const float* weight [[buffer(2)]],
    device T* s [[buffer(3)]],
    device T* y [[buffer(4)]],
    constant NormArgs& args [[buffer(5)]],
    uint row [[threadgroup_position_in_grid]],
    ushort index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]],
    ushort simdgroups [[simdgroups_per_threadgroup]]
) {
    threadgroup float parts[norm_rope::SIMDGROUPS];
    const uint threads = simdgroups * 32;
    device const T* left = x + ulong(row) * args.x_row;
    device const T* right = delta + ulong(row) * args.delta_row;
    device T* sums = s + ulong(row) * args.d;
    if (norm_rope::WIDE) {
        for (uint i = index * 4; i < args.d; i += threads * 4) {
            norm_rope::store(sums + i, norm_rope::load(left + i) + norm_rope::load(right + i));
        }
    } else {
        for (uint i = index; i < args.d; i += threads) {
            sums[i] = T(float(left[i]) + float(right[i]));
        }
    }
    const float own = norm_rope::squares((device const T*)sums, args.d, index, threads);
    const float sum = norm_rope::total(own, parts, simdgroup, lane, simdgroups);
    const float by = norm_rope::factor(sum, args.d, args.eps);
    norm_rope::scale((device const T*)sums, weight, y + ulong(row) * args.d, by, args.d, index, threads);
}

// ---------------------------------------------------------------------------------------------------------------------
// | buffer | what                       |       |
// |--------|----------------------------|-------|
// | 0      | x, tokens of heads         | read  |
// | 1      | cosines, a token and pair  | read  |
// | 2      | sines                      | read  |
// | 3      | y                          | write |
// | 4      | RopeArgs                   | bytes |

template <typename T>
[[kernel]] void rope(
    device const T* x [[buffer(0)]],
    device const float* cosines [[buffer(1)]],
    device const float* sines [[buffer(2)]],
    device T* y [[buffer(3)]],
    constant RopeArgs& args [[buffer(4)]],
    uint2 group [[threadgroup_position_in_grid]],
    ushort index [[thread_index_in_threadgroup]],
    ushort simdgroups [[simdgroups_per_threadgroup]]
) {
    const uint place = group.x * simdgroups * 32 + index;
    if (place < args.heads * args.pairs) {
        const uint head = place / args.pairs, i = place % args.pairs;
        const float cosine = cosines[ulong(group.y) * args.cos_row + i];
        const float sine = sines[ulong(group.y) * args.sin_row + i];
        device const T* from = x + ulong(group.y) * args.x_token + ulong(head) * args.x_head;
        device T* to = y + (ulong(group.y) * args.heads + head) * args.pairs * 2;
        norm_rope::turn(from, to, i, args.pairs, cosine, sine);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// | buffer | what                                              |       |
// |--------|---------------------------------------------------|-------|
// | 0      | kv: a row its latent, then its rotary key         | read  |
// | 1      | the norm's weight                                 | read  |
// | 2      | cosines, a token and pair                         | read  |
// | 3      | sines                                             | read  |
// | 4      | rows, as long as kv's                             | write |
// | 5      | LatentArgs                                        | bytes |
// | 6      | rotary parts of queries (with HAS_QUERIES)        | read  |
// | 7      | the same, turned (with HAS_QUERIES)               | write |

template <typename T>
[[kernel]] void latent_rows(
    device const T* kv [[buffer(0)]],
    device const float* weight [[buffer(1)]],
    device const float* cosines [[buffer(2)]],
    device const float* sines [[buffer(3)]],
    device T* rows [[buffer(4)]],
    constant LatentArgs& args [[buffer(5)]],
    device const T* queries [[buffer(6), function_constant(norm_rope::HAS_QUERIES)]],
    device T* turned [[buffer(7), function_constant(norm_rope::HAS_QUERIES)]],
    uint2 group [[threadgroup_position_in_grid]],
    ushort index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]],
    ushort simdgroups [[simdgroups_per_threadgroup]]
) {
    threadgroup float parts[norm_rope::SIMDGROUPS];
    const uint threads = simdgroups * 32;
    device const float* row_cosines = cosines + ulong(group.y) * args.cos_row;
    device const float* row_sines = sines + ulong(group.y) * args.sin_row;
    if (group.x == 0) {
        device const T* from = kv + ulong(group.y) * args.kv_row;
        device T* to = rows + ulong(group.y) * (args.latent + 2 * args.pairs);
        const float own = norm_rope::squares(from, args.latent, index, threads);
        const float sum = norm_rope::total(own, parts, simdgroup, lane, simdgroups);
        const float by = norm_rope::factor(sum, args.latent, args.eps);
        norm_rope::scale(from, weight, to, by, args.latent, index, threads);
        for (uint i = index; i < args.pairs; i += threads) {
            norm_rope::turn(from + args.latent, to + args.latent, i, args.pairs, row_cosines[i], row_sines[i]);
        }
    } else if (norm_rope::HAS_QUERIES) {
        const uint place = (group.x - 1) * threads + index;
        if (place < args.heads * args.pairs) {
            const uint head = place / args.pairs, i = place % args.pairs;
            device const T* from = queries + ulong(group.y) * args.q_token + ulong(head) * args.q_head;
            device T* to = turned + (ulong(group.y) * args.heads + head) * args.pairs * 2;
            norm_rope::turn(from, to, i, args.pairs, row_cosines[i], row_sines[i]);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// | buffer | what    |       |
// |--------|---------|-------|
// | 0      | x       | read  |
// | 1      | delta   | read  |
// | 2      | y       | write |
// | 3      | AddArgs | bytes |

template <typename T>
[[kernel]] void add(
    device const T* x [[buffer(0)]],
    device const T* delta [[buffer(1)]],
    device T* y [[buffer(2)]],
    constant AddArgs& args [[buffer(3)]],
    uint2 group [[threadgroup_position_in_grid]],
    ushort index [[thread_index_in_threadgroup]],
    ushort simdgroups [[simdgroups_per_threadgroup]]
) {
    const uint threads = simdgroups * 32;
    const uint first = group.x * threads * 4;
    device const T* left = x + ulong(group.y) * args.x_row;
    device const T* right = delta + ulong(group.y) * args.delta_row;
    device T* to = y + ulong(group.y) * args.d;
    if (norm_rope::WIDE) {
        const uint i = first + index * 4;
        if (i < args.d) {
            norm_rope::store(to + i, norm_rope::load(left + i) + norm_rope::load(right + i));
        }
    } else {
        for (ushort part = 0; part < 4; part++) {
            const uint i = first + part * threads + index;
            if (i < args.d) {
                to[i] = T(float(left[i]) + float(right[i]));
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------

#define INSTANTIATE_NORM_ROPE(name, ...) template [[host_name(name)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;

#define INSTANTIATE_NORM_ROPE_TYPE(type, T)                            \
    INSTANTIATE_NORM_ROPE("rms_norm_" type, rms_norm<T>)               \
    INSTANTIATE_NORM_ROPE("add_rms_norm_" type, add_rms_norm<T>)       \
    INSTANTIATE_NORM_ROPE("rope_" type, rope<T>)                       \
    INSTANTIATE_NORM_ROPE("latent_rows_" type, latent_rows<T>)         \
    INSTANTIATE_NORM_ROPE("add_" type, add<T>)

INSTANTIATE_NORM_ROPE_TYPE("f32", float)
INSTANTIATE_NORM_ROPE_TYPE("f16", half)
INSTANTIATE_NORM_ROPE_TYPE("bf16", bfloat)
