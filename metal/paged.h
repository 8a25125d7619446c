// What attention over a paged cache has in common: which tokens a query sees, numbers by lanes, outputs.
//
// A vector is spread over a simdgroup by fours: lane l has elements (32 i + l) · 4 … + 3 of it, for i from 0 on.
#pragma once

#include <metal_stdlib>

#include "args.h"
#include "cache.h"
#include "rows.h"

namespace paged {

using namespace metal;

// What a threadgroup writes: outputs, where there is one split, or parts of them.
constant bool WHOLE [[function_constant(36)]];
constant bool PARTS [[function_constant(37)]];
// Latents have rotary keys beside them, which are stored their own way.
constant bool ROTARY [[function_constant(38)]];

// The largest score of no token: the least number, of which fast math has a meaning, which it has not of infinities.
static inline float none() { return as_type<float>(0xff7fffffu); }

static inline uint element_of(ushort i, ushort lane) { return (i * 32u + lane) * 4u; }

// Splits of a context, at most: so many, and one more for so many positions. (src/metal/paged_attention.rs)
static constant constexpr uint MOST_SPLITS = 22, FOR_ONE_MORE = 4096;

// Positions of a split of a query's context, its first `end` positions.
static inline uint split_tokens(uint end, constant PagedArgs& args) {
    const uint most = MOST_SPLITS + end / FOR_ONE_MORE;
    const uint block = args.keys.block_tokens;
    return max(args.split_tokens, ((end - 1) / (most * block) + 1) * block);
}

// The positions of a split that the query at `position` sees: from x up to y, none where y is not more. Splits are cut from
// position 0 on; the first that it sees something of is its first.
static inline uint2 seen(uint position, uint split, constant PagedArgs& args) {
    const uint end = position + 1;
    const uint first = end > args.window ? end - args.window : 0;
    const uint tokens = split_tokens(end, args);
    const uint start = (first / tokens + split) * tokens;
    return uint2(max(first, start), min(end, start + tokens));
}

// A query's vector, times a factor.
template <typename T, ushort FOURS>
static inline void take_query(
    device const T* from, uint width, float factor, ushort lane, thread float4 (&x)[FOURS]
) {
    UNROLL
    for (ushort i = 0; i < FOURS; i++) {
        const uint first = element_of(i, lane);
        UNROLL
        for (ushort k = 0; k < 4; k++) {
            x[i][k] = first + k < width ? float(from[first + k]) * factor : 0.0f;
        }
    }
}

// Turns the signs of a lane's four elements as src/kv/hadamard.rs does.
static inline float4 turned(float4 x, ushort lane, uint block) {
    UNROLL
    for (ushort k = 0; k < 4; k++) {
        x[k] = cache::turns((lane * 4u + k) & (block - 1)) ? -x[k] : x[k];
    }
    return x;
}

// The Walsh-Hadamard transform of four elements of each lane with those of its neighbours, in blocks of 16, 32 or 64.
static inline float4 transformed(float4 x, uint block, ushort lane) {
    x = float4(x.x + x.y, x.x - x.y, x.z + x.w, x.z - x.w);
    x = float4(x.x + x.z, x.y + x.w, x.x - x.z, x.y - x.w);
    for (ushort apart = 1; apart * 4u < block; apart *= 2) {
        const float4 other = simd_shuffle_xor(x, apart);
        x = (lane & apart) != 0 ? other - x : x + other;
    }
    return x * cache::rotation_factor(block);
}

// Rotates a query as the cache's vectors are.
template <ushort FOURS>
static inline void rotate_query(thread float4 (&x)[FOURS], uint width, ushort lane) {
    const uint block = cache::rotation_block(width);
    UNROLL
    for (ushort i = 0; i < FOURS; i++) {
        x[i] = transformed(turned(x[i], lane, block), block, lane);
    }
}

// Takes the rotation of an output back.
template <ushort FOURS>
static inline void rotate_back(thread float4 (&x)[FOURS], uint width, ushort lane) {
    const uint block = cache::rotation_block(width);
    UNROLL
    for (ushort i = 0; i < FOURS; i++) {
        x[i] = turned(transformed(x[i], block, lane), lane, block);
    }
}

// Four numbers of a vector of this width, which begins at `to`.
template <typename T>
static inline void put_four(device T* to, uint first, uint width, float4 x) {
    if (cache::BY_FOURS) {
        if (first < width) {
            *(device vec<T, 4>*)(to + first) = vec<T, 4>(T(x.x), T(x.y), T(x.z), T(x.w));
        }
        return;
    }
    UNROLL
    for (ushort k = 0; k < 4; k++) {
        if (first + k < width) {
            to[first + k] = T(x[k]);
        }
    }
}

// What a part with this largest score is worth beside `largest`; nothing where it has no token: then it has no sum.
static inline float worth(float2 stats, float largest) {
    return stats.y == 0.0f ? 0.0f : exp2(stats.x - largest);
}

// Takes scores into the online softmax of a simdgroup's ROWS rows, 32 / COUNT lanes a score: those of all rows with a token, then
// those with the next one. Each lane keeps its row's largest score and the sum of its weights; gives the score's weight and, in
// `kept`, what the row's sums so far are to be multiplied by.
template <ushort COUNT, ushort ROWS>
static inline float weigh(float score, thread float& largest, thread float& total, thread float& kept) {
    constexpr ushort OF_TOKEN = 32 / COUNT * ROWS;
    float most = score;
    UNROLL
    for (ushort apart = OF_TOKEN; apart < 32; apart *= 2) {
        most = fmax(most, simd_shuffle_xor(most, apart));
    }
    most = fmax(most, largest);
    // What is not seen has none, even where all that is seen is minus infinity.
    const float weight = score == none() ? 0.0f : exp2(score - most);
    float sum = weight;
    UNROLL
    for (ushort apart = OF_TOKEN; apart < 32; apart *= 2) {
        sum += simd_shuffle_xor(sum, apart);
    }
    kept = exp2(largest - most);
    total = fma(total, kept, sum);
    largest = most;
    return weight;
}

} // namespace paged
