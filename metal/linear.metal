// Products with FP4 weights: y = x · Wᵀ (+ b), and y = x · W for the halves of kv_b that MLA absorbs. Weights are `[N, K]`
// with scales along K; x and y are float, half or bfloat, sums always float. A weight may be shared out by rows among
// heads, each with activations of its own: grid z is the head.
//
// | kernel                        | x times | rows of x | threadgroup                    | grid (x, y, z)               |
// |-------------------------------|---------|-----------|--------------------------------|------------------------------|
// | linear_rows_<type>_m<M>       | Wᵀ      | M a group | 2 simdgroups, 4 (M 8: 2) rows of W each | rows of W, rows of x, heads |
// | linear_tiles_<type>           | Wᵀ      | any       | 4 simdgroups, 32 × 32 of y     | columns of y, rows of x, heads |
// | linear_columns_<type>_m<M>    | W       | M a group | 4 simdgroups, 256 columns of W | columns of W, rows of x, heads |
// | linear_columns_tiles_<type>   | W       | any       | 4 simdgroups, 32 × 32 of y     | columns of y, rows of x, heads |
//
// | buffer | what                       |        |
// |--------|----------------------------|--------|
// | 0      | codes, 4-byte aligned      | read   |
// | 1      | scales                     | read   |
// | 2      | x                          | read   |
// | 3      | y                          | write  |
// | 4      | LinearArgs                 | bytes  |
// | 5      | bias, float (with HAS_BIAS)| read   |

#include <metal_stdlib>
#include <metal_simdgroup_matrix>

#include "args.h"
#include "fp4.h"

using namespace metal;

constant bool HAS_BIAS [[function_constant(4)]];

namespace linear {

// Rows of x or of W that are not there are read as the last one, and not written.
static inline uint within(uint index, uint count) { return min(index, count - 1); }

// Eight activations.
template <typename T>
static inline void load(device const T* x, thread float4& low, thread float4& high) {
    if (fp4::WIDE) {
        device const vec<T, 4>* four = (device const vec<T, 4>*)x;
        low = float4(four[0]);
        high = float4(four[1]);
    } else {
        low = float4(float(x[0]), float(x[1]), float(x[2]), float(x[3]));
        high = float4(float(x[4]), float(x[5]), float(x[6]), float(x[7]));
    }
}

// Where a lane's two elements of an 8 × 8 fragment are: `(row, column)`, and the next column. (Metal does not say; MLX's and
// every other kernel that reaches into fragments rely on it.)
static inline ushort2 fragment_place(ushort lane) {
    const ushort quad = lane / 4;
    return ushort2((quad & 4) + (lane / 2) % 4, (quad & 2) * 2 + (lane % 2) * 2);
}

} // namespace linear

// ---------------------------------------------------------------------------------------------------------------------
// A few rows of activations. Each simdgroup owns ROWS rows of W; its lanes take chunks of them in turn, 32 codes (WIDE)
// or 8. In registers: the chunk of each row of W, eight activations of each of M rows of x, ROWS · M sums.

