// New tokens into a paged cache's pool: normalised, turned, rounded and scattered in one dispatch, with the rotation of the
// queries. What is stored is, bit for bit, what src/kv/codec.rs makes of the same numbers. x is float, half or bfloat; norms'
// weights and angles float.
//
// | kernel                | what                                             | threadgroup          | grid (x, y)                |
// |-----------------------|--------------------------------------------------|----------------------|----------------------------|
// | append_latents_<type> | norm of kv's first part, its rest turned, both stored; with HAS_QUERIES the queries turned | x 0: a token's row; else a thread a pair | 1 + queries' pairs of a token, tokens |
// | append_heads_<type>   | keys and values stored as they are               | a vector             | 2 · heads of a token, tokens |
//
// A vector goes through threadgroup memory in chunks of CHUNK numbers, in floats, rotated there if it is stored so. A group of FP4
// is eight lanes': each adds up the error of one scale, in the order of the elements, and encodes an eighth of the group. A group
// of FP8 is a simdgroup's. Tokens do not know of each other: bytes are the same however a prompt is cut.

#include <metal_stdlib>

#include "args.h"
#include "cache.h"
#include "fp4.h"
#include "norm_rope.h"

using namespace metal;

namespace append {

// Numbers in threadgroup memory: a multiple of every group and of every block of a rotation.
static constant constexpr ushort CHUNK = 1024;
// Scales that are tried for a group of FP4.
static constant constexpr ushort CANDIDATES = 8;
// Scales of FP4: the largest, infinity, NaN.
static constant constexpr uint LARGEST_SCALE = 0xf7;
static constant constexpr uint INFINITE_SCALE = 0xf8;
static constant constexpr uint NAN_SCALE = 0xff;
static constant constexpr uint NAN_E4M3 = 0x7f;
// Elements of a group of FP8.
static constant constexpr ushort FP8_GROUP = 128;
// Bits of infinity: those of magnitudes are in the order of the numbers, what is not finite behind all others.
static constant constexpr uint INFINITE = 0x7f800000u;

static inline uint magnitude_bits(float x) { return as_type<uint>(x) & 0x7fffffffu; }

// A power of two from 2^-126 to 2^127.
static inline float power_of_two(int exponent) { return as_type<float>(uint(exponent + 127) << 23); }

// The code of a finite number without a sign in eight bits with three of mantissa, of which subnormal ones have this exponent.
static inline uint three_bits(float x, int lowest) {
    const int exponent = max(int(as_type<uint>(x) >> 23) - 127, lowest);
    // Steps that round up to the next power of two carry into the exponent by themselves.
    return uint((exponent - lowest) * 8 + int(rint(x * power_of_two(3 - exponent))));
}

// A number of 16 bits, nearest to x.
static inline ushort sixteen_bits(float x) {
    if (cache::ENCODING == cache::F16) {
        return as_type<ushort>(half(x));
    }
    const uint bits = as_type<uint>(x);
    if (magnitude_bits(x) > INFINITE) {
        return ushort(bits >> 16 | 0x40);
    }
    return ushort((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Rotates the blocks of a chunk.
static inline void rotate_vector(threadgroup float* values, uint count, uint block, ushort index, uint threads) {
    for (uint i = index; i < count; i += threads) {
        if (cache::turns(i % block)) {
            values[i] = -values[i];
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint distance = 1; distance < block; distance *= 2) {
        for (uint pair = index; pair < count / 2; pair += threads) {
            const uint i = pair / distance * distance * 2 + pair % distance;
            const float a = values[i], b = values[i + distance];
            values[i] = a + b;
            values[i + distance] = a - b;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    const float by = cache::rotation_factor(block);
    for (uint i = index; i < count; i += threads) {
        values[i] *= by;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
}

// Groups of FP4, eight lanes each.
static inline void store_fp4(
    threadgroup const float* values,
    uint count,
    device uchar* codes,
    device uchar* scales,
    ushort index,
    uint threads
) {
    const uint each = cache::SHARING / CANDIDATES;
    const uint tasks = count / cache::SHARING * CANDIDATES;
    for (uint first = 0; first < tasks; first += threads) {
        // Lanes beyond the last group keep it company.
        const uint task = min(first + index, tasks - 1);
        const uint group = task / CANDIDATES, candidate = task % CANDIDATES;
        threadgroup const float* all = values + group * cache::SHARING;
        threadgroup const float* mine = all + candidate * each;
        uint largest = 0;
        for (uint i = 0; i < each; i++) {
            largest = max(largest, magnitude_bits(mine[i]));
        }
        for (ushort apart = 1; apart < CANDIDATES; apart *= 2) {
            largest = max(largest, simd_shuffle_xor(largest, apart));
        }
        const bool finite = largest < INFINITE;
        const float sixth = finite ? as_type<float>(largest) * (1.0f / 6.0f) : 0.0f;
        const uint ideal = min(three_bits(sixth, -14), INFINITE_SCALE);
        const uint lowest = max(ideal, 2u) - 2;
        uint best = min(lowest + candidate, LARGEST_SCALE);
        float error = 0.0f;
        const float tried = cache::fp4_scale(best);
        for (uint i = 0; i < cache::SHARING; i++) {
            const float a = fabs(all[i]);
            const float distance = a - fp4::magnitude(fp4::encode(a, tried)) * tried;
            // A square that is rounded by itself, whatever a compiler may do with a product and a sum.
            error += fma(distance, distance, 0.0f);
        }
        for (ushort apart = 1; apart < CANDIDATES; apart *= 2) {
            const float other_error = simd_shuffle_xor(error, apart);
            const uint other = simd_shuffle_xor(best, apart);
            if (other_error < error || (other_error == error && other < best)) {
                error = other_error;
                best = other;
            }
        }
        const uint chosen = !finite ? NAN_SCALE : ideal == INFINITE_SCALE ? INFINITE_SCALE : best;
        const float by = cache::fp4_scale(chosen);
        // What is too small for any scale has the scale 0, and where the scale is no number, no code is nearest.
        const bool has_codes = chosen != 0 && chosen < INFINITE_SCALE;
        if (first + index < tasks) {
            if (candidate == 0) {
                scales[group] = uchar(chosen);
            }
            for (uint i = 0; i < each; i += 2) {
                uint byte = 0;
                for (ushort half_byte = 0; half_byte < 2; half_byte++) {
                    const float x = mine[i + half_byte];
                    const uint code = has_codes ? fp4::encode(fabs(x), by) : 0;
                    const uint sign = x < 0.0f && code != 0 ? 8 : 0;
                    byte |= (code | sign) << (4 * half_byte);
                }
                codes[(group * cache::SHARING + candidate * each + i) / 2] = uchar(byte);
            }
        }
    }
}

// Groups of FP8, a simdgroup each.
static inline void store_fp8(
    threadgroup const float* values,
    uint count,
    device uchar* codes,
    device float* scales,
    ushort simdgroup,
    ushort lane,
    ushort simdgroups
) {
    for (uint group = simdgroup; group * FP8_GROUP < count; group += simdgroups) {
        const uint first = group * FP8_GROUP, end = min(first + FP8_GROUP, count);
        uint largest = 0;
        for (uint i = first + lane; i < end; i += 32) {
            const uint bits = magnitude_bits(values[i]);
            largest = max(largest, bits < INFINITE ? bits : 0);
        }
        // 448 is 1.75 · 2^8: a mantissa beyond that carries into the exponent.
        const int exponent = max(int((simd_max(largest) + 0x001fffffu) >> 23) - 127 - 8, -126);
        if (lane == 0) {
            scales[group] = power_of_two(exponent);
        }
        for (uint i = first + lane; i < end; i += 32) {
            const float x = values[i] * power_of_two(-exponent);
            const uint bits = magnitude_bits(x);
            const uint sign = as_type<uint>(x) >> 31 << 7;
            codes[i] = uchar(bits < INFINITE ? three_bits(as_type<float>(bits), -6) | sign : NAN_E4M3);
        }
    }
}

// Stores a chunk of a vector, `count` numbers, that threads have just written to `values`. All threads of a threadgroup call it.
static inline void store_vector(
    threadgroup float* values,
    uint count,
    uint width,
    device uchar* codes,
    device uchar* scales,
    ushort index,
    ushort simdgroup,
    ushort lane,
    ushort simdgroups
) {
    const uint threads = simdgroups * 32;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (cache::ROTATED) {
        rotate_vector(values, count, cache::rotation_block(width), index, threads);
    }
    if (cache::ENCODING == cache::FP4) {
        store_fp4(values, count, codes, scales, index, threads);
    } else if (cache::ENCODING == cache::FP8) {
        store_fp8(values, count, codes, (device float*)scales, simdgroup, lane, simdgroups);
    } else {
        for (uint i = index; i < count; i += threads) {
            ((device ushort*)codes)[i] = sixteen_bits(values[i]);
        }
    }
}

// How many bytes the codes of so many elements take, and how many their scales: whole groups.
static inline uint code_bytes(uint count) {
    return cache::ENCODING == cache::FP4 ? count / 2 : cache::ENCODING == cache::FP8 ? count : 2 * count;
}
static inline uint scale_bytes(uint count) {
    return cache::SHARING == 0 ? 0 : count / cache::SHARING * (cache::ENCODING == cache::FP8 ? 4 : 1);
}

} // namespace append

// ---------------------------------------------------------------------------------------------------------------------
// | buffer | what                                              |       |
// |--------|---------------------------------------------------|-------|
// | 0      | kv: a row its latent, then its rotary key         | read  |
// | 1      | the norm's weight                                 | read  |
// | 2      | cosines, a token and pair                         | read  |
// | 3      | sines                                             | read  |
// | 4      | slots, a token each                               | read  |
// | 5      | the pool                                          | write |
// | 6      | AppendLatentsArgs                                 | bytes |
// | 7      | rotary parts of queries (with HAS_QUERIES)        | read  |
// | 8      | the same, turned (with HAS_QUERIES)               | write |

template <typename T>
[[kernel]] void append_latents(
    device const T* kv [[buffer(0)]],
    device const float* weight [[buffer(1)]],
    device const float* cosines [[buffer(2)]],
    device const float* sines [[buffer(3)]],
    device const uint* slots [[buffer(4)]],
    device uchar* pool [[buffer(5)]],
    constant AppendLatentsArgs& args [[buffer(6)]],
    device const T* queries [[buffer(7), function_constant(norm_rope::HAS_QUERIES)]],
    device T* turned [[buffer(8), function_constant(norm_rope::HAS_QUERIES)]],
    uint2 group [[threadgroup_position_in_grid]],
    ushort index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]],
    ushort simdgroups [[simdgroups_per_threadgroup]]
) {
    threadgroup float parts[norm_rope::SIMDGROUPS];
    threadgroup float values[append::CHUNK];
    const uint threads = simdgroups * 32;
    const uint latent = args.rows.latent, pairs = args.rows.pairs;
    device const float* row_cosines = cosines + ulong(group.y) * args.rows.cos_row;
    device const float* row_sines = sines + ulong(group.y) * args.rows.sin_row;
    if (group.x == 0) {
        const uint block = slots[group.y] / args.latent.block_tokens;
        const uint offset = slots[group.y] % args.latent.block_tokens;
        device const T* from = kv + ulong(group.y) * args.rows.kv_row;
        device ushort* key = (device ushort*)(pool + cache::codes_at(args.key, block, offset, 0));
        for (uint i = index; i < pairs; i += threads) {
            const uint2 at = norm_rope::pair_at(i, pairs);
            const float2 both = norm_rope::turned(from + latent, at, row_cosines[i], row_sines[i]);
            key[at.x] = append::sixteen_bits(both.x);
            key[at.y] = append::sixteen_bits(both.y);
        }
        const float own = norm_rope::squares(from, latent, index, threads);
        const float sum = norm_rope::total(own, parts, simdgroup, lane, simdgroups);
        const float by = norm_rope::factor(sum, latent, args.rows.eps);
        device uchar* codes = pool + cache::codes_at(args.latent, block, offset, 0);
        device uchar* scales = pool + cache::scales_at(args.latent, block, offset, 0);
        for (uint start = 0; start < latent; start += append::CHUNK) {
            const uint count = min(latent - start, uint(append::CHUNK));
            threadgroup_barrier(mem_flags::mem_threadgroup);
            for (uint i = index; i < count; i += threads) {
                values[i] = float(from[start + i]) * by * weight[start + i];
            }
            append::store_vector(
                values,
                count,
                latent,
                codes + append::code_bytes(start),
                scales + append::scale_bytes(start),
                index,
                simdgroup,
                lane,
                simdgroups
            );
        }
    } else if (norm_rope::HAS_QUERIES) {
        norm_rope::turn_one_of(
            queries + ulong(group.y) * args.rows.q_token,
            turned + ulong(group.y) * args.rows.heads * pairs * 2,
            row_cosines,
            row_sines,
            (group.x - 1) * threads + index,
            args.rows.heads,
            pairs,
            args.rows.q_head
        );
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// | buffer | what                    |       |
// |--------|-------------------------|-------|
// | 0      | keys, tokens of heads   | read  |
// | 1      | values, the same        | read  |
// | 2      | slots, a token each     | read  |
// | 3      | the pool                | write |
// | 4      | AppendHeadsArgs         | bytes |

template <typename T>
[[kernel]] void append_heads(
    device const T* keys [[buffer(0)]],
    device const T* values [[buffer(1)]],
    device const uint* slots [[buffer(2)]],
    device uchar* pool [[buffer(3)]],
    constant AppendHeadsArgs& args [[buffer(4)]],
    uint2 group [[threadgroup_position_in_grid]],
    ushort index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]],
    ushort simdgroups [[simdgroups_per_threadgroup]]
) {
    threadgroup float numbers[append::CHUNK];
    const uint threads = simdgroups * 32;
    const bool is_key = group.x < args.heads;
    const uint head = is_key ? group.x : group.x - args.heads;
    const uint block = slots[group.y] / args.keys.block_tokens, offset = slots[group.y] % args.keys.block_tokens;
    const uint width = is_key ? args.keys.width : args.values.width;
    device const T* from = is_key
        ? keys + ulong(group.y) * args.key_token + ulong(head) * args.key_head
        : values + ulong(group.y) * args.value_token + ulong(head) * args.value_head;
    device uchar* codes = pool
        + (is_key ? cache::codes_at(args.keys, block, offset, head) : cache::codes_at(args.values, block, offset, head));
    device uchar* scales = pool
        + (is_key ? cache::scales_at(args.keys, block, offset, head) : cache::scales_at(args.values, block, offset, head));
    for (uint start = 0; start < width; start += append::CHUNK) {
        const uint count = min(width - start, uint(append::CHUNK));
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint i = index; i < count; i += threads) {
            numbers[i] = float(from[start + i]);
        }
        append::store_vector(
            numbers,
            count,
            width,
            codes + append::code_bytes(start),
            scales + append::scale_bytes(start),
            index,
            simdgroup,
            lane,
            simdgroups
        );
    }
}

// ---------------------------------------------------------------------------------------------------------------------

#define INSTANTIATE_APPEND(name, ...) template [[host_name(name)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;

#define INSTANTIATE_APPEND_TYPE(type, T)                               \
    INSTANTIATE_APPEND("append_latents_" type, append_latents<T>)      \
    INSTANTIATE_APPEND("append_heads_" type, append_heads<T>)

INSTANTIATE_APPEND_TYPE("f32", float)
INSTANTIATE_APPEND_TYPE("f16", half)
INSTANTIATE_APPEND_TYPE("bf16", bfloat)
