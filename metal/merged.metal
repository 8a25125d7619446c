// What attention's parts come to, and the product with a head's rows of a weight behind it, y = merge(parts) · Wᵀ: MLA's values
// out of the latent space, for few tokens. Weights are `[N, K]`, in FP4 with scales along K or in floating point; parts are
// float, `[tokens, heads, splits, K]`, and (m, l) of each, as merge.h tells; y is float, half or bfloat. A head's rows are `n` of
// every `weight_head` from `weight_row` on: grid z is the head.
//
// | kernel                   | weight         | tokens    | threadgroup                               | grid (x, y, z)           |
// |--------------------------|----------------|-----------|-------------------------------------------|--------------------------|
// | merged_fp4_<type>_m<M>   | FP4            | M a group | 8 simdgroups, TURNS times ROWS rows of W  | rows of W, tokens, heads |
// | merged_dense_<type>_m<M> | floating point | M a group | as above                                  | rows of W, tokens, heads |
//
// A threadgroup merges its tokens' rows into threadgroup memory, in float: simdgroups take 64 columns of a row in turn. Then each
// simdgroup multiplies rows of W with them: a lane has 16 codes of each, or eight elements. Every threadgroup of a head merges the
// same rows: the more rows of W it has, the less often the parts are read, from a cache on the chip but for the first time;
// the fewer, the more threadgroups there are. What is merged is not rounded to the activations' dtype: nothing is stored
// between the two.
//
// | buffer | what                                                   |       |
// |--------|--------------------------------------------------------|-------|
// | 0      | codes, 4-byte aligned; or the weight, to its element   | read  |
// | 1      | scales (merged_fp4)                                    | read  |
// | 2      | parts                                                  | read  |
// | 3      | (m, l) of each part                                    | read  |
// | 4      | y                                                      | write |
// | 5      | MergedArgs                                             | bytes |

#include <metal_stdlib>

#include "args.h"
#include "dense.h"
#include "fp4.h"
#include "merge.h"
#include "rows.h"

using namespace metal;

namespace merged {

static constant constexpr ushort SIMDGROUPS = 8;
// Columns of W, at most, a multiple of 16.
static constant constexpr ushort MOST = 512;
// Fours of a merged row: behind each 16 elements are four that are not used, so that what lanes read at once, 16 elements apart,
// lies in different banks.
static constant constexpr ushort FOURS = MOST / 4 + MOST / 16;

// Where an element of a merged row is, counted in floats.
static inline uint place(uint column) { return column / 16 * 20 + column % 16; }

// Merged rows of M tokens, of which those that are not there are the last one.
template <ushort M>
struct Rows {
    threadgroup const float4* fours;
    uint there;

    void eight(ushort m, uint at, thread float4& low, thread float4& high) const {
        threadgroup const float4* from = fours + rows::within(m, there) * FOURS + place(at) / 4;
        low = from[0];
        high = from[1];
    }

