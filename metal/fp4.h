// FP4 as it lies in a checkpoint: E2M1 codes, two to a byte, the first in the low nibble, and a scale for each group of
// 16, 32, 64 or 128 along K; and what a cache's numbers become. The only place in MSL that knows a code's value or a weight's
// scale's bits.
//
// A code becomes a half by moving bits: its three bits of magnitude to the half's lowest exponent bits and highest
// mantissa bit, its sign to the sign. That is the value times 2^-14, the code 0.5 being a subnormal half; UNIT takes it
// back. No table is read: one in constant memory, indexed by each lane, runs at a thirtieth of the memory's speed.
#pragma once

#include <metal_stdlib>

namespace fp4 {

using namespace metal;

// How a scale is stored.
enum : ushort { F16 = 0, BF16 = 1, E8M0 = 2, E4M3 = 3 };
// What a tensor's factor does to its scales.
enum : ushort { NO_FACTOR = 0, MULTIPLIED = 1, DIVIDED = 2 };

constant ushort SCALE_KIND [[function_constant(0)]];
constant ushort GROUP [[function_constant(1)]];
constant ushort FACTOR [[function_constant(2)]];
// Codes begin at a multiple of 16 bytes and scales at one of 2, rows are a multiple of 32 codes long, and activations lie as the
// kernel's widest loads want it: the host has checked it.
constant bool WIDE [[function_constant(3)]];

// What decoded codes are to be multiplied by.
constant float UNIT = 16384.0f;

// Two codes as numbers, divided by UNIT, each at bits 9 to 12 of its half: the carry of seven takes the sign to bit 15.
static inline float2 placed(uint codes) {
    return float2(as_type<half2>((codes + 0x70007000u) & 0x8e008e00u));
}

// A word's eight codes in order, divided by UNIT. A multiplication places codes and can add the carry at once; the copy of
// the code that 2^n + 1 leaves behind falls to the mask.
static inline void decode(uint word, thread float4& low, thread float4& high) {
    const float2 a = placed((word & 0x000f000fu) * 0x201u);
    const float2 b = placed((word & 0x00f000f0u) * 0x21u);
    const float2 c = placed((word & 0x0f000f00u) * 0x2002u);
    const float2 d = float2(as_type<half2>(((word >> 3) & 0x0e000e00u) | (word & 0x80008000u)));
    low = float4(a.x, b.x, c.x, d.x);
    high = float4(a.y, b.y, c.y, d.y);
}

// The four codes of a word's low half in order, divided by UNIT.
static inline float4 decode_four(uint codes) {
    return float4(
        placed(((codes & 0xfu) | (codes & 0xf0u) << 12) << 9),
        placed(((codes >> 8 & 0xfu) | (codes & 0xf000u) << 4) << 9)
    );
}

// Two E4M3 numbers, at the low bytes of the halves of a word, divided by 256: as halves of the same bits, the sign moved up by a
// carry. Subnormal ones are exact.
static inline float2 e4m3(uint two) {
    return float2(as_type<half2>((two + (two & 0x00800080u)) << 7));
}

// The same where a number may be none: all ones but for the sign.
static inline float2 e4m3_or_nan(uint two) {
    const uint none = ((two & 0x007f007fu) + 0x00010001u) & 0x00800080u;
    return float2(as_type<half2>((two + (two & 0x00800080u)) << 7 | none * 0xf8u));
}

// A group's scale, divided by what of_scales() puts back.
static inline float scale(device const uchar* scales, uint index) {
    if (SCALE_KIND == F16) {
        return float(((device const half*)scales)[index]);
    }
    if (SCALE_KIND == BF16) {
        return as_type<float>(uint(((device const ushort*)scales)[index]) << 16);
    }
    if (SCALE_KIND == E8M0) {
        const uint bits = scales[index];
        return as_type<float>(bits == 0 ? 0x00400000u : bits << 23);
    }
    return e4m3(scales[index]).x;
}

// The scales of two neighbouring groups of a row, of which the first is even.
static inline float2 two_scales(device const uchar* scales, uint index) {
    if (SCALE_KIND == E4M3 && WIDE) {
        const uint two = *(device const ushort*)(scales + index);
        return e4m3((two | two << 8) & 0x00ff00ffu);
    }
    return float2(scale(scales, index), scale(scales, index + 1));
}

// What sums of products with scales are to be multiplied by: it has the tensor's factor in it.
static inline float of_scales(float factor) {
    const float all = SCALE_KIND == E4M3 ? 256.0f : 1.0f;
    return FACTOR == MULTIPLIED ? all * factor : FACTOR == DIVIDED ? all / factor : all;
}

// The code of the magnitude nearest to `a`, a number without a sign, over the scale `by`: of two as near the even one; beyond 6 that of 6.
// A border between codes has three significant bits at most: its product with a scale of few is exact.
static inline uint encode(float a, float by) {
    return uint(a > 0.25f * by) + uint(a >= 0.75f * by) + uint(a > 1.25f * by) + uint(a >= 1.75f * by)
        + uint(a > 2.5f * by) + uint(a >= 3.5f * by) + uint(a > 5.0f * by);
}

// The value of a code without its sign.
static inline float magnitude(uint code) { return UNIT * float(as_type<half>(ushort(code << 9))); }

} // namespace fp4
