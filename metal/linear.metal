// Products with FP4 weights: y = x · Wᵀ (+ b), and y = x · W for the halves of kv_b that MLA absorbs. Weights are `[N, K]`
// with scales along K; x and y are float, half or bfloat, sums always float. A weight may be shared out by rows among
// heads, each with activations of its own: grid z is the head.
//
// | kernel                        | x times | rows of x | threadgroup                              | grid (x, y, z)                 |
// |-------------------------------|---------|-----------|------------------------------------------|--------------------------------|
// | linear_rows_<type>_m<M>       | Wᵀ      | M a group | to 4 simdgroups, 4 (M 8: 2) rows of W    | rows of W, rows of x, heads    |
// |                               |         |           | each, or (SHARES) together               |                                |
// | linear_rows_<type>_thin       | Wᵀ      | 1 a group | as above, 2 rows of W                    | rows of W, rows of x, heads    |
// | linear_rows_<type>_tall       | Wᵀ      | 1         | 2 simdgroups, 8 rows of W each           | rows of W, 1, heads            |
// | linear_tiles_<type>           | Wᵀ      | any       | 4 simdgroups, 32 × 32 of y               | columns of y, rows of x, heads |
// | linear_columns_<type>_m<M>    | W       | M a group | 8 simdgroups, 32 columns of W            | columns of W, rows of x, heads |
// | linear_columns_tiles_<type>   | W       | any       | 4 simdgroups, 32 × 32 of y               | columns of y, rows of x, heads |
//
// | buffer | what                                          |        |
// |--------|-----------------------------------------------|--------|
// | 0      | codes, 4-byte aligned                         | read   |
// | 1      | scales                                        | read   |
// | 2      | x                                             | read   |
// | 3      | y                                             | write  |
// | 4      | LinearArgs                                    | bytes  |
// | 5      | bias, float (with HAS_BIAS)                   | read   |
// | 6, 7   | codes and scales of a second weight (JOINED)  | read   |
// | 8      | the norm's weight, float (NORMED)             | read   |

#include <metal_stdlib>
#include <metal_simdgroup_matrix>

#include "args.h"
#include "fp4.h"
#include "rows.h"

using namespace metal;

constant bool HAS_BIAS [[function_constant(4)]];
// The rows of a second weight, of the same K and the same format, follow those of the first. (linear_rows)
constant bool JOINED [[function_constant(5)]];
// The RMS norm of x in place of x. (linear_rows)
constant bool NORMED [[function_constant(6)]];
// Simdgroups that have the same rows of W and share K, 1, 2 or 4: those of a threadgroup where it is more than 1, for weights
// with few rows. (linear_rows)
constant ushort SHARES [[function_constant(7)]];

namespace linear {

// Simdgroups of a threadgroup of linear_rows, at most.
static constant constexpr ushort SIMDGROUPS = 4;

} // namespace linear

// ---------------------------------------------------------------------------------------------------------------------
// A few rows of activations. A simdgroup has ROWS rows of W; its lanes take chunks of codes in turn, so that what they read at
// once lies together in W and nearly so in x: chunks of 32 for one row of x, which a word of scales and a sum less for each code
// make the cheaper ones, and of 16 for the rest of K and for more rows of x. With SHARES, chunks are dealt to the lanes of
// several simdgroups, whose sums meet in threadgroup memory. In registers: a chunk of each row of W, eight activations of one row
// of x, 2 · ROWS · M sums (a chunk's, and all), a third for one row of x, whose even and odd fours are added up apart: a sum that
// waits for itself is slow.

