// What kernels that multiply with rows of an FP4 weight have in common.
#pragma once

#include <metal_stdlib>

#include "fp4.h"

// For loops whose arrays are to stay in registers.
#define UNROLL _Pragma("clang loop unroll(full)")

namespace rows {

using namespace metal;

// How long sums are, where it is known when the pipeline is made, which unrolls loops over it; or 0.
constant ushort KNOWN [[function_constant(11)]];

static inline uint known_length(uint length) { return KNOWN != 0 ? uint(KNOWN) : length; }

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

// Activations as they are.
template <typename T>
struct Activations {
    device const T* x;

    void take(uint at, thread float4& low, thread float4& high) const { load(x + at, low, high); }
};

// Codes that a lane takes at once of each row, for these activations: 32, but 16 where activations are twice as long, which lanes
// would read too far apart.
template <typename T>
static constexpr ushort words_of() {
    return sizeof(T) == 2 ? 4 : 2;
}

// Where rows of weights are.
template <ushort ROWS>
struct Rows {
    device const uint* codes[ROWS];
    device const uchar* scales[ROWS];
};

// Rows of W from `first` of a head on.
template <ushort ROWS>
static inline void find(
    device const uint* codes,
    device const uchar* scales,
    uint head_row,
    uint first,
    uint n,
    uint k,
    thread Rows<ROWS>& found
) {
    UNROLL
    for (ushort r = 0; r < ROWS; r++) {
        const uint row = head_row + within(first + r, n);
        found.codes[r] = codes + row * (k / 8);
        found.scales[r] = scales + ulong(row) * (k / fp4::GROUP) * scale_size();
    }
}

// Two words of a row's codes: sixteen, the smallest group.
static inline uint2 two_words(device const uint* codes) {
    if (fp4::WIDE) {
        return *(device const uint2*)codes;
    }
    return uint2(codes[0], codes[1]);
}

// Adds to each row's sum its product of WORDS words of codes, 1, 2 or 4 from the code `at` on, with activations. What has two
// words or more is a whole group or more, or a part of one.
template <ushort WORDS, ushort ROWS, typename X>
static inline void add(thread const Rows<ROWS>& rows, thread const X& x, uint at, thread float (&sums)[ROWS]) {
    // Groups of 16 are shorter than a chunk of four words.
    const bool two_groups = WORDS == 4 && fp4::GROUP == 16;
    uint words[ROWS][WORDS];
    float2 scale[ROWS];
    UNROLL
    for (ushort r = 0; r < ROWS; r++) {
        device const uint* codes = rows.codes[r] + at / 8;
        if (WORDS == 4) {
            const uint4 four = *(device const uint4*)codes;
            words[r][0] = four.x;
            words[r][1 % WORDS] = four.y;
            words[r][2 % WORDS] = four.z;
            words[r][3 % WORDS] = four.w;
        } else if (WORDS == 2 && fp4::WIDE) {
            const uint2 two = *(device const uint2*)codes;
            words[r][0] = two.x;
            words[r][1 % WORDS] = two.y;
        } else {
            UNROLL
            for (ushort w = 0; w < WORDS; w++) {
                words[r][w] = codes[w];
            }
        }
        if (two_groups) {
            scale[r] = fp4::two_scales(rows.scales[r], at / fp4::GROUP);
        } else {
            scale[r].x = fp4::scale(rows.scales[r], at / fp4::GROUP);
        }
    }
    // Of even and odd fours: a sum that waits for itself is slow.
    float even[ROWS], odd[ROWS];
    UNROLL
    for (ushort w = 0; w < WORDS; w++) {
        if (w == 0 || (w == 2 && two_groups)) {
            UNROLL
            for (ushort r = 0; r < ROWS; r++) {
                even[r] = 0.0f;
                odd[r] = 0.0f;
            }
        }
        float4 x_low, x_high;
        x.take(at + w * 8, x_low, x_high);
        UNROLL
        for (ushort r = 0; r < ROWS; r++) {
            float4 low, high;
            fp4::decode(words[r][w], low, high);
            even[r] = add_dot(low, x_low, even[r]);
            odd[r] = add_dot(high, x_high, odd[r]);
        }
        if (w == WORDS - 1 || (w == 1 && two_groups)) {
            UNROLL
            for (ushort r = 0; r < ROWS; r++) {
                sums[r] = fma(even[r] + odd[r], two_groups && w > 1 ? scale[r].y : scale[r].x, sums[r]);
            }
        }
    }
}

// Adds up each of COUNT numbers, a power of two, over lanes that differ in one bit each of as many as COUNT has: `apart`, half of
// it, and so on. At each step lanes keep half of the numbers and give the other half away: the lane whose bits are 0 is left
// with the first number's sum, the next one by these bits with the second's.
template <ushort COUNT>
static inline float halved(thread float (&numbers)[COUNT], ushort lane, ushort apart) {
    UNROLL
    for (ushort kept = COUNT / 2; kept > 0; kept /= 2) {
        const bool upper = (lane & apart) != 0;
        UNROLL
        for (ushort i = 0; i < kept; i++) {
            const float first = numbers[i], second = numbers[kept + i];
            numbers[i] = (upper ? second : first) + simd_shuffle_xor(upper ? first : second, apart);
        }
        apart /= 2;
    }
    return numbers[0];
}

// Adds up each of COUNT numbers over LANES neighbouring lanes: the first LANES / COUNT of them get the first number's sum, the
// next ones the second's.
template <ushort COUNT, ushort LANES>
static inline float shared_out(thread float (&numbers)[COUNT], ushort lane) {
    float sum = halved(numbers, lane, LANES / 2);
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
