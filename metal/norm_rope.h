// What kernels that normalise rows and turn pairs of heads have in common.
#pragma once

#include <metal_stdlib>

namespace norm_rope {

using namespace metal;

// Rows begin at multiples of four elements, and are a multiple of four long: the host has checked it.
constant bool FOURS [[function_constant(16)]];
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
    if (FOURS) {
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
    if (FOURS) {
        for (uint i = index * 4; i < d; i += threads * 4) {
            store(y + i, load(x + i) * by * load(weight + i));
        }
    } else {
        for (uint i = index; i < d; i += threads) {
            y[i] = T(float(x[i]) * by * weight[i]);
        }
    }
}

// Where the two elements of pair i of a head are.
static inline uint2 pair_at(uint i, uint pairs) {
    const uint first = INTERLEAVED ? 2 * i : i;
    const uint second = INTERLEAVED ? 2 * i + 1 : i + pairs;
    return uint2(first, second);
}

// The two, turned.
template <typename T>
static inline float2 turned(device const T* x, uint2 at, float cosine, float sine) {
    const float a = float(x[at.x]), b = float(x[at.y]);
    return float2(a * cosine - b * sine, a * sine + b * cosine);
}

// Turns pair i of a head.
template <typename T>
static inline void turn(device const T* x, device T* y, uint i, uint pairs, float cosine, float sine) {
    const uint2 at = pair_at(i, pairs);
    const float2 both = turned(x, at, cosine, sine);
    y[at.x] = T(both.x);
    y[at.y] = T(both.y);
}

// Turns the pair at this place among those of all heads of a token, if there is one: y's heads lie together.
template <typename T>
static inline void turn_one_of(
    device const T* x,
    device T* y,
    device const float* cosines,
    device const float* sines,
    uint place,
    uint heads,
    uint pairs,
    uint x_head
) {
    if (place < heads * pairs) {
        const uint head = place / pairs, i = place % pairs;
        turn(x + ulong(head) * x_head, y + ulong(head) * pairs * 2, i, pairs, cosines[i], sines[i]);
    }
}

} // namespace norm_rope
