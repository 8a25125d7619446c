// What kernels that multiply with rows of a weight in floating point have in common.
#pragma once

#include <metal_stdlib>

#include "rows.h"

namespace dense {

using namespace metal;

// How the weight is stored.
enum : ushort { F32 = 0, F16 = 1, BF16 = 2 };

constant ushort KIND [[function_constant(24)]];
// Bytes of the weight that a load takes, and of x at most: 16 or 8; rows of the weight, a multiple of eight elements long, begin
// at multiples of it, and so do those of activations, or at a multiple of four elements; or 0, an element. The host has checked
// it. (Files align tensors to eight bytes.)
constant ushort LOADS [[function_constant(25)]];

static inline uint element_size() { return KIND == F32 ? 4 : 2; }

// An element of the weight.
static inline float element(device const uchar* weight, ulong index) {
    if (KIND == F32) {
        return ((device const float*)weight)[index];
    }
    const ushort bits = ((device const ushort*)weight)[index];
    return KIND == F16 ? float(as_type<half>(bits)) : as_type<float>(uint(bits) << 16);
}

// The two elements of a word.
static inline float2 pair(uint word) {
    if (KIND == F16) {
        return float2(as_type<half2>(word));
    }
    return float2(as_type<float>(word << 16), as_type<float>(word & 0xffff0000u));
}

// Eight elements of the weight as they are stored: in `low` alone where an element has two bytes.
struct Eight {
    uint4 low;
    uint4 high;
};

static inline uint4 sixteen_bytes(device const uchar* from) {
    if (LOADS == 16) {
        return *(device const uint4*)from;
    }
    const uint2 low = *(device const uint2*)from, high = *(device const uint2*)(from + 8);
    return uint4(low.x, low.y, high.x, high.y);
}

static inline Eight stored(device const uchar* weight, ulong index) {
    device const uchar* from = weight + index * element_size();
    Eight eight;
    eight.low = sixteen_bytes(from);
    eight.high = KIND == F32 ? sixteen_bytes(from + 16) : uint4(0);
    return eight;
}

static inline void values_of(Eight eight, thread float4& low, thread float4& high) {
    if (KIND == F32) {
        low = as_type<float4>(eight.low);
        high = as_type<float4>(eight.high);
    } else {
        const float2 a = pair(eight.low.x), b = pair(eight.low.y), c = pair(eight.low.z), d = pair(eight.low.w);
        low = float4(a.x, a.y, b.x, b.y);
        high = float4(c.x, c.y, d.x, d.y);
    }
}

// Adds to each sum the products of its row of W, which begins at `w`, and its row of x, of TURNS times eight elements, `span`
// apart from `at` on. All of the weight's are asked for before any is used.
template <ushort TURNS, ushort M, ushort ROWS, typename X>
static inline void add_along(
    thread device const uchar* (&w)[ROWS],
    thread const X& x,
    uint at,
    uint span,
    thread float (&sums)[ROWS * M]
) {
    Eight weights[TURNS][ROWS];
    UNROLL
    for (ushort t = 0; t < TURNS; t++) {
        UNROLL
        for (ushort r = 0; r < ROWS; r++) {
            weights[t][r] = stored(w[r], at + t * span);
        }
    }
    UNROLL
    for (ushort t = 0; t < TURNS; t++) {
        float4 low[ROWS], high[ROWS];
        UNROLL
        for (ushort r = 0; r < ROWS; r++) {
            values_of(weights[t][r], low[r], high[r]);
        }
        UNROLL
        for (ushort m = 0; m < M; m++) {
            float4 x_low, x_high;
            x.eight(m, at + t * span, x_low, x_high);
            UNROLL
            for (ushort r = 0; r < ROWS; r++) {
                const ushort i = r * M + m;
                sums[i] = rows::add_dot(high[r], x_high, rows::add_dot(low[r], x_low, sums[i]));
            }
        }
    }
}

} // namespace dense
