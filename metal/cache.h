// A paged cache's pool: blocks of tokens, whose vectors are stored as the layout says (src/kv/layout.rs, src/kv/codec.rs).
#pragma once

#include <metal_stdlib>

#include "args.h"
#include "fp4.h"

namespace cache {

using namespace metal;

// How vectors are stored. A rotary key beside a latent is F16 where that is, and else BF16.
enum : ushort { F16 = 0, BF16 = 1, FP8 = 2, FP4 = 3 };

constant ushort ENCODING [[function_constant(32)]];
// Elements that share a scale: 128 of FP8, 16 or 32 of FP4, 0 where there are no scales.
constant ushort SHARING [[function_constant(33)]];
// Vectors, but for rotary keys, are stored rotated: src/kv/hadamard.rs.
constant bool ROTATED [[function_constant(34)]];

// Where the codes of a token's vector begin in the pool.
static inline ulong codes_at(constant CachePart& part, uint block, uint offset, uint head) {
    return ulong(block) * part.block_bytes + (part.codes + head * part.head_bytes + offset * part.code_stride);
}

// Where its scales do.
static inline ulong scales_at(constant CachePart& part, uint block, uint offset, uint head) {
    return ulong(block) * part.block_bytes + (part.scales + head * part.head_bytes + offset * part.scale_stride);
}

// The scale of a group of FP4, a UE5M3: the upper half of a half, without the sign.
static inline float fp4_scale(uint byte) { return float(as_type<half>(ushort(byte << 7))); }

// The block in which vectors of this width are rotated: the largest power of two that divides it, up to 64.
static inline uint rotation_block(uint width) { return min(width & (0u - width), 64u); }

// What the transform of a block is multiplied by: 1 / √block as src/kv/hadamard.rs rounds it, for blocks up to 64.
static inline float rotation_factor(uint block) {
    const uint power = 31 - clz(block);
    const float whole = as_type<float>((127 - power / 2) << 23);
    return power % 2 == 0 ? whole : whole * 0.70710677f;
}

// Whether element i of a block changes its sign before the transform.
static inline bool turns(uint i) { return (i * 0x9e3779b1u) >> 31 != 0; }

// Whether four elements can be loaded at once: vectors are a multiple of four long, so that the layout has them begin where that
// many do. (Those of FP4 always are.)
constant bool BY_FOURS [[function_constant(35)]];

static inline float sixteen_bits(device const uchar* codes, uint i, bool is_half) {
    const ushort bits = ((device const ushort*)codes)[i];
    return is_half ? float(as_type<half>(bits)) : as_type<float>(uint(bits) << 16);
}

// An element of a rotary key.
static inline float of_rotary(device const uchar* codes, uint i) { return sixteen_bits(codes, i, ENCODING == F16); }

// An element of a vector. NaN and infinity are what src/kv/codec.rs has them be.
static inline float element(device const uchar* codes, device const uchar* scales, uint i) {
    if (ENCODING == FP8) {
        return fp4::e4m3_or_nan(codes[i]).x * 256.0f * ((device const float*)scales)[i / SHARING];
    }
    if (ENCODING == FP4) {
        const uint code = uint(codes[i / 2]) >> (i % 2 * 4) & 0xfu;
        return fp4::decode_four(code).x * (fp4::UNIT * fp4_scale(scales[i / SHARING]));
    }
    return sixteen_bits(codes, i, ENCODING == F16);
}

// Four elements of a vector from `i` on, a multiple of four.
static inline float4 four(device const uchar* codes, device const uchar* scales, uint i) {
    if (ENCODING == FP8) {
        // Scaled in two steps: a scale of 2^120 times 256 would be infinite.
        const uint all = *(device const uint*)(codes + i);
        const float2 even = fp4::e4m3_or_nan(all & 0x00ff00ffu), odd = fp4::e4m3_or_nan(all >> 8 & 0x00ff00ffu);
        return float4(even.x, odd.x, even.y, odd.y) * 256.0f * ((device const float*)scales)[i / SHARING];
    }
    if (ENCODING == FP4) {
        const uint all = *(device const ushort*)(codes + i / 2);
        return fp4::decode_four(all) * (fp4::UNIT * fp4_scale(scales[i / SHARING]));
    }
    if (ENCODING == F16) {
        return float4(*(device const half4*)(codes + 2 * i));
    }
    const ushort4 bits = *(device const ushort4*)(codes + 2 * i);
    return as_type<float4>(uint4(bits) << 16);
}

// The same, with zeros for elements that a vector does not have.
static inline float4 four_of(device const uchar* codes, device const uchar* scales, uint i, uint width) {
    if (BY_FOURS) {
        return i < width ? four(codes, scales, i) : float4(0.0f);
    }
    float4 values = float4(0.0f);
    for (uint k = 0; k < 4; k++) {
        values[k] = i + k < width ? element(codes, scales, i + k) : 0.0f;
    }
    return values;
}

} // namespace cache