template <typename T, ushort M, ushort ROWS>
[[kernel]] void linear_rows(
    device const uint* codes [[buffer(0)]],
    device const uchar* scales [[buffer(1)]],
    device const T* x [[buffer(2)]],
    device T* y [[buffer(3)]],
    constant LinearArgs& args [[buffer(4)]],
    device const float* bias [[buffer(5), function_constant(HAS_BIAS)]],
    device const uint* second_codes [[buffer(6), function_constant(JOINED)]],
    device const uchar* second_scales [[buffer(7), function_constant(JOINED)]],
    device const float* norm [[buffer(8), function_constant(NORMED)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]
) {
    threadgroup float parts[linear::SIMDGROUPS][2][32];

    const uint k = rows::known_length(args.k);
    const bool alone = SHARES == 1;
    const uint together = alone ? linear::SIMDGROUPS * ROWS : ROWS;
    // The weight that this threadgroup's rows are of.
    uint n = args.n, column = 0, block = group.x;
    float factor = args.factor;
    if (JOINED) {
        const uint blocks = (args.n + together - 1) / together;
        if (block >= blocks) {
            codes = second_codes;
            scales = second_scales;
            n = args.second_n;
            column = args.n;
            block -= blocks;
            factor = args.second_factor;
        }
    }
    const uint first = block * together + (alone ? simdgroup * ROWS : 0);
    const uint first_x = group.y * M;

    rows::Rows<ROWS> rows_of_w;
    const uint head_row = args.weight_row + group.z * args.weight_head;
    rows::find(codes, scales, head_row, first, n, k, rows_of_w);
    device const T* row_x[M];
    UNROLL
    for (ushort m = 0; m < M; m++) {
        row_x[m] = x + group.z * args.x_head + ulong(rows::within(first_x + m, args.m)) * args.x_row;
    }

    float sums[ROWS * M];
    float squares[M];
    UNROLL
    for (ushort i = 0; i < ROWS * M; i++) {
        sums[i] = 0.0f;
    }
    UNROLL
    for (ushort m = 0; m < M; m++) {
        squares[m] = 0.0f;
    }
    const uint lanes = SHARES * 32;
    const uint first_lane = alone ? lane : simdgroup * 32 + lane;
    constexpr ushort WORDS = rows::words_of<T>();
    uint rest = 0;
    if (M == 1 && WORDS == 4 && fp4::WIDE && !NORMED) {
        float wide_sums[ROWS];
        UNROLL
        for (ushort r = 0; r < ROWS; r++) {
            wide_sums[r] = 0.0f;
        }
        const rows::Activations<T> activations = {row_x[0]};
        rest = k - k % (lanes * 32);
        for (uint at = first_lane * 32; at < rest; at += lanes * 32) {
            rows::add<WORDS>(rows_of_w, activations, at, wide_sums);
        }
        UNROLL
        for (ushort r = 0; r < ROWS; r++) {
            sums[r * M] = wide_sums[r];
        }
    }
    for (uint at = rest + first_lane * 16; at < k; at += lanes * 16) {
        uint2 words[ROWS];
        float scale[ROWS];
        UNROLL
        for (ushort r = 0; r < ROWS; r++) {
            words[r] = rows::two_words(rows_of_w.codes[r] + at / 8);
            scale[r] = fp4::scale(rows_of_w.scales[r], at / fp4::GROUP);
        }
        float even[ROWS * M], odd[ROWS * M];
        UNROLL
        for (ushort i = 0; i < ROWS * M; i++) {
            even[i] = 0.0f;
            odd[i] = 0.0f;
        }
        UNROLL
        for (ushort w = 0; w < 2; w++) {
            const uint place = at + w * 8;
            float4 low[ROWS], high[ROWS];
            UNROLL
            for (ushort r = 0; r < ROWS; r++) {
                fp4::decode(words[r][w], low[r], high[r]);
            }
            float4 norm_low = float4(1.0f), norm_high = float4(1.0f);
            if (NORMED) {
                rows::load_wide(norm + place, norm_low, norm_high);
            }
            UNROLL
            for (ushort m = 0; m < M; m++) {
                float4 x_low, x_high;
                rows::load(row_x[m] + place, x_low, x_high);
                if (NORMED) {
                    squares[m] += dot(x_low, x_low) + dot(x_high, x_high);
                    x_low *= norm_low;
                    x_high *= norm_high;
                }
                UNROLL
                for (ushort r = 0; r < ROWS; r++) {
                    const ushort i = r * M + m;
                    even[i] = rows::add_dot(low[r], x_low, even[i]);
                    if (M == 1) {
                        odd[i] = rows::add_dot(high[r], x_high, odd[i]);
                    } else {
                        even[i] = rows::add_dot(high[r], x_high, even[i]);
                    }
                }
            }
        }
        UNROLL
        for (ushort i = 0; i < ROWS * M; i++) {
            sums[i] = fma(even[i] + odd[i], scale[i / M], sums[i]);
        }
    }

    // Some lanes an output.
    constexpr ushort LANES = 32 / (ROWS * M);
    const ushort r = lane / LANES / M, m = lane / LANES % M;
    float sum = rows::shared_out<ROWS * M, 32>(sums, lane);
    float square = 0.0f;
    if (NORMED) {
        UNROLL
        for (ushort i = 0; i < M; i++) {
            const float total = simd_sum(squares[i]);
            square = m == i ? total : square;
        }
    }
    if (!alone) {
        parts[simdgroup][0][lane] = sum;
        parts[simdgroup][1][lane] = square;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        sum = 0.0f;
        square = 0.0f;
        for (ushort s = 0; s < SHARES; s++) {
            sum += parts[s][0][lane];
            square += parts[s][1][lane];
        }
    }
    if ((alone || simdgroup == 0) && lane % LANES == 0 && first + r < n && first_x + m < args.m) {
        sum *= fp4::UNIT * fp4::of_scales(factor);
        if (NORMED) {
            sum *= rsqrt(square / float(k) + args.eps);
        }
        if (HAS_BIAS) {
            sum += bias[first + r];
        }
        y[group.z * args.y_head + ulong(first_x + m) * args.y_row + column + first + r] = T(sum);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// One row of activations of two bytes each, many rows of W: eight a simdgroup, four at a time. What is left of K after whole turns of 32 chunks of
// 32 codes is shared out by half simdgroups, which have four of the rows each; the first step of adding up sums leaves them just
// there. In registers: a chunk of four rows of W, eight activations, twelve sums and as many of a chunk. Loads are wide.

template <typename T>
[[kernel]] void linear_rows_tall(
    device const uint* codes [[buffer(0)]],
    device const uchar* scales [[buffer(1)]],
    device const T* x [[buffer(2)]],
    device T* y [[buffer(3)]],
    constant LinearArgs& args [[buffer(4)]],
    device const float* bias [[buffer(5), function_constant(HAS_BIAS)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]
) {
    constexpr ushort SIMDGROUPS = 2, ROWS = 4;

    const uint k = rows::known_length(args.k);
    const uint first = (group.x * SIMDGROUPS + simdgroup) * (2 * ROWS);
    const uint head_row = args.weight_row + group.z * args.weight_head;
    const rows::Activations<T> activations = {x + group.z * args.x_head};
    const uint rest = k - k % 1024;
    const bool upper = lane >= 16;

    rows::Rows<ROWS> rows_of_w;
    float first_four[ROWS], second_four[ROWS];
    UNROLL
    for (ushort r = 0; r < ROWS; r++) {
        first_four[r] = 0.0f;
        second_four[r] = 0.0f;
    }
    rows::find(codes, scales, head_row, first, args.n, k, rows_of_w);
    for (uint at = lane * 32; at < rest; at += 1024) {
        rows::add<4>(rows_of_w, activations, at, first_four);
    }
    rows::find(codes, scales, head_row, first + ROWS, args.n, k, rows_of_w);
    for (uint at = lane * 32; at < rest; at += 1024) {
        rows::add<4>(rows_of_w, activations, at, second_four);
    }
    float sums[ROWS];
    UNROLL
    for (ushort r = 0; r < ROWS; r++) {
        const float mine = upper ? second_four[r] : first_four[r], other = upper ? first_four[r] : second_four[r];
        sums[r] = mine + simd_shuffle_xor(other, 16);
    }
    if (rest < k) {
        rows::find(codes, scales, head_row, first + (upper ? ROWS : 0), args.n, k, rows_of_w);
        for (uint at = rest + lane % 16 * 32; at < k; at += 512) {
            rows::add<4>(rows_of_w, activations, at, sums);
        }
    }

    const float sum = rows::shared_out<ROWS, 16>(sums, lane) * fp4::UNIT * fp4::of_scales(args.factor);
    const uint row = first + lane / 4;
    if (lane % 4 == 0 && row < args.n) {
        y[group.z * args.y_head + row] = T(HAS_BIAS ? sum + bias[row] : sum);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Many rows of activations: tiles of 32 × 32 outputs, 32 along K at a time. Activations are staged as they are, codes as
// numbers of the same type, in which they are exact; a fragment's products over one group are multiplied by the group's
// scale in float, and added up in float. Each simdgroup has 16 × 16 outputs: four fragments of sums in registers, and four of
// products.

static constant constexpr ushort TILE = 32;
// Rows in threadgroup memory are this much longer than a tile: eight rows of a fragment begin in different banks.
static constant constexpr ushort PAD = 4;

template <typename T>
[[kernel]] void linear_tiles(
    device const uint* codes [[buffer(0)]],
    device const uchar* scales [[buffer(1)]],
    device const T* x [[buffer(2)]],
    device T* y [[buffer(3)]],
    constant LinearArgs& args [[buffer(4)]],
    device const float* bias [[buffer(5), function_constant(HAS_BIAS)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]
) {
    threadgroup T tile_x[TILE][TILE + PAD];
    threadgroup T tile_w[TILE][TILE + PAD];
    // Of each row of W, of each 16 along K.
    threadgroup float tile_scales[2][TILE];

    const uint words = args.k / 8;
    const uint groups = args.k / fp4::GROUP;
    const uint first_x = group.y * TILE;
    const uint first_w = group.x * TILE;
    const uint head_row = args.weight_row + group.z * args.weight_head;
    // Each thread stages eight elements of a row of x and of a row of W.
    const ushort row = thread_index / 4, part = thread_index % 4;
    const bool row_of_x = first_x + row < args.m, row_of_w = first_w + row < args.n;
    device const T* from_x = x + group.z * args.x_head + ulong(rows::within(first_x + row, args.m)) * args.x_row;
    device const uint* from_w = codes + ulong(head_row + rows::within(first_w + row, args.n)) * words;

    const ushort top = simdgroup / 2 * 16, left = simdgroup % 2 * 16;
    const ushort2 place = rows::fragment_place(lane);
    simdgroup_float8x8 sums[2][2];
    for (ushort i = 0; i < 2; i++) {
        for (ushort j = 0; j < 2; j++) {
            sums[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        }
    }

    for (uint start = 0; start < args.k; start += TILE) {
        const uint word = start / 8 + part;
        float4 low = float4(0.0f), high = float4(0.0f);
        if (row_of_x && word < words) {
            rows::load(from_x + word * 8, low, high);
        }
        for (ushort i = 0; i < 4; i++) {
            tile_x[row][part * 8 + i] = T(low[i]);
            tile_x[row][part * 8 + 4 + i] = T(high[i]);
        }
        low = float4(0.0f);
        high = float4(0.0f);
        if (row_of_w && word < words) {
            fp4::decode(from_w[word], low, high);
        }
        for (ushort i = 0; i < 4; i++) {
            tile_w[row][part * 8 + i] = T(low[i] * fp4::UNIT);
            tile_w[row][part * 8 + 4 + i] = T(high[i] * fp4::UNIT);
        }
        if (thread_index < 2 * TILE) {
            const ushort half_step = thread_index / TILE, column = thread_index % TILE;
            const uint along_k = start + half_step * 16;
            float scale = 0.0f;
            if (first_w + column < args.n && along_k < args.k) {
                const ulong scale_row = ulong(head_row + first_w + column) * groups;
                const uint scale_size = rows::scale_size();
                scale = fp4::scale(scales + scale_row * scale_size, along_k / fp4::GROUP) * fp4::of_scales(args.factor);
            }
            tile_scales[half_step][column] = scale;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);

        // Steps of eight along K that share a scale.
        const ushort steps = fp4::GROUP == 16 ? 2 : 4;
        for (ushort step = 0; step < 4; step += steps) {
            simdgroup_float8x8 products[2][2];
            for (ushort i = 0; i < 2; i++) {
                for (ushort j = 0; j < 2; j++) {
                    products[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
                }
            }
            for (ushort k = step * 8; k < (step + steps) * 8; k += 8) {
                simdgroup_matrix<T, 8, 8> a[2], b[2];
                for (ushort i = 0; i < 2; i++) {
                    simdgroup_load(a[i], &tile_x[top + i * 8][k], TILE + PAD);
                    simdgroup_load(b[i], &tile_w[left + i * 8][k], TILE + PAD, ulong2(0, 0), true);
                }
                for (ushort i = 0; i < 2; i++) {
                    for (ushort j = 0; j < 2; j++) {
                        simdgroup_multiply_accumulate(products[i][j], a[i], b[j], products[i][j]);
                    }
                }
            }
            for (ushort j = 0; j < 2; j++) {
                const ushort column = left + j * 8 + place.y;
                const float scale = tile_scales[step / 2][column], next_scale = tile_scales[step / 2][column + 1];
                for (ushort i = 0; i < 2; i++) {
                    sums[i][j].thread_elements()[0] += products[i][j].thread_elements()[0] * scale;
                    sums[i][j].thread_elements()[1] += products[i][j].thread_elements()[1] * next_scale;
                }
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }

    for (ushort i = 0; i < 2; i++) {
        for (ushort j = 0; j < 2; j++) {
            const uint to_row = first_x + top + i * 8 + place.x;
            for (ushort e = 0; e < 2; e++) {
                const uint column = first_w + left + j * 8 + place.y + e;
                if (to_row < args.m && column < args.n) {
                    float sum = sums[i][j].thread_elements()[e];
                    if (HAS_BIAS) {
                        sum += bias[column];
                    }
                    y[group.z * args.y_head + ulong(to_row) * args.y_row + column] = T(sum);
                }
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The transposed product, y[c] = Σ_r x[r] · W[r, c], for a few rows of activations. ACROSS lanes stand side by side, each with
// eight columns, the others of a simdgroup in the rows of W below; a threadgroup goes down the rows together. Sums meet in
// shuffles, then in threadgroup memory. In registers: 8 · M sums, a word of codes, its scale.

template <typename T, ushort M>
[[kernel]] void linear_columns(
    device const uint* codes [[buffer(0)]],
    device const uchar* scales [[buffer(1)]],
    device const T* x [[buffer(2)]],
    device T* y [[buffer(3)]],
    constant LinearArgs& args [[buffer(4)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]
) {
    constexpr ushort SIMDGROUPS = 8, ACROSS = 4, DOWN = 32 / ACROSS;
    threadgroup float parts[SIMDGROUPS][M][ACROSS * 8];

    const uint n = rows::known_length(args.n);
    const uint words = args.k / 8;
    const uint groups = args.k / fp4::GROUP;
    const uint word = rows::within(group.x * ACROSS + lane % ACROSS, words);
    const uint first_x = group.y * M;

    device const T* row_x[M];
    float sums[M][8];
    UNROLL
    for (ushort m = 0; m < M; m++) {
        row_x[m] = x + group.z * args.x_head + ulong(rows::within(first_x + m, args.m)) * args.x_row;
        UNROLL
        for (ushort i = 0; i < 8; i++) {
            sums[m][i] = 0.0f;
        }
    }
    const uint head_row = args.weight_row + group.z * args.weight_head;
    const uint own = simdgroup * DOWN + lane / ACROSS;
    for (uint start = 0; start < n; start += SIMDGROUPS * DOWN) {
        const uint r = rows::within(start + own, n);
        float4 low, high;
        fp4::decode(codes[(head_row + r) * words + word], low, high);
        const float scale = fp4::scale(scales, (head_row + r) * groups + word * 8 / fp4::GROUP);
        UNROLL
        for (ushort m = 0; m < M; m++) {
            const float factor = select(0.0f, float(row_x[m][r]) * scale, start + own < n);
            UNROLL
            for (ushort i = 0; i < 4; i++) {
                sums[m][i] = fma(low[i], factor, sums[m][i]);
                sums[m][4 + i] = fma(high[i], factor, sums[m][4 + i]);
            }
        }
    }
    UNROLL
    for (ushort m = 0; m < M; m++) {
        // Lanes of the same columns differ in the upper three bits.
        parts[simdgroup][m][lane % ACROSS * 8 + lane / ACROSS] = rows::halved(sums[m], lane, 16);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // A thread an output.
    const ushort row = thread_index / (ACROSS * 8), c = thread_index % (ACROSS * 8);
    const uint column = group.x * (ACROSS * 8) + c;
    if (row < M && column < args.k && first_x + row < args.m) {
        float sum = 0.0f;
        for (ushort s = 0; s < SIMDGROUPS; s++) {
            sum += parts[s][row][c];
        }
        y[group.z * args.y_head + ulong(first_x + row) * args.y_row + column] = T(sum * fp4::UNIT * fp4::of_scales(args.factor));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The transposed product for many rows of activations: tiles of 32 × 32 outputs, 32 rows of W at a time. Scales differ from
// row to row of W, which is the axis of the sum: weights are staged decoded, both sides in float.

template <typename T>
[[kernel]] void linear_columns_tiles(
    device const uint* codes [[buffer(0)]],
    device const uchar* scales [[buffer(1)]],
    device const T* x [[buffer(2)]],
    device T* y [[buffer(3)]],
    constant LinearArgs& args [[buffer(4)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]
) {
    threadgroup float tile_x[TILE][TILE + PAD];
    threadgroup float tile_w[TILE][TILE + PAD];

    const uint words = args.k / 8;
    const uint groups = args.k / fp4::GROUP;
    const uint first_x = group.y * TILE;
    const uint head_row = args.weight_row + group.z * args.weight_head;
    const uint scale_size = rows::scale_size();
    const float unit = fp4::UNIT * fp4::of_scales(args.factor);
    // Each thread stages eight elements of a row of x and of a row of W.
    const ushort row = thread_index / 4, part = thread_index % 4;
    const uint word = group.x * (TILE / 8) + part;
    device const T* from_x = x + group.z * args.x_head + ulong(rows::within(first_x + row, args.m)) * args.x_row;

    const ushort top = simdgroup / 2 * 16, left = simdgroup % 2 * 16;
    simdgroup_float8x8 sums[2][2];
    for (ushort i = 0; i < 2; i++) {
        for (ushort j = 0; j < 2; j++) {
            sums[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        }
    }

    for (uint start = 0; start < args.n; start += TILE) {
        for (ushort i = 0; i < 8; i++) {
            const uint r = start + part * 8 + i;
            tile_x[row][part * 8 + i] = first_x + row < args.m && r < args.n ? float(from_x[r]) : 0.0f;
        }
        float4 low = float4(0.0f), high = float4(0.0f);
        if (start + row < args.n && word < words) {
            const ulong weight_row = head_row + start + row;
            fp4::decode(codes[weight_row * words + word], low, high);
            const uint index = word * 8 / fp4::GROUP;
            const float scale = fp4::scale(scales + weight_row * groups * scale_size, index) * unit;
            low *= scale;
            high *= scale;
        }
        for (ushort i = 0; i < 4; i++) {
            tile_w[row][part * 8 + i] = low[i];
            tile_w[row][part * 8 + 4 + i] = high[i];
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);

        for (ushort k = 0; k < TILE; k += 8) {
            simdgroup_float8x8 a[2], b[2];
            for (ushort i = 0; i < 2; i++) {
                simdgroup_load(a[i], &tile_x[top + i * 8][k], TILE + PAD);
                simdgroup_load(b[i], &tile_w[k][left + i * 8], TILE + PAD);
            }
            for (ushort i = 0; i < 2; i++) {
                for (ushort j = 0; j < 2; j++) {
                    simdgroup_multiply_accumulate(sums[i][j], a[i], b[j], sums[i][j]);
                }
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }

    const ushort2 place = rows::fragment_place(lane);
    for (ushort i = 0; i < 2; i++) {
        for (ushort j = 0; j < 2; j++) {
            const uint to_row = first_x + top + i * 8 + place.x;
            for (ushort e = 0; e < 2; e++) {
                const uint column = group.x * TILE + left + j * 8 + place.y + e;
                if (to_row < args.m && column < args.k) {
                    y[group.z * args.y_head + ulong(to_row) * args.y_row + column] =
                        T(sums[i][j].thread_elements()[e]);
                }
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------

#define INSTANTIATE(name, ...) template [[host_name(name)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;

#define INSTANTIATE_TALL(type, T) INSTANTIATE("linear_rows_" type "_tall", linear_rows_tall<T>)

#define INSTANTIATE_TYPE(type, T)                                                  \
    INSTANTIATE("linear_rows_" type "_thin", linear_rows<T, 1, 2>)                 \
    INSTANTIATE("linear_rows_" type "_m1", linear_rows<T, 1, 4>)                   \
    INSTANTIATE("linear_rows_" type "_m2", linear_rows<T, 2, 4>)                   \
    INSTANTIATE("linear_rows_" type "_m4", linear_rows<T, 4, 4>)                   \
    INSTANTIATE("linear_rows_" type "_m8", linear_rows<T, 8, 2>)                   \
    INSTANTIATE("linear_tiles_" type, linear_tiles<T>)                             \
    INSTANTIATE("linear_columns_" type "_m1", linear_columns<T, 1>)                \
    INSTANTIATE("linear_columns_" type "_m4", linear_columns<T, 4>)                \
    INSTANTIATE("linear_columns_tiles_" type, linear_columns_tiles<T>)

INSTANTIATE_TYPE("f32", float)
INSTANTIATE_TYPE("f16", half)
INSTANTIATE_TYPE("bf16", bfloat)
INSTANTIATE_TALL("f16", half)
INSTANTIATE_TALL("bf16", bfloat)
