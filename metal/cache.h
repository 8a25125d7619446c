// A paged cache's pool: blocks of tokens, whose vectors are stored as the layout says (src/kv/layout.rs, src/kv/codec.rs).
#pragma once

#include <metal_stdlib>

#include "args.h"

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
    return power % 2 == 0 ? whole : whole * 0.70710683f;
}

// Whether element i of a block changes its sign before the transform.
static inline bool turns(uint i) { return (i * 0x9e3779b1u) >> 31 != 0; }

} // namespace cache
