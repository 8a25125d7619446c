// Attention over a long context is computed in splits, runs of positions, each of which leaves a part: with m its largest score
// in base 2, Σ 2^(score - m) · value, and l = Σ 2^(score - m). A split without a token that is seen has the least number for m, l = 0
// and zeros. What belongs together is Σ 2^(m - M) · part / Σ 2^(m - M) · l, M being the largest m.
#pragma once

#include <metal_stdlib>

#include "rows.h"

namespace merge {

using namespace metal;

// Columns that a simdgroup merges at once.
static constant constexpr ushort COLUMNS = 64;

// Of a row of `width` columns its columns `first + lane` and, 32 later, the next; those that are not there are the last one. The
// row's parts lie one after the other, and so do its (m, l). All lanes of a simdgroup come here together. NaN in a part or in m
// is NaN in what belongs together, and so is an infinite m.
static inline float2 columns(
    device const float* parts,
    device const float2* stats,
    uint splits,
    uint width,
    uint first,
    ushort lane
) {
    float largest = -INFINITY;
    for (uint split = lane; split < splits; split += 32) {
        largest = max(largest, stats[split].x);
    }
    largest = simd_max(largest);

    const uint left = rows::within(first + lane, width), right = rows::within(first + 32 + lane, width);
    float2 sum = float2(0.0f);
    float total = 0.0f;
    for (uint start = 0; start < splits; start += 32) {
        // A lane has the weight of a split.
        const uint count = min(splits - start, 32u);
        float weight = 0.0f;
        if (lane < count) {
            const float2 stat = stats[start + lane];
            weight = exp2(stat.x - largest);
            total = fma(weight, stat.y, total);
        }
        device const float* part = parts + ulong(start) * width;
        // Four parts are asked for at once.
        ushort split = 0;
        for (; split + 4 <= count; split += 4) {
            float2 values[4];
            UNROLL
            for (ushort i = 0; i < 4; i++) {
                values[i] = float2(part[left], part[right]);
                part += width;
            }
            UNROLL
            for (ushort i = 0; i < 4; i++) {
                sum = fma(values[i], simd_shuffle(weight, split + i), sum);
            }
        }
        for (; split < count; split++) {
            sum = fma(float2(part[left], part[right]), simd_shuffle(weight, split), sum);
            part += width;
        }
    }
    return sum / simd_sum(total);
}

} // namespace merge
