// Products with weights that stay in floating point: y = x · Wᵀ (+ b), and y = x · W. Weights are `[N, K]` of float, half or
// bfloat as they lie in a file; x and y are float, half or bfloat, sums always float. A weight may be shared out by rows
// among heads, each with activations of its own: grid z is the head.
//
// | kernel                      | x times | rows of x | threadgroup                                 | grid (x, y, z)                 |
// |-----------------------------|---------|-----------|---------------------------------------------|--------------------------------|
// | dense_rows_<type>_m<M>      | Wᵀ      | M a group | 2 simdgroups, 4 (M 8: 2) rows of W each, or | rows of W, rows of x, heads    |
// |                             |         |           | (SHARES) to 8 together                      |                                |
// | dense_rows_<type>_thin      | Wᵀ      | 1 a group | as above, 2 rows of W                       | rows of W, rows of x, heads    |
// | dense_tiles_<type>          | Wᵀ      | any       | 4 simdgroups, 32 × 32 of y                  | columns of y, rows of x, heads |
// | dense_columns_<type>_m<M>   | W       | M a group | 8 simdgroups, 32 columns of W               | columns of W, rows of x, heads |
// | dense_columns_tiles_<type>  | W       | any       | 4 simdgroups, 32 × 32 of y                  | columns of y, rows of x, heads |
//
// | buffer | what                                   |       |
// |--------|----------------------------------------|-------|
// | 0      | weight, aligned to its element         | read  |
// | 1      | x                                      | read  |
// | 2      | y                                      | write |
// | 3      | DenseArgs                              | bytes |
// | 4      | bias, float (with HAS_BIAS)            | read  |
// | 5      | a second weight (with JOINED)          | read  |

#include <metal_stdlib>
#include <metal_simdgroup_matrix>

#include "args.h"
#include "dense.h"
#include "rows.h"

using namespace metal;

namespace dense {

constant bool HAS_BIAS [[function_constant(26)]];
// Simdgroups that have the same rows of W and share K, up to 8: those of a threadgroup where it is more than 1, for weights with
// few rows. (dense_rows)
constant ushort SHARES [[function_constant(27)]];
// The rows of a second weight, of the same K and stored alike, follow those of the first. (dense_rows)
constant bool JOINED [[function_constant(28)]];

// Simdgroups of a threadgroup of dense_rows: where each has rows of its own, and where they share K, at most.
static constant constexpr ushort APART = 2, SHARING = 8;

// Eight activations.
template <typename T>
static inline void activations(device const T* x, thread float4& low, thread float4& high) {
    if (LOADS == 16) {
        rows::load_wide(x, low, high);
    } else {
        low = float4(*(device const vec<T, 4>*)x);
        high = float4(*(device const vec<T, 4>*)(x + 4));
    }
}

// Rows of x as they are.
template <typename T, ushort M>
struct Rows {
    device const T* x[M];

    void eight(ushort m, uint at, thread float4& low, thread float4& high) const { activations(x[m] + at, low, high); }
};

// Adds to the sums of eight columns, which begin at `w` in the first row, the products of TURNS rows, `span` apart from `row` on;
// rows are K elements apart. All of the weight's are asked for before any is used.
template <ushort TURNS, typename T, ushort M>
static inline void add_down(
    device const uchar* w,
    uint k,
    thread device const T* (&x)[M],
    uint row,
    uint span,
    thread float (&sums)[M][8]
) {
    Eight weights[TURNS];
    float factors[TURNS][M];
    UNROLL
    for (ushort t = 0; t < TURNS; t++) {
        weights[t] = stored(w, ulong(row + t * span) * k);
        UNROLL
        for (ushort m = 0; m < M; m++) {
            factors[t][m] = float(x[m][row + t * span]);
        }
    }
    UNROLL
    for (ushort t = 0; t < TURNS; t++) {
        float4 low, high;
        values_of(weights[t], low, high);
        UNROLL
        for (ushort m = 0; m < M; m++) {
            UNROLL
            for (ushort i = 0; i < 4; i++) {
                sums[m][i] = fma(low[i], factors[t][m], sums[m][i]);
                sums[m][4 + i] = fma(high[i], factors[t][m], sums[m][4 + i]);
            }
        }
    }
}

} // namespace dense

// ---------------------------------------------------------------------------------------------------------------------
// A few rows of activations. A simdgroup has ROWS rows of W; its lanes take eight elements of each in turn, or one. With SHARES,
// turns are dealt to the lanes of several simdgroups, whose sums meet in threadgroup memory. In registers: DEPTH turns of those
// of each row of W, eight activations of one row of x, ROWS · M sums.

