// Experts: y[t] = Σ w · down(silu(gate x[t]) · up x[t]) over the slots of a token, of its routed experts and of the shared
// ones, whose weight is 1. All weights are FP4 and lie where a table says; h, between the halves, is float. A gated MLP is a
// shared expert alone. An id that names no expert gives NaN, and nothing is read by it.
//
// Few tokens, each slot by itself:
//
// | kernel             | threadgroup                                   | grid (x, y, z)                       |
// |--------------------|-----------------------------------------------|--------------------------------------|
// | moe_gate_up_<type> | 2 simdgroups, 4 rows of gate and of up each   | rows of h, slots of a token, tokens  |
// | moe_down_<type>    | 8 simdgroups on the same 4 rows of y          | rows of y, tokens                    |
//
// Many tokens, slots sorted by expert:
//
// | kernel                   | threadgroup                             | grid (x, y)                          |
// |--------------------------|-----------------------------------------|--------------------------------------|
// | moe_sort                 | 512 threads                             | one                                  |
// | moe_tiles_gate_up_<type> | 4 simdgroups, 32 slots × 16 rows of h   | rows of h, tiles that there may be   |
// | moe_tiles_down           | 4 simdgroups, 32 slots × 32 rows of z   | rows of z, tiles that there may be   |
// | moe_sum_<type>           | 64 threads, 4 elements of y each        | elements of y, tokens                |
//
// Buffers stand above each kernel.

#include <metal_stdlib>
#include <metal_simdgroup_matrix>

#include "args.h"
#include "fp4.h"
#include "rows.h"

using namespace metal;

namespace moe {

// Whether there are routed experts, and with them ids and weights.
constant bool ROUTED [[function_constant(8)]];

// Slots, and rows of weights, of a tile; as src/metal/moe.rs has it.
static constant constexpr ushort TILE = 32;
// Rows in threadgroup memory are this much longer than a tile: eight rows of a fragment begin in different banks.
static constant constexpr ushort PAD = 4;

static inline float or_nan(bool there, float value) { return there ? value : as_type<float>(0x7fc00000u); }

// Where an element of a slot's gated activations is, of `width`: in chunks of 32, which a lane each reads in down, first all
// chunks' first four elements, then all second ones: lanes side by side read what lies side by side.
static inline uint place_of(uint element, uint width) {
    const bool whole = width % 32 == 0;
    return whole ? ((element % 32 / 4) * (width / 32) + element / 32) * 4 + element % 4 : element;
}

// Gated activations of a slot, so laid out.
struct Gated {
    device const float* h;
    uint width;

    void take(uint at, thread float4& low, thread float4& high) const {
        if (width % 32 == 0) {
            low = *(device const float4*)(h + place_of(at, width));
            high = *(device const float4*)(h + place_of(at + 4, width));
        } else {
            rows::load(h + at, low, high);
        }
    }
};

static inline float swiglu(float gate, float up) { return gate / (1.0f + exp(-gate)) * up; }

} // namespace moe

// ---------------------------------------------------------------------------------------------------------------------
// Gate, up and what joins them, for a slot. The lanes of a simdgroup take chunks of its rows in turn, 32 codes (WIDE) or 8. In
// registers: the chunk of four rows, first of gate and then of up, eight activations, four sums, and two of each chunk.
//
// | buffer | what                                  |       |
// |--------|---------------------------------------|-------|
// | 0      | codes of all experts                  | read  |
// | 1      | scales of all experts                 | read  |
// | 2      | MoePlace of each, shared ones last    | read  |
// | 3      | x, [tokens, d]                        | read  |
// | 4      | ids, [tokens, top_k] (with ROUTED)    | read  |
// | 5      | h, float [tokens, slots, h_row]       | write |
// | 6      | MoeArgs                               | bytes |

