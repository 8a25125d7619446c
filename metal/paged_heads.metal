// Attention over a paged cache of keys and values of heads (multi-head and grouped-query). All query heads of a kv head share one
// read of its keys and values.
//
// | kernel                        | threadgroup                                                      | grid (x, y, z)                |
// |-------------------------------|------------------------------------------------------------------|-------------------------------|
// | paged_heads_<type>_w<W>_r<R>  | a query token, a kv head, a split of its positions; R query heads | splits, tokens, kv heads and groups of their query heads |
//
// W: the widest key or value, 128 or 256.
//
// | buffer | what                                                       |       |
// |--------|------------------------------------------------------------|-------|
// | 0      | queries, a token's heads a stride apart                    | read  |
// | 1      | the pool                                                   | read  |
// | 2      | index: slots, positions, starts of tables; tables          | read  |
// | 3      | outputs (WHOLE), [tokens, heads, value width]              | write |
// | 4      | parts, float [tokens, heads, splits, value width] (PARTS)  | write |
// | 5      | stats, float2 [tokens, heads, splits] (PARTS)              | write |
// | 6      | PagedArgs                                                  | bytes |
//
// Each simdgroup, of eight or four, takes four tokens at a time, four tokens further than the next one, and decodes their keys and
// values straight into registers: no byte of them is read or decoded twice. In registers R queries and R sums, W / 32 floats a lane
// each: 64 floats where most, beside the four tokens' scores, 4 · R. At the end the simdgroups' sums meet in threadgroup memory, 16
// KB, as parts do in device memory.
//
// A query head and a token cost 4 · W operations, of the kv head's 2 · W numbers: 2 · R FLOP a number, 16 a byte of FP4 with four
// query heads a kv head, 4 of F16: memory bounds it, and a smaller format saves time.

#include <metal_stdlib>

#include "args.h"
#include "cache.h"
#include "paged.h"
#include "rows.h"

using namespace metal;

namespace paged_heads {

// Tokens that a simdgroup takes at once.
static constant constexpr ushort STEP = 4;

// Simdgroups whose sums threadgroup memory holds; as src/metal/paged_attention.rs has it.
static constexpr ushort simdgroups_of(ushort fours, ushort heads) { return fours * heads > 4 ? 4 : 8; }

} // namespace paged_heads