template <typename T, ushort M, ushort ROWS, ushort DEPTH>
[[kernel]] void dense_rows(
    device const uchar* weight [[buffer(0)]],
    device const T* x [[buffer(1)]],
    device T* y [[buffer(2)]],
    constant DenseArgs& args [[buffer(3)]],
    device const float* bias [[buffer(4), function_constant(dense::HAS_BIAS)]],
    device const uchar* second_weight [[buffer(5), function_constant(dense::JOINED)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]
) {
    threadgroup float parts[dense::SHARING][32];

    const uint k = rows::known_length(args.k);
    const bool alone = dense::SHARES == 1;
    const uint together = alone ? dense::APART * ROWS : ROWS;
    // The weight that this threadgroup's rows are of.
    uint n = args.n, column = 0, block = group.x;
    if (dense::JOINED) {
        const uint blocks = (args.n + together - 1) / together;
        if (block >= blocks) {
            weight = second_weight;
            n = args.second_n;
            column = args.n;
            block -= blocks;
        }
    }
    const uint first = block * together + (alone ? simdgroup * ROWS : 0);
    const uint first_x = group.y * M;

    device const uchar* of_w[ROWS];
    dense::Rows<T, M> of_x;
    UNROLL
    for (ushort r = 0; r < ROWS; r++) {
        const uint row = args.weight_row + group.z * args.weight_head + rows::within(first + r, n);
        of_w[r] = weight + ulong(row) * k * dense::element_size();
    }
    UNROLL
    for (ushort m = 0; m < M; m++) {
        of_x.x[m] = x + ulong(group.z) * args.x_head + ulong(rows::within(first_x + m, args.m)) * args.x_row;
    }

    float sums[ROWS * M];
    UNROLL
    for (ushort i = 0; i < ROWS * M; i++) {
        sums[i] = 0.0f;
    }
    const uint lanes = dense::SHARES * 32;
    const uint first_lane = alone ? lane : simdgroup * 32 + lane;
    if (dense::LOADS != 0) {
        const uint span = lanes * 8;
        // Turns in which every lane has eight elements, and the one in which some have.
        const uint whole = k / span;
        uint turn = 0;
        for (; turn + DEPTH <= whole; turn += DEPTH) {
            dense::add_along<DEPTH, M>(of_w, of_x, turn * span + first_lane * 8, span, sums);
        }
        for (; turn < whole; turn++) {
            dense::add_along<1, M>(of_w, of_x, turn * span + first_lane * 8, span, sums);
        }
        const uint at = whole * span + first_lane * 8;
        if (at < k) {
            dense::add_along<1, M>(of_w, of_x, at, span, sums);
        }
    } else {
        for (uint at = first_lane; at < k; at += lanes) {
            UNROLL
            for (ushort m = 0; m < M; m++) {
                const float value = float(of_x.x[m][at]);
                UNROLL
                for (ushort r = 0; r < ROWS; r++) {
                    sums[r * M + m] = fma(dense::element(of_w[r], at), value, sums[r * M + m]);
                }
            }
        }
    }

    // Some lanes an output.
    constexpr ushort LANES = 32 / (ROWS * M);
    const ushort r = lane / LANES / M, m = lane / LANES % M;
    float sum = rows::shared_out<ROWS * M, 32>(sums, lane);
    if (!alone) {
        parts[simdgroup][lane] = sum;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        sum = 0.0f;
        for (ushort s = 0; s < dense::SHARES; s++) {
            sum += parts[s][lane];
        }
    }
    if ((alone || simdgroup == 0) && lane % LANES == 0 && first + r < n && first_x + m < args.m) {
        if (dense::HAS_BIAS) {
            sum += bias[first + r];
        }
        y[ulong(group.z) * args.y_head + ulong(first_x + m) * args.y_row + column + first + r] = T(sum);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The transposed product, y[c] = Σ_r x[r] · W[r, c], for a few rows of activations. Four lanes stand side by side, each with
// eight columns, the others of a simdgroup in the rows of W below; a threadgroup goes down the rows together. Sums meet in
// shuffles, then in threadgroup memory. In registers: DEPTH times eight elements of W and M factors, 8 · M sums.

template <typename T, ushort M, ushort DEPTH>
[[kernel]] void dense_columns(
    device const uchar* weight [[buffer(0)]],
    device const T* x [[buffer(1)]],
    device T* y [[buffer(2)]],
    constant DenseArgs& args [[buffer(3)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]
) {
    constexpr ushort SIMDGROUPS = 8, ACROSS = 4, DOWN = 32 / ACROSS, COLUMNS = ACROSS * 8;
    static_assert(M <= SIMDGROUPS, "a simdgroup adds up a row of x's");
    threadgroup float parts[SIMDGROUPS][M][COLUMNS];

    const uint n = rows::known_length(args.n);
    const uint column = group.x * COLUMNS + lane % ACROSS * 8;
    const uint first_x = group.y * M;
    const uint head_row = args.weight_row + group.z * args.weight_head;

    device const T* row_x[M];
    float sums[M][8];
    UNROLL
    for (ushort m = 0; m < M; m++) {
        row_x[m] = x + ulong(group.z) * args.x_head + ulong(rows::within(first_x + m, args.m)) * args.x_row;
        UNROLL
        for (ushort i = 0; i < 8; i++) {
            sums[m][i] = 0.0f;
        }
    }
    constexpr uint SPAN = SIMDGROUPS * DOWN;
    const uint first = simdgroup * DOWN + lane / ACROSS;
    if (dense::LOADS != 0) {
        // A multiple of eight columns: the last eight are there.
        const ulong start = ulong(head_row) * args.k + min(column, args.k - 8);
        device const uchar* w = weight + start * dense::element_size();
        // Turns in which every lane has a row, and the one in which some have.
        const uint whole = n / SPAN;
        uint turn = 0;
        for (; turn + DEPTH <= whole; turn += DEPTH) {
            dense::add_down<DEPTH>(w, args.k, row_x, turn * SPAN + first, SPAN, sums);
        }
        for (; turn < whole; turn++) {
            dense::add_down<1>(w, args.k, row_x, turn * SPAN + first, SPAN, sums);
        }
        const uint row = whole * SPAN + first;
        if (row < n) {
            dense::add_down<1>(w, args.k, row_x, row, SPAN, sums);
        }
    } else {
        for (uint row = first; row < n; row += SPAN) {
            const ulong start = ulong(head_row + row) * args.k;
            UNROLL
            for (ushort i = 0; i < 8; i++) {
                const float value = dense::element(weight, start + rows::within(column + i, args.k));
                UNROLL
                for (ushort m = 0; m < M; m++) {
                    sums[m][i] = fma(value, float(row_x[m][row]), sums[m][i]);
                }
            }
        }
    }
    UNROLL
    for (ushort m = 0; m < M; m++) {
        parts[simdgroup][m][lane % ACROSS * 8 + lane / ACROSS] = rows::halved(sums[m], lane, 16);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // A simdgroup for each row of x, a lane for each column.
    const uint to = group.x * COLUMNS + lane;
    if (simdgroup < M && to < args.k && first_x + simdgroup < args.m) {
        float sum = 0.0f;
        UNROLL
        for (ushort s = 0; s < SIMDGROUPS; s++) {
            sum += parts[s][simdgroup][lane];
        }
        y[ulong(group.z) * args.y_head + ulong(first_x + simdgroup) * args.y_row + to] = T(sum);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Many rows of activations, either product: tiles of 32 × 32 outputs, 32 of the sum at a time, staged in float, in which
// elements of every kind are exact. Each simdgroup has 16 × 16 outputs: four fragments of sums in registers.

namespace dense {

static constant constexpr ushort TILE = 32;
// Rows in threadgroup memory are this much longer than a tile: eight rows of a fragment begin in different banks.
static constant constexpr ushort PAD = 4;

} // namespace dense

template <typename T, bool COLUMNS>
[[kernel]] void dense_tiles(
    device const uchar* weight [[buffer(0)]],
    device const T* x [[buffer(1)]],
    device T* y [[buffer(2)]],
    constant DenseArgs& args [[buffer(3)]],
    device const float* bias [[buffer(4), function_constant(dense::HAS_BIAS)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]
) {
    constexpr ushort TILE = dense::TILE, PAD = dense::PAD;
    threadgroup float tile_x[TILE][TILE + PAD];
    // As it lies: rows of W, and its columns.
    threadgroup float tile_w[TILE][TILE + PAD];

    // What the sum runs over, and columns of y.
    const uint inner = COLUMNS ? args.n : args.k, outer = COLUMNS ? args.k : args.n;
    const uint first_x = group.y * TILE, first_y = group.x * TILE;
    const uint head_row = args.weight_row + group.z * args.weight_head;
    // Each thread stages eight elements of a row of x and of a row of W.
    const ushort row = thread_index / 4, part = thread_index % 4;
    const bool row_of_x = first_x + row < args.m;
    device const T* from_x = x + ulong(group.z) * args.x_head + ulong(rows::within(first_x + row, args.m)) * args.x_row;

    const ushort top = simdgroup / 2 * 16, left = simdgroup % 2 * 16;
    const ushort2 place = rows::fragment_place(lane);
    simdgroup_float8x8 sums[2][2];
    for (ushort i = 0; i < 2; i++) {
        for (ushort j = 0; j < 2; j++) {
            sums[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        }
    }

    for (uint start = 0; start < inner; start += TILE) {
        const uint along = start + part * 8;
        for (ushort i = 0; i < 8; i++) {
            tile_x[row][part * 8 + i] = row_of_x && along + i < inner ? float(from_x[along + i]) : 0.0f;
        }
        const uint row_w = (COLUMNS ? start : first_y) + row, column = (COLUMNS ? first_y : start) + part * 8;
        const ulong index = ulong(head_row + rows::within(row_w, args.n)) * args.k + column;
        if (dense::LOADS != 0) {
            float4 low = float4(0.0f), high = float4(0.0f);
            if (row_w < args.n && column < args.k) {
                dense::values_of(dense::stored(weight, index), low, high);
            }
            for (ushort i = 0; i < 4; i++) {
                tile_w[row][part * 8 + i] = low[i];
                tile_w[row][part * 8 + 4 + i] = high[i];
            }
        } else {
            for (ushort i = 0; i < 8; i++) {
                const bool there = row_w < args.n && column + i < args.k;
                tile_w[row][part * 8 + i] = there ? dense::element(weight, index + i) : 0.0f;
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);

        for (ushort k = 0; k < TILE; k += 8) {
            simdgroup_float8x8 a[2], b[2];
            for (ushort i = 0; i < 2; i++) {
                simdgroup_load(a[i], &tile_x[top + i * 8][k], TILE + PAD);
                if (COLUMNS) {
                    simdgroup_load(b[i], &tile_w[k][left + i * 8], TILE + PAD);
                } else {
                    simdgroup_load(b[i], &tile_w[left + i * 8][k], TILE + PAD, ulong2(0, 0), true);
                }
            }
            for (ushort i = 0; i < 2; i++) {
                for (ushort j = 0; j < 2; j++) {
                    simdgroup_multiply_accumulate(sums[i][j], a[i], b[j], sums[i][j]);
                }
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }

    for (ushort i = 0; i < 2; i++) {
        for (ushort j = 0; j < 2; j++) {
            const uint to_row = first_x + top + i * 8 + place.x;
            for (ushort e = 0; e < 2; e++) {
                const uint to = first_y + left + j * 8 + place.y + e;
                if (to_row < args.m && to < outer) {
                    float sum = sums[i][j].thread_elements()[e];
                    if (dense::HAS_BIAS) {
                        sum += bias[to];
                    }
                    y[ulong(group.z) * args.y_head + ulong(to_row) * args.y_row + to] = T(sum);
                }
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------

#define INSTANTIATE_DENSE(name, ...) template [[host_name(name)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;

// DEPTH makes it four loads of W of a lane at once, two down the columns.
#define INSTANTIATE_DENSE_TYPE(type, T)                                          \
    INSTANTIATE_DENSE("dense_rows_" type "_thin", dense_rows<T, 1, 2, 2>)        \
    INSTANTIATE_DENSE("dense_rows_" type "_m1", dense_rows<T, 1, 4, 1>)          \
    INSTANTIATE_DENSE("dense_rows_" type "_m2", dense_rows<T, 2, 4, 1>)          \
    INSTANTIATE_DENSE("dense_rows_" type "_m4", dense_rows<T, 4, 4, 1>)          \
    INSTANTIATE_DENSE("dense_rows_" type "_m8", dense_rows<T, 8, 2, 2>)          \
    INSTANTIATE_DENSE("dense_tiles_" type, dense_tiles<T, false>)                \
    INSTANTIATE_DENSE("dense_columns_" type "_m1", dense_columns<T, 1, 2>)       \
    INSTANTIATE_DENSE("dense_columns_" type "_m4", dense_columns<T, 4, 2>)       \
    INSTANTIATE_DENSE("dense_columns_tiles_" type, dense_tiles<T, true>)

INSTANTIATE_DENSE_TYPE("f32", float)
INSTANTIATE_DENSE_TYPE("f16", half)
INSTANTIATE_DENSE_TYPE("bf16", bfloat)
