// Attention over a paged cache of latents (MLA, absorbed): scores of queries with latents and rotary keys, and the latents' sums
// by the scores' softmax. All heads of a token share one read of a latent, which is decoded once for them.
//
// | kernel                     | threadgroup                                                  | grid (x, y, z)         |
// |----------------------------|--------------------------------------------------------------|------------------------|
// | paged_latents_<type>_w<W>  | a query token, a split of its positions, two heads a simdgroup, up to 24 | splits, tokens, groups of heads |
//
// W: the widest latent, 128 or 512; rotary keys have up to 64 elements.
//
// | buffer | what                                                       |       |
// |--------|------------------------------------------------------------|-------|
// | 0      | queries' latent parts, a token's heads a stride apart      | read  |
// | 1      | queries' rotary parts (with rotary keys)                   | read  |
// | 2      | the pool                                                   | read  |
// | 3      | index: slots, positions, starts of tables; tables          | read  |
// | 4      | outputs (WHOLE), [tokens, heads, latent]                   | write |
// | 5      | parts, float [tokens, heads, splits, latent] (PARTS)       | write |
// | 6      | stats, float2 [tokens, heads, splits] (PARTS)              | write |
// | 7      | PagedArgs                                                  | bytes |
//
// Eight tokens at a time are decoded into threadgroup memory as floats, a row a simdgroup in turn (18 KB for 512 + 64), and met by
// every simdgroup: in registers two heads' queries (36 floats a lane for 512 + 64) and sums (32), and two rows (36). A row is read
// once from threadgroup memory for score and sum. Four scores' sums over lanes take six shuffles, the softmax is online and in
// base 2, and sums are scaled down only where a largest score changed.
//
// A query and a token cost 2 · (576 + 512) operations a head, 43.5 kFLOP for 20 heads, of 400 to 1,152 bytes: where a GPU has 25
// to 40 FLOP a byte of its memory, arithmetic in f32 bounds it in every format, and FP4 saves memory, not time. Nor would queries of
// a prompt that share a tile save much: decoding it is a tenth of what is computed with it, and they find its bytes in a cache.

#include <metal_stdlib>

#include "args.h"
#include "cache.h"
#include "paged.h"
#include "rows.h"

using namespace metal;

namespace paged_latents {

// Tokens in threadgroup memory.
static constant constexpr ushort TOKENS = 8;
// Of a simdgroup: heads, and tokens at once.
static constant constexpr ushort HEADS = 2;
static constant constexpr ushort ROWS = 2;
// As src/metal/paged_attention.rs has it.
static constant constexpr ushort MOST_ROTARY = 64;

} // namespace paged_latents