template <typename T>
[[kernel]] void moe_gate_up(
    device const uchar* codes [[buffer(0)]],
    device const uchar* scales [[buffer(1)]],
    device const MoePlace* places [[buffer(2)]],
    device const T* x [[buffer(3)]],
    device const uint* ids [[buffer(4), function_constant(moe::ROUTED)]],
    device float* h [[buffer(5)]],
    constant MoeArgs& args [[buffer(6)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]
) {
    constexpr ushort SIMDGROUPS = 2, ROWS = 4;
    const uint slot = group.y, token = group.z;
    const bool routed = slot < args.top_k;
    uint expert = args.experts + slot - args.top_k;
    if (moe::ROUTED) {
        if (routed) {
            expert = ids[token * args.top_k + slot];
        }
    }
    const bool known = !routed || expert < args.experts;
    const uint width = routed ? args.width : args.shared_width;
    const uint first = (group.x * SIMDGROUPS + simdgroup) * ROWS;

    const uint d = rows::known_length(args.d);
    device const MoePlace& place = places[known ? expert : 0];
    const rows::Activations<T> activations = {x + ulong(token) * args.x_row};
    // Of gate, then of up.
    float sums[2];
    UNROLL
    for (ushort part = 0; part < 2; part++) {
        const bool is_up = part == 1;
        rows::Rows<ROWS> weights;
        float four[ROWS];
        UNROLL
        for (ushort r = 0; r < ROWS; r++) {
            const ulong row = rows::within(first + r, width);
            weights.codes[r] = (device const uint*)(codes + (is_up ? place.up_codes : place.gate_codes)) + row * (d / 8);
            weights.scales[r] =
                scales + (is_up ? place.up_scales : place.gate_scales) + row * (d / fp4::GROUP) * rows::scale_size();
            four[r] = 0.0f;
        }
        // Nothing for a simdgroup beyond the rows of this expert (another one may be wider), or without an expert.
        if (known && first < width) {
            constexpr ushort WORDS = rows::words_of<T>();
            const uint chunk = fp4::WIDE ? 8 * WORDS : 8;
            for (uint at = lane * chunk; at < d; at += 32 * chunk) {
                if (fp4::WIDE) {
                    rows::add<WORDS>(weights, activations, at, four);
                } else {
                    rows::add<1>(weights, activations, at, four);
                }
            }
        }
        const float factor = fp4::UNIT * fp4::of_scales(is_up ? place.up_factor : place.gate_factor);
        sums[part] = rows::shared_out<ROWS, 32>(four, lane) * factor;
    }

    // Eight lanes a row.
    const uint row = first + lane / 8;
    if (lane % 8 == 0 && row < width) {
        const ulong to = (ulong(token) * (args.top_k + args.shared) + slot) * args.h_row;
        h[to + moe::place_of(row, width)] = moe::or_nan(known, moe::swiglu(sums[0], sums[1]));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Down, and the sum over a token's slots. The 256 threads take chunks of all slots in turn: few rows are long enough to keep
// them busy slot by slot. Their sums meet in threadgroup memory. In registers: the chunk of four rows of down, eight
// activations, four sums.
//
// | buffer | what                                         |       |
// |--------|----------------------------------------------|-------|
// | 0 to 2 | codes, scales, places, as above              | read  |
// | 3      | ids, [tokens, top_k] (with ROUTED)           | read  |
// | 4      | weights, float [tokens, top_k] (with ROUTED) | read  |
// | 5      | h, float [tokens, slots, h_row]              | read  |
// | 6      | y, [tokens, d]                               | write |
// | 7      | MoeArgs                                      | bytes |

template <typename T>
[[kernel]] void moe_down(
    device const uchar* codes [[buffer(0)]],
    device const uchar* scales [[buffer(1)]],
    device const MoePlace* places [[buffer(2)]],
    device const uint* ids [[buffer(3), function_constant(moe::ROUTED)]],
    device const float* weights [[buffer(4), function_constant(moe::ROUTED)]],
    device const float* h [[buffer(5)]],
    device T* y [[buffer(6)]],
    constant MoeArgs& args [[buffer(7)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]
) {
    constexpr ushort SIMDGROUPS = 8, ROWS = 4;
    threadgroup float parts[SIMDGROUPS][ROWS];

    const uint first = group.x * ROWS, token = group.y;
    const uint chunk = fp4::WIDE ? 32 : 8;
    const uint routed_width = rows::known_length(args.width), shared_width = rows::known_length(args.shared_width);
    const uint chunks = routed_width / chunk, shared_chunks = shared_width / chunk;
    const uint of_routed = args.top_k * chunks;

    float sums[ROWS];
    UNROLL
    for (ushort r = 0; r < ROWS; r++) {
        sums[r] = 0.0f;
    }
    for (uint i = thread_index; i < of_routed + args.shared * shared_chunks; i += 32 * SIMDGROUPS) {
        // Of which slot, and where in it.
        const bool routed = i < of_routed;
        const uint from_shared = routed ? 0 : i - of_routed;
        const uint index = routed ? i / chunks : from_shared / shared_chunks;
        const uint at = (routed ? i % chunks : from_shared % shared_chunks) * chunk;
        const uint slot = routed ? index : args.top_k + index;
        const uint width = routed ? routed_width : shared_width;
        uint expert = args.experts + index;
        float weight = 1.0f;
        if (moe::ROUTED) {
            if (routed) {
                const uint id = ids[token * args.top_k + index];
                expert = id < args.experts ? id : 0;
                weight = moe::or_nan(id < args.experts, weights[token * args.top_k + index]);
            }
        }

        device const MoePlace& place = places[expert];
        const moe::Gated gated = {h + (ulong(token) * (args.top_k + args.shared) + slot) * args.h_row, width};
        rows::Rows<ROWS> of_down;
        float parts_of_slot[ROWS];
        UNROLL
        for (ushort r = 0; r < ROWS; r++) {
            const ulong row = rows::within(first + r, args.d);
            of_down.codes[r] = (device const uint*)(codes + place.down_codes) + row * (width / 8);
            of_down.scales[r] = scales + place.down_scales + row * (width / fp4::GROUP) * rows::scale_size();
            parts_of_slot[r] = 0.0f;
        }
        if (fp4::WIDE) {
            rows::add<4>(of_down, gated, at, parts_of_slot);
        } else {
            rows::add<1>(of_down, gated, at, parts_of_slot);
        }
        const float factor = weight * fp4::of_scales(place.down_factor);
        UNROLL
        for (ushort r = 0; r < ROWS; r++) {
            sums[r] = fma(parts_of_slot[r], factor, sums[r]);
        }
    }

    const float sum = rows::shared_out<ROWS, 32>(sums, lane);
    if (lane % 8 == 0) {
        parts[simdgroup][lane / 8] = sum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (thread_index < ROWS && first + thread_index < args.d) {
        float sum = 0.0f;
        for (ushort s = 0; s < SIMDGROUPS; s++) {
            sum += parts[s][thread_index];
        }
        y[ulong(token) * args.d + first + thread_index] = T(sum * fp4::UNIT);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Slots sorted by expert, in their order within each, and the tiles of them. Each thread has an expert and a part of the slots,
// and counts those of that part that are the expert's; a prefix sum over experts, and over parts within an expert, says where
// it is to write them. Nothing is counted by two threads: no atomics. A slot whose id names no expert is in no tile.
//
// | buffer | what                                  |       |
// |--------|---------------------------------------|-------|
// | 0      | ids, [tokens, top_k] (with ROUTED)    | read  |
// | 1      | slots, sorted                         | write |
// | 2      | MoeTile [tiles]                       | write |
// | 3      | MoeArgs                               | bytes |

[[kernel, max_total_threads_per_threadgroup(512)]] void moe_sort(
    device const uint* ids [[buffer(0), function_constant(moe::ROUTED)]],
    device uint* sorted [[buffer(1)]],
    device MoeTile* tiles [[buffer(2)]],
    constant MoeArgs& args [[buffer(3)]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]
) {
    constexpr ushort SIMDGROUPS = 16, THREADS = 32 * SIMDGROUPS;
    threadgroup uint totals[SIMDGROUPS], tile_totals[SIMDGROUPS];
    threadgroup uint starts[THREADS + 1];

    const uint experts = args.experts + args.shared;
    const uint per_token = args.top_k + args.shared;
    const uint slots = args.tokens * per_token;
    const uint parts = THREADS / experts;
    const uint expert = thread_index / parts, part = thread_index % parts;
    const uint of_part = (slots + parts - 1) / parts;
    const uint from = min(part * of_part, slots);
    const uint to = expert < experts ? min(from + of_part, slots) : from;

    uint count = 0;
    uint token = from / per_token, in_token = from % per_token;
    for (uint slot = from; slot < to; slot++) {
        uint found = args.experts + in_token - args.top_k;
        if (moe::ROUTED) {
            if (in_token < args.top_k) {
                found = ids[token * args.top_k + in_token];
                // No shared expert by an id.
                found = found < args.experts ? found : experts;
            }
        }
        count += found == expert ? 1 : 0;
        in_token++;
        if (in_token == per_token) {
            in_token = 0;
            token++;
        }
    }
    uint place = simd_prefix_exclusive_sum(count);
    if (lane == 31) {
        totals[simdgroup] = place + count;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (ushort s = 0; s < simdgroup; s++) {
        place += totals[s];
    }
    if (part == 0 && expert < experts) {
        starts[expert] = place;
    }
    if (thread_index == THREADS - 1) {
        starts[experts] = place + count;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // A thread writes the tiles of an expert.
    uint first = 0, of_expert = 0;
    if (thread_index < experts) {
        first = starts[thread_index];
        of_expert = starts[thread_index + 1] - first;
    }
    const uint tiles_of_expert = (of_expert + moe::TILE - 1) / moe::TILE;
    uint tile = simd_prefix_exclusive_sum(tiles_of_expert);
    if (lane == 31) {
        tile_totals[simdgroup] = tile + tiles_of_expert;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint all_tiles = 0;
    for (ushort s = 0; s < SIMDGROUPS; s++) {
        tile += s < simdgroup ? tile_totals[s] : 0;
        all_tiles += tile_totals[s];
    }
    for (uint i = 0; i < tiles_of_expert; i++) {
        tiles[tile + i].expert = thread_index;
        tiles[tile + i].first = first + i * moe::TILE;
        tiles[tile + i].count = min(of_expert - i * moe::TILE, uint(moe::TILE));
    }
    for (uint i = all_tiles + thread_index; i < args.tiles; i += THREADS) {
        tiles[i].expert = 0;
        tiles[i].first = 0;
        tiles[i].count = 0;
    }

    token = from / per_token;
    in_token = from % per_token;
    for (uint slot = from; slot < to; slot++) {
        uint found = args.experts + in_token - args.top_k;
        if (moe::ROUTED) {
            if (in_token < args.top_k) {
                found = ids[token * args.top_k + in_token];
                found = found < args.experts ? found : experts;
            }
        }
        if (found == expert) {
            sorted[place] = slot;
            place++;
        }
        in_token++;
        if (in_token == per_token) {
            in_token = 0;
            token++;
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Products of a tile's slots with 32 rows of its expert's weights, 32 along K at a time, as linear_tiles of linear.metal: codes
// are staged as numbers of the activations' type, in which they are exact, a fragment's products over one group are multiplied
// by the group's scale in float. With GATE_UP the rows are 16 of gate and the same 16 of up, eight by eight, so that a lane has
// gate and up of the same elements of h; otherwise 32 of down, and activations are h. Each simdgroup has 16 slots × 16 rows: four
// fragments of sums in registers, and four of products. A threadgroup without a tile, or beyond its expert's rows, does nothing:
// how many tiles there are is known on the device only.
//
// | buffer | what                                                                     |       |
// |--------|--------------------------------------------------------------------------|-------|
// | 0 to 2 | codes, scales, places, as above                                          | read  |
// | 3      | slots, sorted                                                            | read  |
// | 4      | MoeTile [tiles]                                                          | read  |
// | 5      | x, [tokens, d], or h, float [tokens, slots, h_row]                       | read  |
// | 6      | h, float [tokens, slots, h_row], or z, float [tokens, slots, d]: of each slot | write |
// | 7      | MoeArgs                                                                  | bytes |

template <typename T, bool GATE_UP>
[[kernel]] void moe_tiles(
    device const uchar* codes [[buffer(0)]],
    device const uchar* scales [[buffer(1)]],
    device const MoePlace* places [[buffer(2)]],
    device const uint* sorted [[buffer(3)]],
    device const MoeTile* tiles [[buffer(4)]],
    device const T* x [[buffer(5)]],
    device float* out [[buffer(6)]],
    constant MoeArgs& args [[buffer(7)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]
) {
    constexpr ushort TILE = moe::TILE, PAD = moe::PAD;
    threadgroup T tile_x[TILE][TILE + PAD];
    threadgroup T tile_w[TILE][TILE + PAD];
    // Of each row of the weights, of each 16 along K.
    threadgroup float tile_scales[2][TILE];

    const uint expert = tiles[group.y].expert, first = tiles[group.y].first, count = tiles[group.y].count;
    const uint width = expert < args.experts ? args.width : args.shared_width;
    const uint k = GATE_UP ? args.d : width;
    const uint n = GATE_UP ? width : args.d;
    // Rows of gate and of up that a threadgroup has, or of down.
    constexpr ushort OWN = GATE_UP ? TILE / 2 : TILE;
    const uint first_row = group.x * OWN;
    if (count > 0 && first_row < n) {
        device const MoePlace& place = places[expert];
        const uint words = k / 8;
        const uint groups = k / fp4::GROUP;
        const uint per_token = args.top_k + args.shared;

        // Each thread stages eight elements of a slot's activations and of a row of the weights.
        const ushort row = thread_index / 4, part = thread_index % 4;
        const bool there = row < count;
        const uint slot = sorted[first + rows::within(row, count)];
        device const T* from_x = x + (GATE_UP ? ulong(slot / per_token) * args.x_row : ulong(slot) * args.h_row);
        const bool is_up = GATE_UP && row % 16 >= 8;
        const uint weight_row = first_row + (GATE_UP ? row / 16 * 8 + row % 8 : row);
        const bool row_there = weight_row < n;
        const ulong codes_of = GATE_UP ? (is_up ? place.up_codes : place.gate_codes) : place.down_codes;
        device const uint* from_w =
            (device const uint*)(codes + codes_of) + ulong(rows::within(weight_row, n)) * words;
        // Two times 32 threads stage the scales.
        const ushort half_step = thread_index / TILE, column = thread_index % TILE;
        const bool scale_of_up = GATE_UP && column % 16 >= 8;
        const uint scale_row = first_row + (GATE_UP ? column / 16 * 8 + column % 8 : column);
        const ulong scales_of = GATE_UP ? (scale_of_up ? place.up_scales : place.gate_scales) : place.down_scales;
        const float factor = GATE_UP ? (scale_of_up ? place.up_factor : place.gate_factor) : place.down_factor;
        device const uchar* from_scales =
            scales + scales_of + ulong(rows::within(scale_row, n)) * groups * rows::scale_size();

        const ushort top = simdgroup / 2 * 16, left = simdgroup % 2 * 16;
        const ushort2 at = rows::fragment_place(lane);
        simdgroup_float8x8 sums[2][2];
        for (ushort i = 0; i < 2; i++) {
            for (ushort j = 0; j < 2; j++) {
                sums[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
            }
        }

        for (uint start = 0; start < k; start += TILE) {
            const uint word = start / 8 + part;
            float4 low = float4(0.0f), high = float4(0.0f);
            if (there && word < words) {
                rows::load(from_x + word * 8, low, high);
            }
            for (ushort i = 0; i < 4; i++) {
                tile_x[row][part * 8 + i] = T(low[i]);
                tile_x[row][part * 8 + 4 + i] = T(high[i]);
            }
            low = float4(0.0f);
            high = float4(0.0f);
            if (row_there && word < words) {
                fp4::decode(from_w[word], low, high);
            }
            for (ushort i = 0; i < 4; i++) {
                tile_w[row][part * 8 + i] = T(low[i] * fp4::UNIT);
                tile_w[row][part * 8 + 4 + i] = T(high[i] * fp4::UNIT);
            }
            if (thread_index < 2 * TILE) {
                const uint along_k = start + half_step * 16;
                float scale = 0.0f;
                if (scale_row < n && along_k < k) {
                    scale = fp4::scale(from_scales, along_k / fp4::GROUP) * fp4::of_scales(factor);
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
                for (ushort along = step * 8; along < (step + steps) * 8; along += 8) {
                    simdgroup_matrix<T, 8, 8> a[2], b[2];
                    for (ushort i = 0; i < 2; i++) {
                        simdgroup_load(a[i], &tile_x[top + i * 8][along], TILE + PAD);
                        simdgroup_load(b[i], &tile_w[left + i * 8][along], TILE + PAD, ulong2(0, 0), true);
                    }
                    for (ushort i = 0; i < 2; i++) {
                        for (ushort j = 0; j < 2; j++) {
                            simdgroup_multiply_accumulate(products[i][j], a[i], b[j], products[i][j]);
                        }
                    }
                }
                for (ushort j = 0; j < 2; j++) {
                    const ushort of_lane = left + j * 8 + at.y;
                    const float scale = tile_scales[step / 2][of_lane], next_scale = tile_scales[step / 2][of_lane + 1];
                    for (ushort i = 0; i < 2; i++) {
                        sums[i][j].thread_elements()[0] += products[i][j].thread_elements()[0] * scale;
                        sums[i][j].thread_elements()[1] += products[i][j].thread_elements()[1] * next_scale;
                    }
                }
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
        }

        for (ushort i = 0; i < 2; i++) {
            const uint to_row = top + i * 8 + at.x;
            const ulong to = ulong(sorted[first + rows::within(to_row, count)]) * (GATE_UP ? args.h_row : args.d);
            for (ushort e = 0; e < 2; e++) {
                if (GATE_UP) {
                    const uint to_column = first_row + left / 2 + at.y + e;
                    const float gate = sums[i][0].thread_elements()[e], up = sums[i][1].thread_elements()[e];
                    if (to_row < count && to_column < n) {
                        out[to + to_column] = moe::swiglu(gate, up);
                    }
                } else {
                    for (ushort j = 0; j < 2; j++) {
                        const uint to_column = first_row + left + j * 8 + at.y + e;
                        if (to_row < count && to_column < n) {
                            out[to + to_column] = sums[i][j].thread_elements()[e];
                        }
                    }
                }
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The weighted sum over a token's slots: routed ones in their order, then shared ones. In registers: four sums.
//
// | buffer | what                                         |       |
// |--------|----------------------------------------------|-------|
// | 0      | z, float [tokens, slots, d]                  | read  |
// | 1      | ids, [tokens, top_k] (with ROUTED)           | read  |
// | 2      | weights, float [tokens, top_k] (with ROUTED) | read  |
// | 3      | y, [tokens, d]                               | write |
// | 4      | MoeArgs                                      | bytes |

template <typename T>
[[kernel]] void moe_sum(
    device const float* z [[buffer(0)]],
    device const uint* ids [[buffer(1), function_constant(moe::ROUTED)]],
    device const float* weights [[buffer(2), function_constant(moe::ROUTED)]],
    device T* y [[buffer(3)]],
    constant MoeArgs& args [[buffer(4)]],
    uint2 at [[thread_position_in_grid]]
) {
    // d is a multiple of 16: rows begin at multiples of four elements, and none ends within four.
    const uint column = at.x * 4, token = at.y;
    if (column < args.d) {
        const ulong first = ulong(token) * (args.top_k + args.shared);
        float4 sum = float4(0.0f);
        if (moe::ROUTED) {
            for (uint slot = 0; slot < args.top_k; slot++) {
                // No tile wrote z of an id that names no expert.
                const bool known = ids[token * args.top_k + slot] < args.experts;
                const float weight = moe::or_nan(known, weights[token * args.top_k + slot]);
                float4 value = float4(1.0f);
                if (known) {
                    value = *(device const float4*)(z + (first + slot) * args.d + column);
                }
                sum += value * weight;
            }
        }
        for (uint slot = args.top_k; slot < args.top_k + args.shared; slot++) {
            sum += *(device const float4*)(z + (first + slot) * args.d + column);
        }
        for (ushort i = 0; i < 4; i++) {
            y[ulong(token) * args.d + column + i] = T(sum[i]);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------

#define INSTANTIATE(name, ...) template [[host_name(name)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;

#define INSTANTIATE_MOE(type, T)                              \
    INSTANTIATE("moe_gate_up_" type, moe_gate_up<T>)          \
    INSTANTIATE("moe_down_" type, moe_down<T>)                \
    INSTANTIATE("moe_tiles_gate_up_" type, moe_tiles<T, true>) \
    INSTANTIATE("moe_sum_" type, moe_sum<T>)

INSTANTIATE_MOE("f32", float)
INSTANTIATE_MOE("f16", half)
INSTANTIATE_MOE("bf16", bfloat)
INSTANTIATE("moe_tiles_down", moe_tiles<float, false>)