template <typename T, ushort M, ushort ROWS>
[[kernel]] void linear_rows(
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
    constexpr ushort SIMDGROUPS = 2;
    // Words of eight codes in a chunk, and in the part of it that shares a scale.
    const ushort chunk = fp4::WIDE ? 4 : 1;
    const ushort shared = min(chunk, ushort(fp4::GROUP / 8));
    const uint words = args.k / 8;
    const uint groups = args.k / fp4::GROUP;
    const uint first = (group.x * SIMDGROUPS + simdgroup) * ROWS;
    const uint first_x = group.y * M;

    device const uint* row_codes[ROWS];
    device const uchar* row_scales[ROWS];
    const uint scale_size = fp4::SCALE_KIND <= fp4::BF16 ? 2 : 1;
    for (ushort r = 0; r < ROWS; r++) {
        const uint row = args.weight_row + group.z * args.weight_head + linear::within(first + r, args.n);
        row_codes[r] = codes + ulong(row) * words;
        row_scales[r] = scales + ulong(row) * groups * scale_size;
    }
    device const T* row_x[M];
    for (ushort m = 0; m < M; m++) {
        row_x[m] = x + group.z * args.x_head + ulong(linear::within(first_x + m, args.m)) * args.x_row;
    }

    float sums[ROWS][M];
    for (ushort r = 0; r < ROWS; r++) {
        for (ushort m = 0; m < M; m++) {
            sums[r][m] = 0.0f;
        }
    }
    for (uint start = lane * chunk; start < words; start += 32 * chunk) {
        uint4 word[ROWS];
        for (ushort r = 0; r < ROWS; r++) {
            if (fp4::WIDE) {
                word[r] = *(device const uint4*)(row_codes[r] + start);
            } else {
                word[r].x = row_codes[r][start];
            }
        }
        for (ushort from = 0; from < chunk; from += shared) {
            float part[ROWS][M];
            for (ushort r = 0; r < ROWS; r++) {
                for (ushort m = 0; m < M; m++) {
                    part[r][m] = 0.0f;
                }
            }
            for (ushort w = from; w < from + shared; w++) {
                float4 x_low[M], x_high[M];
                for (ushort m = 0; m < M; m++) {
                    linear::load(row_x[m] + (start + w) * 8, x_low[m], x_high[m]);
                }
                for (ushort r = 0; r < ROWS; r++) {
                    float4 low, high;
                    fp4::decode(word[r][w], low, high);
                    for (ushort m = 0; m < M; m++) {
                        part[r][m] += dot(low, x_low[m]) + dot(high, x_high[m]);
                    }
                }
            }
            for (ushort r = 0; r < ROWS; r++) {
                const float scale = fp4::scale(row_scales[r], (start + from) * 8 / fp4::GROUP, args.factor);
                for (ushort m = 0; m < M; m++) {
                    sums[r][m] = fma(part[r][m], scale, sums[r][m]);
                }
            }
        }
    }

    for (ushort r = 0; r < ROWS; r++) {
        for (ushort m = 0; m < M; m++) {
            float sum = simd_sum(sums[r][m]) * fp4::UNIT;
            if (lane == 0 && first + r < args.n && first_x + m < args.m) {
                if (HAS_BIAS) {
                    sum += bias[first + r];
                }
                y[group.z * args.y_head + ulong(first_x + m) * args.y_row + first + r] = T(sum);
            }
        }
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
    device const T* from_x = x + group.z * args.x_head + ulong(linear::within(first_x + row, args.m)) * args.x_row;
    device const uint* from_w = codes + ulong(head_row + linear::within(first_w + row, args.n)) * words;

    const ushort top = simdgroup / 2 * 16, left = simdgroup % 2 * 16;
    const ushort2 place = linear::fragment_place(lane);
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
            linear::load(from_x + word * 8, low, high);
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
                const uint scale_size = fp4::SCALE_KIND <= fp4::BF16 ? 2 : 1;
                scale = fp4::scale(scales + scale_row * scale_size, along_k / fp4::GROUP, args.factor);
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
// The transposed product, y[c] = Σ_r x[r] · W[r, c], for a few rows of activations: each lane has eight columns, each of four
// simdgroups every fourth row of W; their sums meet in threadgroup memory. In registers: 8 · M sums.

template <typename T, ushort M>
[[kernel]] void linear_columns(
    device const uint* codes [[buffer(0)]],
    device const uchar* scales [[buffer(1)]],
    device const T* x [[buffer(2)]],
    device T* y [[buffer(3)]],
    constant LinearArgs& args [[buffer(4)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]
) {
    constexpr ushort SIMDGROUPS = 4;
    threadgroup float parts[SIMDGROUPS][M][8][32];

    const uint words = args.k / 8;
    const uint groups = args.k / fp4::GROUP;
    const uint word = group.x * 32 + lane;
    const uint there = linear::within(word, words);
    const uint first_x = group.y * M;
    const uint head_row = args.weight_row + group.z * args.weight_head;
    const uint scale_size = fp4::SCALE_KIND <= fp4::BF16 ? 2 : 1;

    float4 low_sums[M], high_sums[M];
    for (ushort m = 0; m < M; m++) {
        low_sums[m] = float4(0.0f);
        high_sums[m] = float4(0.0f);
    }
    for (uint r = simdgroup; r < args.n; r += SIMDGROUPS) {
        const ulong row = head_row + r;
        float4 low, high;
        fp4::decode(codes[row * words + there], low, high);
        const float scale = fp4::scale(scales + row * groups * scale_size, there * 8 / fp4::GROUP, args.factor);
        for (ushort m = 0; m < M; m++) {
            const ulong row_of_x = linear::within(first_x + m, args.m);
            const float factor = float(x[group.z * args.x_head + row_of_x * args.x_row + r]) * scale;
            low_sums[m] = fma(low, float4(factor), low_sums[m]);
            high_sums[m] = fma(high, float4(factor), high_sums[m]);
        }
    }
    for (ushort m = 0; m < M; m++) {
        for (ushort i = 0; i < 4; i++) {
            parts[simdgroup][m][i][lane] = low_sums[m][i];
            parts[simdgroup][m][4 + i][lane] = high_sums[m][i];
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // Each simdgroup adds up two of the eight columns a lane has.
    for (ushort m = 0; m < M; m++) {
        for (ushort i = simdgroup; i < 8; i += SIMDGROUPS) {
            float sum = 0.0f;
            for (ushort s = 0; s < SIMDGROUPS; s++) {
                sum += parts[s][m][i][lane];
            }
            if (word < words && first_x + m < args.m) {
                y[group.z * args.y_head + ulong(first_x + m) * args.y_row + word * 8 + i] = T(sum * fp4::UNIT);
            }
        }
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
    const uint scale_size = fp4::SCALE_KIND <= fp4::BF16 ? 2 : 1;
    // Each thread stages eight elements of a row of x and of a row of W.
    const ushort row = thread_index / 4, part = thread_index % 4;
    const uint word = group.x * (TILE / 8) + part;
    device const T* from_x = x + group.z * args.x_head + ulong(linear::within(first_x + row, args.m)) * args.x_row;

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
            const float scale = fp4::scale(scales + weight_row * groups * scale_size, index, args.factor) * fp4::UNIT;
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

    const ushort2 place = linear::fragment_place(lane);
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

#define INSTANTIATE_TYPE(type, T)                                                  \
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
