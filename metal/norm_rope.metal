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
// A row's norm goes through it twice, and reads it from the cache the second time: each thread takes four elements (FOURS)
// or one in turn, keeps one sum in registers, and the simdgroups' sums meet in threadgroup memory.

#include <metal_stdlib>

#include "args.h"
#include "norm_rope.h"

using namespace metal;

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
    if (norm_rope::FOURS) {
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
    norm_rope::turn_one_of(
        x + ulong(group.y) * args.x_token,
        y + ulong(group.y) * args.heads * args.pairs * 2,
        cosines + ulong(group.y) * args.cos_row,
        sines + ulong(group.y) * args.sin_row,
        group.x * simdgroups * 32 + index,
        args.heads,
        args.pairs,
        args.x_head
    );
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
        norm_rope::turn_one_of(
            queries + ulong(group.y) * args.q_token,
            turned + ulong(group.y) * args.heads * args.pairs * 2,
            row_cosines,
            row_sines,
            (group.x - 1) * threads + index,
            args.heads,
            args.pairs,
            args.q_head
        );
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
[[kernel]] void add_rows(
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
    if (norm_rope::FOURS) {
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
    INSTANTIATE_NORM_ROPE("add_" type, add_rows<T>)

INSTANTIATE_NORM_ROPE_TYPE("f32", float)
INSTANTIATE_NORM_ROPE_TYPE("f16", half)
INSTANTIATE_NORM_ROPE_TYPE("bf16", bfloat)
