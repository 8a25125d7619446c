// What stands around attention over a paged cache: parts of its outputs merged, and tokens of the cache as numbers.
//
// | kernel               | what                                          | threadgroup                       | grid (x)                          |
// |----------------------|-----------------------------------------------|-----------------------------------|-----------------------------------|
// | merge_parts_<type>   | Σ 2^(m - max m) part / Σ 2^(m - max m) l       | a head of a token, an element a thread in turn | heads of all tokens  |
// | gather_paged_<type>  | tokens decoded and rotated back               | 4 simdgroups, a vector each       | vectors of all tokens / 4         |

#include <metal_stdlib>

#include "args.h"
#include "cache.h"
#include "paged.h"

using namespace metal;

// ---------------------------------------------------------------------------------------------------------------------
// | buffer | what                                   |       |
// |--------|----------------------------------------|-------|
// | 0      | parts, float [rows, splits, width]     | read  |
// | 1      | stats, float2 [rows, splits]           | read  |
// | 2      | y, [rows, width]                       | write |
// | 3      | MergeArgs                              | bytes |

template <typename T>
[[kernel]] void merge_parts(
    device const float* parts [[buffer(0)]],
    device const float2* stats [[buffer(1)]],
    device T* y [[buffer(2)]],
    constant MergeArgs& args [[buffer(3)]],
    uint row [[threadgroup_position_in_grid]],
    ushort index [[thread_index_in_threadgroup]],
    ushort simdgroups [[simdgroups_per_threadgroup]]
) {
    device const float2* of_row = stats + ulong(row) * args.splits;
    float most = paged::none();
    for (uint split = 0; split < args.splits; split++) {
        most = fmax(most, of_row[split].x);
    }
    device const float* from = parts + ulong(row) * args.splits * args.width;
    for (uint i = index; i < args.width; i += simdgroups * 32) {
        float sum = 0.0f, weights = 0.0f;
        for (uint split = 0; split < args.splits; split++) {
            const float2 of_split = of_row[split];
            const float by = paged::worth(of_split, most);
            sum = fma(from[ulong(split) * args.width + i], by, sum);
            weights = fma(of_split.y, by, weights);
        }
        y[ulong(row) * args.width + i] = T(sum / weights);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// | buffer | what                                                                   |       |
// |--------|------------------------------------------------------------------------|-------|
// | 0      | the pool                                                               | read  |
// | 1      | index, with the sequence's table                                       | read  |
// | 2      | y: a row a token, its keys of all heads and then its values of all     | write |
// | 3      | GatherArgs                                                             | bytes |

template <typename T>
[[kernel]] void gather_paged(
    device const uchar* pool [[buffer(0)]],
    device const uint* index [[buffer(1)]],
    device T* y [[buffer(2)]],
    constant GatherArgs& args [[buffer(3)]],
    uint group [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]],
    ushort simdgroups [[simdgroups_per_threadgroup]]
) {
    const uint vectors = args.values.width == 0 ? args.heads : 2 * args.heads;
    const ulong place = ulong(group) * simdgroups + simdgroup;
    const uint row = uint(place / vectors), vector = uint(place % vectors);
    if (row < args.positions) {
        const uint at = args.first + row;
        const uint block = index[args.table + at / args.keys.block_tokens], offset = at % args.keys.block_tokens;
        const bool is_value = vector >= args.heads;
        const uint head = is_value ? vector - args.heads : vector;
        const uint width = is_value ? args.values.width : args.keys.width;
        const ulong codes_at = is_value ? cache::codes_at(args.values, block, offset, head)
                                        : cache::codes_at(args.keys, block, offset, head);
        const ulong scales_at = is_value ? cache::scales_at(args.values, block, offset, head)
                                         : cache::scales_at(args.keys, block, offset, head);
        const uint before = is_value ? args.heads * args.keys.width + head * width : head * width;
        device T* to = y + ulong(row) * args.heads * (args.keys.width + args.values.width) + before;
        if (paged::ROTARY && is_value) {
            for (uint i = lane; i < width; i += 32) {
                to[i] = T(cache::of_rotary(pool + codes_at, i));
            }
        } else {
            for (uint start = 0; start < width; start += 128) {
                const uint first = start + lane * 4;
                float4 x[1] = {cache::four_of(pool + codes_at, pool + scales_at, first, width)};
                if (cache::ROTATED) {
                    paged::rotate_back(x, width, lane);
                }
                paged::put_four(to, first, width, x[0]);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------

#define INSTANTIATE_PAGED_ROWS(name, ...) template [[host_name(name)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;

#define INSTANTIATE_PAGED_ROWS_TYPE(type, T)                         \
    INSTANTIATE_PAGED_ROWS("merge_parts_" type, merge_parts<T>)      \
    INSTANTIATE_PAGED_ROWS("gather_paged_" type, gather_paged<T>)

INSTANTIATE_PAGED_ROWS_TYPE("f32", float)
INSTANTIATE_PAGED_ROWS_TYPE("f16", half)
INSTANTIATE_PAGED_ROWS_TYPE("bf16", bfloat)
