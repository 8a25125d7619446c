// Products with weights that stay in floating point: y = x · Wᵀ (+ b), and y = x · W. Weights are `[N, K]` of float, half or
// bfloat as they lie in a file; x and y are float, half or bfloat, sums always float. A weight may be shared out by rows
// among heads, each with activations of its own: grid z is the head.
//
// | kernel                      | x times | rows of x | threadgroup                                 | grid (x, y, z)                 |
// |-----------------------------|---------|-----------|---------------------------------------------|--------------------------------|
// | dense_rows_<type>_m<M>      | Wᵀ      | M a group | 2 simdgroups, 4 (M 8: 2) rows of W each     | rows of W, rows of x, heads    |
// | dense_tiles_<type>          | Wᵀ      | any       | 4 simdgroups, 32 × 32 of y                  | columns of y, rows of x, heads |
// | dense_columns_<type>_m<M>   | W       | M a group | 4 simdgroups, 128 columns of W              | columns of W, rows of x, heads |
// | dense_columns_tiles_<type>  | W       | any       | 4 simdgroups, 32 × 32 of y                  | columns of y, rows of x, heads |
//
// | buffer | what                           |       |
// |--------|--------------------------------|-------|
// | 0      | weight, aligned to its element | read  |
// | 1      | x                              | read  |
// | 2      | y                              | write |
// | 3      | DenseArgs                      | bytes |
// | 4      | bias, float (with HAS_BIAS)    | read  |

#include <metal_stdlib>
#include <metal_simdgroup_matrix>

#include "args.h"

using namespace metal;

namespace dense {

// How the weight is stored.
enum : ushort { F32 = 0, F16 = 1, BF16 = 2 };

constant ushort KIND [[function_constant(24)]];
// Bytes of the weight that a load takes: 16 or 8, which its rows begin at multiples of, being a multiple of eight elements
// long, and rows of activations at a multiple of four elements; or 0, an element. The host has checked it. (Files align
// tensors to eight bytes.)
constant ushort LOADS [[function_constant(25)]];
constant bool HAS_BIAS [[function_constant(26)]];

// Rows of x or of W that are not there are read as the last one, and not written.
static inline uint within(uint index, uint count) { return min(index, count - 1); }

static inline uint element_size() { return KIND == F32 ? 4 : 2; }

// An element of the weight.
static inline float element(device const uchar* weight, ulong index) {
    if (KIND == F32) {
        return ((device const float*)weight)[index];
    }
    const ushort bits = ((device const ushort*)weight)[index];
    return KIND == F16 ? float(as_type<half>(bits)) : as_type<float>(uint(bits) << 16);
}

// The two elements of a word.
static inline float2 pair(uint word) {
    if (KIND == F16) {
        return float2(as_type<half2>(word));
    }
    return float2(as_type<float>(word << 16), as_type<float>(word & 0xffff0000u));
}

// Four elements of the weight.
static inline float4 four(device const uchar* weight, ulong index) {
    if (KIND == F32) {
        device const float* from = (device const float*)weight + index;
        if (LOADS == 16) {
            return *(device const float4*)from;
        }
        const float2 low = *(device const float2*)from, high = *(device const float2*)(from + 2);
        return float4(low.x, low.y, high.x, high.y);
    }
    const uint2 words = *(device const uint2*)(weight + index * 2);
    const float2 low = pair(words.x), high = pair(words.y);
    return float4(low.x, low.y, high.x, high.y);
}

// Eight elements of the weight.
static inline void eight(device const uchar* weight, ulong index, thread float4& low, thread float4& high) {
    if (KIND != F32 && LOADS == 16) {
        const uint4 words = *(device const uint4*)(weight + index * 2);
        const float2 a = pair(words.x), b = pair(words.y), c = pair(words.z), d = pair(words.w);
        low = float4(a.x, a.y, b.x, b.y);
        high = float4(c.x, c.y, d.x, d.y);
    } else {
        low = four(weight, index);
        high = four(weight, index + 4);
    }
}

// Four activations.
template <typename T>
static inline float4 load(device const T* x) {
    return float4(*(device const vec<T, 4>*)x);
}

// Where a lane's two elements of an 8 × 8 fragment are: `(row, column)`, and the next column. (As in linear.metal.)
static inline ushort2 fragment_place(ushort lane) {
    const ushort quad = lane / 4;
    return ushort2((quad & 4) + (lane / 2) % 4, (quad & 2) * 2 + (lane % 2) * 2);
}

} // namespace dense