template <typename T, ushort FOURS, ushort HEADS>
[[kernel, max_total_threads_per_threadgroup(256)]] void paged_head(
    device const T* queries [[buffer(0)]],
    device const uchar* pool [[buffer(1)]],
    device const uint* index [[buffer(2)]],
    device T* y [[buffer(3), function_constant(paged::WHOLE)]],
    device float* parts [[buffer(4), function_constant(paged::PARTS)]],
    device float2* stats [[buffer(5), function_constant(paged::PARTS)]],
    constant PagedArgs& args [[buffer(6)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]
) {
    constexpr ushort STEP = paged_heads::STEP, SIMDGROUPS = paged_heads::simdgroups_of(FOURS, HEADS);
    threadgroup float met[SIMDGROUPS][HEADS][FOURS * 128] __attribute__((aligned(16)));
    threadgroup float2 met_stats[SIMDGROUPS][HEADS];

    const uint token = args.first + group.y;
    device const uint* table = index + index[2 * args.tokens + token];
    const uint2 seen = paged::seen(index[args.tokens + token], group.x, args);
    const uint groups = (args.together + HEADS - 1) / HEADS;
    const uint kv_head = group.z / groups;
    // A head that is not there is read as the last one of the kv head's, and not written.
    const uint head = kv_head * args.together + group.z % groups * HEADS;
    const uint heads = (kv_head + 1) * args.together;

    float4 query[HEADS][FOURS], sums[HEADS][FOURS];
    UNROLL
    for (ushort h = 0; h < HEADS; h++) {
        device const T* from =
            queries + ulong(token) * args.q_token + ulong(rows::within(head + h, heads)) * args.q_head;
        paged::take_query(from, args.keys.width, args.score_factor, lane, query[h]);
        if (cache::ROTATED) {
            paged::rotate_query(query[h], args.keys.width, lane);
        }
        UNROLL
        for (ushort i = 0; i < FOURS; i++) {
            sums[h][i] = float4(0.0f);
        }
    }
    constexpr ushort COUNT = STEP * HEADS, LANES = 32 / COUNT;
    float largest = paged::none(), total = 0.0f;

    for (uint first = seen.x + simdgroup * STEP; first < seen.y; first += SIMDGROUPS * STEP) {
        uint block[STEP], offset[STEP];
        float dots[COUNT];
        UNROLL
        for (ushort t = 0; t < STEP; t++) {
            // A token that is not seen is read as the last one, and has no weight.
            const uint at = rows::within(first + t, seen.y);
            block[t] = table[at / args.keys.block_tokens];
            offset[t] = at % args.keys.block_tokens;
            device const uchar* codes = pool + cache::codes_at(args.keys, block[t], offset[t], kv_head);
            device const uchar* scales = pool + cache::scales_at(args.keys, block[t], offset[t], kv_head);
            UNROLL
            for (ushort h = 0; h < HEADS; h++) {
                dots[t * HEADS + h] = 0.0f;
            }
            UNROLL
            for (ushort i = 0; i < FOURS; i++) {
                const float4 key = cache::four_of(codes, scales, paged::element_of(i, lane), args.keys.width);
                UNROLL
                for (ushort h = 0; h < HEADS; h++) {
                    dots[t * HEADS + h] = rows::add_dot(key, query[h][i], dots[t * HEADS + h]);
                }
            }
        }
        float score = rows::shared_out<COUNT, 32>(dots, lane);
        score = first + lane / (LANES * HEADS) < seen.y ? score : paged::none();
        float kept;
        const float weight = paged::weigh<COUNT, HEADS>(score, largest, total, kept);
        if (simd_any(kept != 1.0f)) {
            UNROLL
            for (ushort h = 0; h < HEADS; h++) {
                const float by = simd_shuffle(kept, h * LANES);
                UNROLL
                for (ushort i = 0; i < FOURS; i++) {
                    sums[h][i] *= by;
                }
            }
        }
        UNROLL
        for (ushort t = 0; t < STEP; t++) {
            device const uchar* codes = pool + cache::codes_at(args.values, block[t], offset[t], kv_head);
            device const uchar* scales = pool + cache::scales_at(args.values, block[t], offset[t], kv_head);
            float4 value[FOURS];
            UNROLL
            for (ushort i = 0; i < FOURS; i++) {
                value[i] = cache::four_of(codes, scales, paged::element_of(i, lane), args.values.width);
            }
            UNROLL
            for (ushort h = 0; h < HEADS; h++) {
                const float by = simd_shuffle(weight, (t * HEADS + h) * LANES);
                UNROLL
                for (ushort i = 0; i < FOURS; i++) {
                    sums[h][i] = fma(value[i], float4(by), sums[h][i]);
                }
            }
        }
    }

    UNROLL
    for (ushort h = 0; h < HEADS; h++) {
        UNROLL
        for (ushort i = 0; i < FOURS; i++) {
            *(threadgroup float4*)&met[simdgroup][h][paged::element_of(i, lane)] = sums[h][i];
        }
    }
    if (lane % LANES == 0 && lane < LANES * HEADS) {
        met_stats[simdgroup][lane / LANES] = float2(largest, total);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    const uint width = args.values.width;
    for (uint h = simdgroup; h < HEADS; h += SIMDGROUPS) {
        float most = paged::none();
        UNROLL
        for (ushort s = 0; s < SIMDGROUPS; s++) {
            most = fmax(most, met_stats[s][h].x);
        }
        float4 sum[FOURS];
        UNROLL
        for (ushort i = 0; i < FOURS; i++) {
            sum[i] = float4(0.0f);
        }
        float weights = 0.0f;
        UNROLL
        for (ushort s = 0; s < SIMDGROUPS; s++) {
            const float by = paged::worth(met_stats[s][h], most);
            weights = fma(met_stats[s][h].y, by, weights);
            UNROLL
            for (ushort i = 0; i < FOURS; i++) {
                sum[i] = fma(*(threadgroup const float4*)&met[s][h][paged::element_of(i, lane)], float4(by), sum[i]);
            }
        }
        if (cache::ROTATED) {
            paged::rotate_back(sum, width, lane);
        }
        if (head + h < heads) {
            const ulong row = ulong(token) * args.heads + head + h;
            const ulong part = (ulong(group.y) * args.heads + head + h) * args.splits + group.x;
            UNROLL
            for (ushort i = 0; i < FOURS; i++) {
                const uint element = paged::element_of(i, lane);
                if (paged::WHOLE) {
                    paged::put_four(y + row * width, element, width, sum[i] / weights);
                } else {
                    paged::put_four(parts + part * width, element, width, sum[i]);
                }
            }
            if (paged::PARTS && lane == 0) {
                stats[part] = float2(most, weights);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------

#define INSTANTIATE_HEADS(name, ...) template [[host_name(name)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;

#define INSTANTIATE_HEADS_TYPE(type, T)                                   \
    INSTANTIATE_HEADS("paged_heads_" type "_w128_r1", paged_head<T, 1, 1>) \
    INSTANTIATE_HEADS("paged_heads_" type "_w128_r4", paged_head<T, 1, 4>) \
    INSTANTIATE_HEADS("paged_heads_" type "_w128_r8", paged_head<T, 1, 8>) \
    INSTANTIATE_HEADS("paged_heads_" type "_w256_r1", paged_head<T, 2, 1>) \
    INSTANTIATE_HEADS("paged_heads_" type "_w256_r4", paged_head<T, 2, 4>)

INSTANTIATE_HEADS_TYPE("f32", float)
INSTANTIATE_HEADS_TYPE("f16", half)
INSTANTIATE_HEADS_TYPE("bf16", bfloat)
