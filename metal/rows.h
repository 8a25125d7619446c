// What kernels that multiply with rows of an FP4 weight have in common.
#pragma once

#include <metal_stdlib>

#include "fp4.h"

namespace rows {

using namespace metal;

// Rows that are not there are read as the last one, and not written.
static inline uint within(uint index, uint count) { return min(index, count - 1); }

// Bytes of a scale.
static inline uint scale_size() { return fp4::SCALE_KIND <= fp4::BF16 ? 2 : 1; }

// Eight activations.
template <typename T>
static inline void load(device const T* x, thread float4& low, thread float4& high) {
    if (fp4::WIDE) {
        device const vec<T, 4>* four = (device const vec<T, 4>*)x;
        low = float4(four[0]);
        high = float4(four[1]);
    } else {
        low = float4(float(x[0]), float(x[1]), float(x[2]), float(x[3]));
        high = float4(float(x[4]), float(x[5]), float(x[6]), float(x[7]));
    }
}

// Where a lane's two elements of an 8 × 8 fragment are: `(row, column)`, and the next column. (Metal does not say; MLX's and
// every other kernel that reaches into fragments rely on it.)
static inline ushort2 fragment_place(ushort lane) {
    const ushort quad = lane / 4;
    return ushort2((quad & 4) + (lane / 2) % 4, (quad & 2) * 2 + (lane % 2) * 2);
}

} // namespace rows