// ---------------------------------------------------------------------------------------------------------------------
// A few rows of activations. Each simdgroup owns ROWS rows of W; its lanes take eight elements of them in turn, or one. In
// registers: those of each row of W, as many of one row of x, ROWS · M sums.

template <typename T, ushort M, ushort ROWS>
[[kernel]] void dense_rows(
    device const uchar* weight [[buffer(0)]],
    device const T* x [[buffer(1)]],
    device T* y [[buffer(2)]],
    constant DenseArgs& args [[buffer(3)]],
    device const float* bias [[buffer(4), function_constant(dense::HAS_BIAS)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]
) {
    constexpr ushort SIMDGROUPS = 2;
    const uint first = (group.x * SIMDGROUPS + simdgroup) * ROWS;
    const uint first_x = group.y * M;

    device const uchar* row_w[ROWS];
    for (ushort r = 0; r < ROWS; r++) {
        const uint row = args.weight_row + group.z * args.weight_head + dense::within(first + r, args.n);
        row_w[r] = weight + ulong(row) * args.k * dense::element_size();
    }
    device const T* row_x[M];
    for (ushort m = 0; m < M; m++) {
        row_x[m] = x + ulong(group.z) * args.x_head + ulong(dense::within(first_x + m, args.m)) * args.x_row;
    }

    float sums[ROWS][M];
    for (ushort r = 0; r < ROWS; r++) {
        for (ushort m = 0; m < M; m++) {
            sums[r][m] = 0.0f;
        }
    }
    if (dense::LOADS != 0) {
        for (uint k = lane * 8; k < args.k; k += 32 * 8) {
            float4 low[ROWS], high[ROWS];
            for (ushort r = 0; r < ROWS; r++) {
                dense::eight(row_w[r], k, low[r], high[r]);
            }
            for (ushort m = 0; m < M; m++) {
                const float4 x_low = dense::load(row_x[m] + k), x_high = dense::load(row_x[m] + k + 4);
                for (ushort r = 0; r < ROWS; r++) {
                    sums[r][m] += dot(low[r], x_low) + dot(high[r], x_high);
                }
            }
        }
    } else {
        for (uint k = lane; k < args.k; k += 32) {
            for (ushort m = 0; m < M; m++) {
                const float value = float(row_x[m][k]);
                for (ushort r = 0; r < ROWS; r++) {
                    sums[r][m] = fma(dense::element(row_w[r], k), value, sums[r][m]);
                }
            }
        }
    }

    for (ushort r = 0; r < ROWS; r++) {
        for (ushort m = 0; m < M; m++) {
            float sum = simd_sum(sums[r][m]);
            if (lane == 0 && first + r < args.n && first_x + m < args.m) {
                if (dense::HAS_BIAS) {
                    sum += bias[first + r];
                }
                y[ulong(group.z) * args.y_head + ulong(first_x + m) * args.y_row + first + r] = T(sum);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The transposed product, y[c] = Σ_r x[r] · W[r, c], for a few rows of activations: each lane has four columns, each of four
// simdgroups every fourth row of W; their sums meet in threadgroup memory. In registers: 4 · M sums.

template <typename T, ushort M>
[[kernel]] void dense_columns(
    device const uchar* weight [[buffer(0)]],
    device const T* x [[buffer(1)]],
    device T* y [[buffer(2)]],
    constant DenseArgs& args [[buffer(3)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]
) {
    constexpr ushort SIMDGROUPS = 4;
    threadgroup float parts[SIMDGROUPS][M][4][32];

    // Of the columns a lane has: the first, and how far apart they are.
    const uint column = group.x * 128 + (dense::LOADS != 0 ? lane * 4 : lane);
    const uint apart = dense::LOADS != 0 ? 1 : 32;
    const uint first_x = group.y * M;
    const uint head_row = args.weight_row + group.z * args.weight_head;

    float4 sums[M];
    for (ushort m = 0; m < M; m++) {
        sums[m] = float4(0.0f);
    }
    for (uint r = simdgroup; r < args.n; r += SIMDGROUPS) {
        const ulong start = ulong(head_row + r) * args.k;
        float4 values;
        if (dense::LOADS != 0) {
            // A multiple of eight columns: the last four are there.
            values = dense::four(weight, start + min(column, args.k - 4));
        } else {
            for (ushort i = 0; i < 4; i++) {
                values[i] = dense::element(weight, start + dense::within(column + i * 32, args.k));
            }
        }
        for (ushort m = 0; m < M; m++) {
            const ulong row_of_x = dense::within(first_x + m, args.m);
            const float factor = float(x[ulong(group.z) * args.x_head + row_of_x * args.x_row + r]);
            sums[m] = fma(values, float4(factor), sums[m]);
        }
    }
    for (ushort m = 0; m < M; m++) {
        for (ushort i = 0; i < 4; i++) {
            parts[simdgroup][m][i][lane] = sums[m][i];
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // Each simdgroup adds up one of the four columns a lane has.
    const uint to = column + simdgroup * apart;
    for (ushort m = 0; m < M; m++) {
        float sum = 0.0f;
        for (ushort s = 0; s < SIMDGROUPS; s++) {
            sum += parts[s][m][simdgroup][lane];
        }
        if (to < args.k && first_x + m < args.m) {
            y[ulong(group.z) * args.y_head + ulong(first_x + m) * args.y_row + to] = T(sum);
        }
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
    device const T* from_x = x + ulong(group.z) * args.x_head + ulong(dense::within(first_x + row, args.m)) * args.x_row;

    const ushort top = simdgroup / 2 * 16, left = simdgroup % 2 * 16;
    const ushort2 place = dense::fragment_place(lane);
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
        const ulong index = ulong(head_row + dense::within(row_w, args.n)) * args.k + column;
        if (dense::LOADS != 0) {
            float4 low = float4(0.0f), high = float4(0.0f);
            if (row_w < args.n && column < args.k) {
                dense::eight(weight, index, low, high);
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

#define INSTANTIATE_DENSE_TYPE(type, T)                                          \
    INSTANTIATE_DENSE("dense_rows_" type "_m1", dense_rows<T, 1, 4>)             \
    INSTANTIATE_DENSE("dense_rows_" type "_m2", dense_rows<T, 2, 4>)             \
    INSTANTIATE_DENSE("dense_rows_" type "_m4", dense_rows<T, 4, 4>)             \
    INSTANTIATE_DENSE("dense_rows_" type "_m8", dense_rows<T, 8, 2>)             \
    INSTANTIATE_DENSE("dense_tiles_" type, dense_tiles<T, false>)                \
    INSTANTIATE_DENSE("dense_columns_" type "_m1", dense_columns<T, 1>)          \
    INSTANTIATE_DENSE("dense_columns_" type "_m4", dense_columns<T, 4>)          \
    INSTANTIATE_DENSE("dense_columns_tiles_" type, dense_tiles<T, true>)

INSTANTIATE_DENSE_TYPE("f32", float)
INSTANTIATE_DENSE_TYPE("f16", half)
INSTANTIATE_DENSE_TYPE("bf16", bfloat)