    float one(ushort m, uint at) const {
        return ((threadgroup const float*)(fours + rows::within(m, there) * FOURS))[place(at)];
    }
};

// Merges M rows of a head, from `first` on, as far as they are there. Simdgroups have columns of their own: a barrier is to follow.
template <ushort M>
static inline Rows<M> rows_of(
    device const float* parts,
    device const float2* stats,
    constant MergedArgs& args,
    uint head,
    uint first,
    ushort simdgroup,
    ushort lane,
    threadgroup float4* fours
) {
    const uint k = rows::known_length(args.k);
    const uint there = min(uint(M), args.m - first);
    const uint blocks = (k + merge::COLUMNS - 1) / merge::COLUMNS;
    for (uint unit = simdgroup; unit < there * blocks; unit += SIMDGROUPS) {
        const uint m = unit / blocks, column = unit % blocks * merge::COLUMNS;
        const ulong part = ((ulong(first) + m) * args.heads + head) * args.splits;
        const float2 both = merge::columns(parts + part * k, stats + part, args.splits, k, column, lane);
        threadgroup float* row = (threadgroup float*)(fours + m * FOURS);
        UNROLL
        for (ushort i = 0; i < 2; i++) {
            const uint to = column + i * 32 + lane;
            if (to < k) {
                row[place(to)] = both[i];
            }
        }
    }
    Rows<M> found;
    found.fours = fours;
    found.there = there;
    return found;
}

// Adds to each sum the product of its row of W and its row of x, of 16 codes from `at` on.
template <ushort M, ushort ROWS>
static inline void add(thread const rows::Rows<ROWS>& w, thread const Rows<M>& x, uint at, thread float (&sums)[ROWS * M]) {
    uint2 words[ROWS];
    float scale[ROWS];
    UNROLL
    for (ushort r = 0; r < ROWS; r++) {
        words[r] = rows::two_words(w.codes[r] + at / 8);
        scale[r] = fp4::scale(w.scales[r], at / fp4::GROUP);
    }
    float group[ROWS * M];
    UNROLL
    for (ushort i = 0; i < ROWS * M; i++) {
        group[i] = 0.0f;
    }
    UNROLL
    for (ushort word = 0; word < 2; word++) {
        float4 low[ROWS], high[ROWS];
        UNROLL
        for (ushort r = 0; r < ROWS; r++) {
            fp4::decode(words[r][word], low[r], high[r]);
        }
        UNROLL
        for (ushort m = 0; m < M; m++) {
            float4 x_low, x_high;
            x.eight(m, at + word * 8, x_low, x_high);
            UNROLL
            for (ushort r = 0; r < ROWS; r++) {
                const ushort i = r * M + m;
                group[i] = rows::add_dot(high[r], x_high, rows::add_dot(low[r], x_low, group[i]));
            }
        }
    }
    UNROLL
    for (ushort i = 0; i < ROWS * M; i++) {
        sums[i] = fma(group[i], scale[i / M], sums[i]);
    }
}

// Adds up each lane's sums and stores those of rows that are there, each by a lane of its own.
template <typename T, ushort M, ushort ROWS>
static inline void store_sums(
    device T* y,
    constant MergedArgs& args,
    uint3 group,
    uint first,
    float factor,
    thread float (&sums)[ROWS * M],
    ushort lane
) {
    constexpr ushort LANES = 32 / (ROWS * M);
    const ushort r = lane / LANES / M, m = lane / LANES % M;
    const float sum = rows::shared_out<ROWS * M, 32>(sums, lane) * factor;
    if (lane % LANES == 0 && first + r < args.n && group.y * M + m < args.m) {
        y[(ulong(group.y * M + m) * args.heads + group.z) * args.n + first + r] = T(sum);
    }
}

} // namespace merged

// ---------------------------------------------------------------------------------------------------------------------
// In registers: two words of codes of each of ROWS rows of W, eight elements of one row of x, 2 · ROWS · M sums.

