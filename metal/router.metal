// The router of a mixture of experts: scores x · Wᵀ, their sigmoids, and the choice of experts among them, in one dispatch.
//
// | kernel              | threadgroup                                   | grid                     |
// |---------------------|-----------------------------------------------|--------------------------|
// | router_<type>_m<M>  | 16 simdgroups, M tokens and all experts       | tokens / M               |
//
// | buffer | what                                         |       |
// |--------|----------------------------------------------|-------|
// | 0      | W, [experts, d], in the type that GATE names | read  |
// | 1      | correction bias, float [experts]             | read  |
// | 2      | x, [tokens, d]                               | read  |
// | 3      | logits, float [tokens, experts]              | write |
// | 4      | ids, uint [tokens, top_k]                    | write |
// | 5      | weights, float [tokens, top_k]               | write |
// | 6      | RouterArgs                                   | bytes |
//
// Each simdgroup scores four experts at a time: in registers eight elements of each of M rows of x, eight of a row of W, 4 · M
// sums; for one token eight of each of four rows of W and more, as loops are unrolled: one threadgroup is to have many loads
// under way. Then 512 / M threads choose for each token: each of them knows an expert's rank by counting the better ones. Ranks
// compare integers that are in the order of the numbers, NaN before all: what fast math does to comparisons changes nothing.

#include <metal_stdlib>

#include "args.h"
#include "rows.h"

using namespace metal;

