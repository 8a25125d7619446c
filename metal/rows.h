// What kernels that multiply with rows of an FP4 weight have in common.
#pragma once

#include <metal_stdlib>

#include "fp4.h"

// For loops whose arrays are to stay in registers.
#define UNROLL _Pragma("clang loop unroll(full)")

namespace rows {

using namespace metal;

// K, where it is known when the pipeline is made, which unrolls loops over it; or 0.
constant ushort KNOWN_K [[function_constant(11)]];

static inline uint known_k(uint k) { return KNOWN_K != 0 ? uint(KNOWN_K) : k; }

// Rows that are not there are read as the last one, and not written.
static inline uint within(uint index, uint count) { return min(index, count - 1); }

// Bytes of a scale.
static inline uint scale_size() { return fp4::SCALE_KIND <= fp4::BF16 ? 2 : 1; }

// Eight activations, sixteen bytes at a time.
static inline void load_wide(device const float* x, thread float4& low, thread float4& high) {
    device const float4* four = (device const float4*)x;
    low = four[0];
    high = four[1];
}
static inline void load_wide(device const half* x, thread float4& low, thread float4& high) {
    const uint4 eight = *(device const uint4*)x;
    low = float4(as_type<half4>(eight.xy));
    high = float4(as_type<half4>(eight.zw));
}
static inline void load_wide(device const bfloat* x, thread float4& low, thread float4& high) {
    const uint4 eight = *(device const uint4*)x;
    low = float4(as_type<bfloat4>(eight.xy));
    high = float4(as_type<bfloat4>(eight.zw));
}

// Eight activations.
template <typename T>
static inline void load(device const T* x, thread float4& low, thread float4& high) {
    if (fp4::WIDE) {
        load_wide(x, low, high);
    } else {
        low = float4(float(x[0]), float(x[1]), float(x[2]), float(x[3]));
        high = float4(float(x[4]), float(x[5]), float(x[6]), float(x[7]));
    }
}

// sum + Σ a · b, one after the other.
static inline float add_dot(float4 a, float4 b, float sum) {
    return fma(a.w, b.w, fma(a.z, b.z, fma(a.y, b.y, fma(a.x, b.x, sum))));
}

// Where rows of weights are, and what multiplies or divides the scales of each.
template <ushort ROWS>
struct Rows {
    device const uint* codes[ROWS];
    device const uchar* scales[ROWS];
    float factor[ROWS];
};

// Adds to each row's sum its product of 32 codes, from `at` on, with activations, divided by fp4::UNIT. Loads are wide.
template <ushort ROWS, typename T>
static inline void add_32(thread const Rows<ROWS>& rows, device const T* x, uint at, thread float (&sums)[ROWS]) {
    uint4 words[ROWS];
    // Two where groups are of 16.
    float scale[ROWS][2];
    UNROLL
    for (ushort r = 0; r < ROWS; r++) {
        words[r] = *(device const uint4*)(rows.codes[r] + at / 8);
        scale[r][0] = fp4::scale(rows.scales[r], at / fp4::GROUP, rows.factor[r]);
        if (fp4::GROUP == 16) {
            scale[r][1] = fp4::scale(rows.scales[r], at / fp4::GROUP + 1, rows.factor[r]);
        }
    }
    // Of even and odd fours: a sum that waits for itself is slow.
    float even[ROWS], odd[ROWS];
    UNROLL
    for (ushort w = 0; w < 4; w++) {
        if (w == 0 || (w == 2 && fp4::GROUP == 16)) {
            UNROLL
            for (ushort r = 0; r < ROWS; r++) {
                even[r] = 0.0f;
                odd[r] = 0.0f;
            }
        }
        float4 x_low, x_high;
        load_wide(x + at + w * 8, x_low, x_high);
        UNROLL
        for (ushort r = 0; r < ROWS; r++) {
            float4 low, high;
            fp4::decode(words[r][w], low, high);
            even[r] = add_dot(low, x_low, even[r]);
            odd[r] = add_dot(high, x_high, odd[r]);
        }
        if (w == 3 || (w == 1 && fp4::GROUP == 16)) {
            UNROLL
            for (ushort r = 0; r < ROWS; r++) {
                sums[r] = fma(even[r] + odd[r], scale[r][fp4::GROUP == 16 ? w / 2 : 0], sums[r]);
            }
        }
    }
}

// The same of eight codes, for loads that need not be wide.
template <ushort ROWS, typename T>
static inline void add_8(thread const Rows<ROWS>& rows, device const T* x, uint at, thread float (&sums)[ROWS]) {
    float4 x_low, x_high;
    load(x + at, x_low, x_high);
    UNROLL
    for (ushort r = 0; r < ROWS; r++) {
        float4 low, high;
        fp4::decode(rows.codes[r][at / 8], low, high);
        const float part = add_dot(high, x_high, add_dot(low, x_low, 0.0f));
        sums[r] = fma(part, fp4::scale(rows.scales[r], at / fp4::GROUP, rows.factor[r]), sums[r]);
    }
}

// Adds up each of COUNT numbers, a power of two, over LANES neighbouring lanes: the first LANES / COUNT lanes get the first
// number's sum, the next ones the second's. At each step lanes keep half of the numbers and give the other half away.
template <ushort COUNT, ushort LANES>
static inline float shared_out(thread float (&numbers)[COUNT], ushort lane) {
    UNROLL
    for (ushort kept = COUNT / 2, apart = LANES / 2; kept > 0; kept /= 2, apart /= 2) {
        const bool upper = (lane & apart) != 0;
        UNROLL
        for (ushort i = 0; i < kept; i++) {
            const float first = numbers[i], second = numbers[kept + i];
            numbers[i] = (upper ? second : first) + simd_shuffle_xor(upper ? first : second, apart);
        }
    }
    float sum = numbers[0];
    UNROLL
    for (ushort apart = LANES / COUNT / 2; apart > 0; apart /= 2) {
        sum += simd_shuffle_xor(sum, apart);
    }
    return sum;
}

// Where a lane's two elements of an 8 × 8 fragment are: `(row, column)`, and the next column. (Metal does not say; MLX's and
// every other kernel that reaches into fragments rely on it.)
static inline ushort2 fragment_place(ushort lane) {
    const ushort quad = lane / 4;
    return ushort2((quad & 4) + (lane / 2) % 4, (quad & 2) * 2 + (lane % 2) * 2);
}

} // namespace rows