template <typename T, ushort M, ushort ROWS, ushort TURNS>
[[kernel]] void merged_fp4(
    device const uint* codes [[buffer(0)]],
    device const uchar* scales [[buffer(1)]],
    device const float* parts [[buffer(2)]],
    device const float2* stats [[buffer(3)]],
    device T* y [[buffer(4)]],
    constant MergedArgs& args [[buffer(5)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]
) {
    threadgroup float4 fours[M * merged::FOURS];
    const merged::Rows<M> x = merged::rows_of<M>(parts, stats, args, group.z, group.y * M, simdgroup, lane, fours);
    threadgroup_barrier(mem_flags::mem_threadgroup);

    const uint k = rows::known_length(args.k);
    const uint head_row = args.weight_row + group.z * args.weight_head;
    const float factor = fp4::UNIT * fp4::of_scales(args.factor);
    for (ushort turn = 0; turn < TURNS; turn++) {
        const uint first = ((group.x * TURNS + turn) * merged::SIMDGROUPS + simdgroup) * ROWS;
        rows::Rows<ROWS> w;
        rows::find(codes, scales, head_row, first, args.n, k, w);
        float sums[ROWS * M];
        UNROLL
        for (ushort i = 0; i < ROWS * M; i++) {
            sums[i] = 0.0f;
        }
        for (uint at = lane * 16; at < k; at += 32 * 16) {
            merged::add<M, ROWS>(w, x, at, sums);
        }
        merged::store_sums<T, M, ROWS>(y, args, group, first, factor, sums, lane);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// In registers: eight elements of each of ROWS rows of W and of one row of x, ROWS · M sums.

template <typename T, ushort M, ushort ROWS, ushort TURNS>
[[kernel]] void merged_dense(
    device const uchar* weight [[buffer(0)]],
    device const float* parts [[buffer(2)]],
    device const float2* stats [[buffer(3)]],
    device T* y [[buffer(4)]],
    constant MergedArgs& args [[buffer(5)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]
) {
    threadgroup float4 fours[M * merged::FOURS];
    const merged::Rows<M> x = merged::rows_of<M>(parts, stats, args, group.z, group.y * M, simdgroup, lane, fours);
    threadgroup_barrier(mem_flags::mem_threadgroup);

    const uint k = rows::known_length(args.k);
    const uint head_row = args.weight_row + group.z * args.weight_head;
    for (ushort turn = 0; turn < TURNS; turn++) {
        const uint first = ((group.x * TURNS + turn) * merged::SIMDGROUPS + simdgroup) * ROWS;
        device const uchar* w[ROWS];
        UNROLL
        for (ushort r = 0; r < ROWS; r++) {
            w[r] = weight + ulong(head_row + rows::within(first + r, args.n)) * k * dense::element_size();
        }
        float sums[ROWS * M];
        UNROLL
        for (ushort i = 0; i < ROWS * M; i++) {
            sums[i] = 0.0f;
        }
        if (dense::LOADS != 0) {
            for (uint at = lane * 8; at < k; at += 32 * 8) {
                dense::add_along<1, M>(w, x, at, 0, sums);
            }
        } else {
            for (uint at = lane; at < k; at += 32) {
                UNROLL
                for (ushort m = 0; m < M; m++) {
                    const float value = x.one(m, at);
                    UNROLL
                    for (ushort r = 0; r < ROWS; r++) {
                        sums[r * M + m] = fma(dense::element(w[r], at), value, sums[r * M + m]);
                    }
                }
            }
        }
        merged::store_sums<T, M, ROWS>(y, args, group, first, 1.0f, sums, lane);
    }
}

// ---------------------------------------------------------------------------------------------------------------------

#define INSTANTIATE_MERGED(name, ...) template [[host_name(name)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;

#define INSTANTIATE_MERGED_WEIGHT(weight, type, T)                                              \
    INSTANTIATE_MERGED("merged_" #weight "_" type "_m1", merged_##weight<T, 1, 4, 1>)            \
    INSTANTIATE_MERGED("merged_" #weight "_" type "_m2", merged_##weight<T, 2, 4, 1>)            \
    INSTANTIATE_MERGED("merged_" #weight "_" type "_m4", merged_##weight<T, 4, 4, 2>)            \
    INSTANTIATE_MERGED("merged_" #weight "_" type "_m8", merged_##weight<T, 8, 2, 4>)

#define INSTANTIATE_MERGED_TYPE(type, T)         \
    INSTANTIATE_MERGED_WEIGHT(fp4, type, T)      \
    INSTANTIATE_MERGED_WEIGHT(dense, type, T)

INSTANTIATE_MERGED_TYPE("f32", float)
INSTANTIATE_MERGED_TYPE("f16", half)
INSTANTIATE_MERGED_TYPE("bf16", bfloat)