template <typename T, ushort FOURS>
[[kernel, max_total_threads_per_threadgroup(384)]] void paged_latent(
    device const T* queries [[buffer(0)]],
    device const T* rotary [[buffer(1), function_constant(paged::ROTARY)]],
    device const uchar* pool [[buffer(2)]],
    device const uint* index [[buffer(3)]],
    device T* y [[buffer(4), function_constant(paged::WHOLE)]],
    device float* parts [[buffer(5), function_constant(paged::PARTS)]],
    device float2* stats [[buffer(6), function_constant(paged::PARTS)]],
    constant PagedArgs& args [[buffer(7)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]],
    ushort simdgroups [[simdgroups_per_threadgroup]]
) {
    constexpr ushort HEADS = paged_latents::HEADS, ROWS = paged_latents::ROWS, TOKENS = paged_latents::TOKENS;
    constexpr ushort WIDTH = FOURS * 128;
    threadgroup float tile[TOKENS][WIDTH + paged_latents::MOST_ROTARY] __attribute__((aligned(16)));

    const uint token = args.first + group.y;
    device const uint* table = index + index[2 * args.tokens + token];
    const uint2 seen = paged::seen(index[args.tokens + token], group.x, args);
    const uint width = args.keys.width;
    // A head that is not there is read as the last one, and not written.
    const uint head = group.z * args.together + simdgroup * HEADS;
    const uint heads = min(args.heads, (group.z + 1) * args.together);

    float4 query[HEADS][FOURS];
    float2 turned[HEADS];
    UNROLL
    for (ushort h = 0; h < HEADS; h++) {
        const uint mine = rows::within(head + h, heads);
        device const T* from = queries + ulong(token) * args.q_token + ulong(mine) * args.q_head;
        paged::take_query(from, width, args.score_factor, lane, query[h]);
        if (cache::ROTATED) {
            paged::rotate_query(query[h], width, lane);
        }
        turned[h] = float2(0.0f);
        if (paged::ROTARY) {
            from = rotary + ulong(token) * args.rotary_token + ulong(mine) * args.rotary_head;
            UNROLL
            for (ushort k = 0; k < 2; k++) {
                const uint i = lane * 2u + k;
                turned[h][k] = i < args.values.width ? float(from[i]) * args.score_factor : 0.0f;
            }
        }
    }
    float4 sums[HEADS][FOURS];
    UNROLL
    for (ushort h = 0; h < HEADS; h++) {
        UNROLL
        for (ushort i = 0; i < FOURS; i++) {
            sums[h][i] = float4(0.0f);
        }
    }
    // Eight lanes a score: the heads' with the first row, then those with the second.
    constexpr ushort COUNT = ROWS * HEADS, LANES = 32 / COUNT;
    float largest = paged::none(), total = 0.0f;

    for (uint first = seen.x; first < seen.y; first += TOKENS) {
        // Whoever still reads the tokens before is waited for.
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint row = simdgroup; row < TOKENS; row += simdgroups) {
            // A token that is not seen is read as the last one, and has no weight.
            const uint at = rows::within(first + row, seen.y);
            const uint block = table[at / args.keys.block_tokens], offset = at % args.keys.block_tokens;
            device const uchar* codes = pool + cache::codes_at(args.keys, block, offset, 0);
            device const uchar* scales = pool + cache::scales_at(args.keys, block, offset, 0);
            UNROLL
            for (ushort i = 0; i < FOURS; i++) {
                const uint element = paged::element_of(i, lane);
                *(threadgroup float4*)&tile[row][element] = cache::four_of(codes, scales, element, width);
            }
            float2 key = float2(0.0f);
            if (paged::ROTARY) {
                codes = pool + cache::codes_at(args.values, block, offset, 0);
                UNROLL
                for (ushort k = 0; k < 2; k++) {
                    const uint i = lane * 2u + k;
                    key[k] = i < args.values.width ? cache::of_rotary(codes, i) : 0.0f;
                }
            }
            *(threadgroup float2*)&tile[row][WIDTH + lane * 2] = key;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);

        const uint there = min(seen.y - first, uint(TOKENS));
        for (uint row = 0; row < there; row += ROWS) {
            float4 latent[ROWS][FOURS];
            float dots[COUNT];
            UNROLL
            for (ushort r = 0; r < ROWS; r++) {
                UNROLL
                for (ushort i = 0; i < FOURS; i++) {
                    latent[r][i] = *(threadgroup const float4*)&tile[row + r][paged::element_of(i, lane)];
                }
                const float2 key = *(threadgroup const float2*)&tile[row + r][WIDTH + lane * 2];
                UNROLL
                for (ushort h = 0; h < HEADS; h++) {
                    float sum = fma(key.y, turned[h].y, key.x * turned[h].x);
                    UNROLL
                    for (ushort i = 0; i < FOURS; i++) {
                        sum = rows::add_dot(latent[r][i], query[h][i], sum);
                    }
                    dots[r * HEADS + h] = sum;
                }
            }
            float score = rows::shared_out<COUNT, 32>(dots, lane);
            score = row + lane / (LANES * HEADS) < there ? score : paged::none();
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
            for (ushort r = 0; r < ROWS; r++) {
                UNROLL
                for (ushort h = 0; h < HEADS; h++) {
                    const float by = simd_shuffle(weight, (r * HEADS + h) * LANES);
                    UNROLL
                    for (ushort i = 0; i < FOURS; i++) {
                        sums[h][i] = fma(latent[r][i], float4(by), sums[h][i]);
                    }
                }
            }
        }
    }

    UNROLL
    for (ushort h = 0; h < HEADS; h++) {
        const float of_head = simd_shuffle(total, h * LANES), most = simd_shuffle(largest, h * LANES);
        if (cache::ROTATED) {
            paged::rotate_back(sums[h], width, lane);
        }
        if (head + h < heads) {
            const ulong row = ulong(token) * args.heads + head + h;
            const ulong part = (ulong(group.y) * args.heads + head + h) * args.splits + group.x;
            UNROLL
            for (ushort i = 0; i < FOURS; i++) {
                const uint element = paged::element_of(i, lane);
                if (paged::WHOLE) {
                    paged::put_four(y + row * width, element, width, sums[h][i] / of_head);
                } else {
                    paged::put_four(parts + part * width, element, width, sums[h][i]);
                }
            }
            if (paged::PARTS && lane == 0) {
                stats[part] = float2(most, of_head);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------

#define INSTANTIATE_LATENTS(name, ...) template [[host_name(name)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;

#define INSTANTIATE_LATENTS_TYPE(type, T)                                \
    INSTANTIATE_LATENTS("paged_latents_" type "_w128", paged_latent<T, 1>) \
    INSTANTIATE_LATENTS("paged_latents_" type "_w512", paged_latent<T, 4>)

INSTANTIATE_LATENTS_TYPE("f32", float)
INSTANTIATE_LATENTS_TYPE("f16", half)
INSTANTIATE_LATENTS_TYPE("bf16", bfloat)