namespace router {

// How the weight is stored.
enum : ushort { F16 = 0, BF16 = 1, F32 = 2 };
constant ushort GATE [[function_constant(9)]];
// Rows of the weight and of x begin at multiples of 16 bytes and are a multiple of eight elements long: the host has checked it.
constant bool EIGHTS [[function_constant(10)]];

static constant constexpr ushort SIMDGROUPS = 16;
static constant constexpr ushort THREADS = 32 * SIMDGROUPS;
// As src/metal/router.rs has them.
static constant constexpr ushort MOST_EXPERTS = 512;
static constant constexpr ushort MOST_CHOSEN = 16;
// Rows of the weight that a simdgroup takes at a time.
static constant constexpr ushort ROWS = 4;

// The key of minus infinity: an expert of a group that is out of the race.
static constant constexpr uint OUT = 0x007fffffu;
static constant constexpr uint NOT_A_NUMBER = 0xffffffffu;

// A number that is in the order of floats, the two zeros being one, NaN before all.
static inline uint key(float value) {
    const uint bits = as_type<uint>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return NOT_A_NUMBER;
    }
    if ((bits & 0x7fffffffu) == 0) {
        return 0x80000000u;
    }
    return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

// The float of a key.
static inline float value(uint key) {
    if (key == NOT_A_NUMBER) {
        return as_type<float>(0x7fc00000u);
    }
    return as_type<float>((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}

// Whether the one comes before the other: the larger key, else the lower index.
static inline bool before(uint key, uint index, uint other, uint other_index) {
    return key > other || (key == other && index < other_index);
}

// Eight elements of x from `start` on, of which there may be fewer.
template <typename T>
static inline void of_x(device const T* x, uint start, uint d, thread float4& low, thread float4& high) {
    if (EIGHTS) {
        rows::load_wide(x + start, low, high);
        return;
    }
    for (ushort i = 0; i < 4; i++) {
        low[i] = start + i < d ? float(x[start + i]) : 0.0f;
        high[i] = start + 4 + i < d ? float(x[start + 4 + i]) : 0.0f;
    }
}

// An element of the weight.
static inline float element(device const uchar* gate, ulong index) {
    if (GATE == F16) {
        return float(((device const half*)gate)[index]);
    }
    if (GATE == BF16) {
        return as_type<float>(uint(((device const ushort*)gate)[index]) << 16);
    }
    return ((device const float*)gate)[index];
}

// Eight elements of a row of the weight from `start` on, of which there may be fewer.
static inline void of_gate(
    device const uchar* gate, uint row, uint start, uint d, thread float4& low, thread float4& high
) {
    const ulong index = ulong(row) * d + start;
    if (EIGHTS) {
        if (GATE == F16) {
            rows::load_wide((device const half*)gate + index, low, high);
        } else if (GATE == BF16) {
            const uint4 eight = *(device const uint4*)(gate + index * 2);
            low = as_type<float4>(uint4(eight.x << 16, eight.x & 0xffff0000u, eight.y << 16, eight.y & 0xffff0000u));
            high = as_type<float4>(uint4(eight.z << 16, eight.z & 0xffff0000u, eight.w << 16, eight.w & 0xffff0000u));
        } else {
            rows::load_wide((device const float*)gate + index, low, high);
        }
        return;
    }
    for (ushort i = 0; i < 4; i++) {
        low[i] = start + i < d ? element(gate, index + i) : 0.0f;
        high[i] = start + 4 + i < d ? element(gate, index + 4 + i) : 0.0f;
    }
}

} // namespace router

template <typename T, ushort M>
[[kernel, max_total_threads_per_threadgroup(512)]] void route(
    device const uchar* gate [[buffer(0)]],
    device const float* bias [[buffer(1)]],
    device const T* x [[buffer(2)]],
    device float* logits [[buffer(3)]],
    device uint* ids [[buffer(4)]],
    device float* weights [[buffer(5)]],
    constant RouterArgs& args [[buffer(6)]],
    uint group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]
) {
    threadgroup float scores[M][router::MOST_EXPERTS];
    threadgroup uint keys[M][router::MOST_EXPERTS] __attribute__((aligned(16)));
    threadgroup uint group_keys[M][router::MOST_EXPERTS];
    threadgroup uint chosen[M][router::MOST_CHOSEN];

    // Tokens and experts that are not there are read as the last one, and not written.
    const uint d = rows::known_length(args.d);
    device const T* rows_of_x[M];
    UNROLL
    for (ushort m = 0; m < M; m++) {
        rows_of_x[m] = x + ulong(min(group * M + m, args.tokens - 1)) * args.x_row;
    }
    for (uint first = simdgroup * router::ROWS; first < args.experts; first += router::SIMDGROUPS * router::ROWS) {
        float sums[router::ROWS * M];
        UNROLL
        for (ushort i = 0; i < router::ROWS * M; i++) {
            sums[i] = 0.0f;
        }
        constexpr ushort AT_ONCE = 4 / M;
        _Pragma("clang loop unroll_count(AT_ONCE)")
        for (uint start = lane * 8; start < d; start += 32 * 8) {
            float4 low[M], high[M];
            UNROLL
            for (ushort m = 0; m < M; m++) {
                router::of_x(rows_of_x[m], start, d, low[m], high[m]);
            }
            UNROLL
            for (ushort r = 0; r < router::ROWS; r++) {
                float4 w_low, w_high;
                router::of_gate(gate, min(first + r, args.experts - 1), start, d, w_low, w_high);
                UNROLL
                for (ushort m = 0; m < M; m++) {
                    const float part = rows::add_dot(w_low, low[m], sums[r * M + m]);
                    sums[r * M + m] = rows::add_dot(w_high, high[m], part);
                }
            }
        }
        // Some lanes a score.
        constexpr ushort LANES = 32 / (router::ROWS * M);
        const float logit = rows::shared_out<router::ROWS * M, 32>(sums, lane);
        const ushort m = lane / LANES % M;
        const uint expert = first + lane / LANES / M;
        if (lane % LANES == 0 && expert < args.experts) {
            scores[m][expert] = logit;
            if (group * M + m < args.tokens) {
                logits[ulong(group * M + m) * args.experts + expert] = logit;
            }
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // From here on 512 / M threads have a token.
    constexpr ushort SHARE = router::THREADS / M;
    const ushort mine = thread_index / SHARE, place = thread_index % SHARE;
    for (uint expert = place; expert < args.experts; expert += SHARE) {
        const float score = 1.0f / (1.0f + precise::exp(-scores[mine][expert]));
        scores[mine][expert] = score;
        keys[mine][expert] = router::key(score + bias[expert]);
    }
    // Keys are compared by fours: what is beyond the last expert comes after everything.
    if (place < 4 && args.experts + place < router::MOST_EXPERTS) {
        keys[mine][args.experts + place] = 0;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    if (args.chosen_groups < args.groups) {
        // A group's score: the sum of its two best.
        const uint size = args.experts / args.groups;
        for (uint index = place; index < args.groups; index += SHARE) {
            uint best = 0, second = 0;
            for (uint i = 0; i < size; i++) {
                const uint next = keys[mine][index * size + i];
                second = max(second, min(best, next));
                best = max(best, next);
            }
            const float score = router::value(best) + (size > 1 ? router::value(second) : 0.0f);
            group_keys[mine][index] = router::key(score);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint expert = place; expert < args.experts; expert += SHARE) {
            const uint own = expert / size;
            uint rank = 0;
            for (uint other = 0; other < args.groups; other++) {
                rank += router::before(group_keys[mine][other], other, group_keys[mine][own], own) ? 1 : 0;
            }
            if (rank >= args.chosen_groups) {
                keys[mine][expert] = router::OUT;
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }

    for (uint expert = place; expert < args.experts; expert += SHARE) {
        const uint own = keys[mine][expert];
        uint rank = 0;
        for (uint other = 0; other < args.experts; other += 4) {
            const uint4 four = *(threadgroup const uint4*)&keys[mine][other];
            UNROLL
            for (ushort i = 0; i < 4; i++) {
                rank += router::before(four[i], other + i, own, expert) ? 1 : 0;
            }
        }
        if (rank < args.top_k) {
            chosen[mine][rank] = expert;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    const uint token = group * M + mine;
    if (place < args.top_k && token < args.tokens) {
        float divisor = 1.0f;
        if (args.normalize != 0) {
            float sum = 0.0f;
            for (uint slot = 0; slot < args.top_k; slot++) {
                sum += scores[mine][chosen[mine][slot]];
            }
            divisor = sum + 1e-20f;
        }
        const uint expert = chosen[mine][place];
        ids[ulong(token) * args.top_k + place] = expert;
        weights[ulong(token) * args.top_k + place] = scores[mine][expert] / divisor * args.scaling;
    }
}

// ---------------------------------------------------------------------------------------------------------------------

#define INSTANTIATE(name, ...) template [[host_name(name)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;

#define INSTANTIATE_ROUTER(type, T)                \
    INSTANTIATE("router_" type "_m1", route<T, 1>) \
    INSTANTIATE("router_" type "_m4", route<T, 4>)

INSTANTIATE_ROUTER("f32", float)
INSTANTIATE_ROUTER("f16", half)
INSTANTIATE_ROUTER("bf16", bfloat)
