// What the check must accept and the build must compile: MSL that kernels for mixtures of experts, norms, attention and
// top-k are written in, a construct a kernel.
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

static_assert(sizeof(1.0) == 4, "a literal is a float");

#define BARRIER threadgroup_barrier(mem_flags::mem_threadgroup)
#define PARAMETERS                                                                                                  \
  device float *o [[buffer(0)]], device const half4 *h [[buffer(1)]], constant P &p [[buffer(2)]],                  \
      threadgroup float *t [[threadgroup(0)]], uint i [[thread_position_in_grid]],                                  \
      ushort lane [[thread_index_in_simdgroup]], ushort sg [[simdgroup_index_in_threadgroup]]

struct P {
    uint n;
    float s;
};

inline float helper0(threadgroup const float (&tile)[4][8], uint i) {
    return tile[0][i];
}
[[kernel]] void tile_by_reference(PARAMETERS) {
    threadgroup float tile[4][8];
    tile[0][lane & 7] = 1;
    BARRIER;
    o[0] = helper0(tile, lane & 7);
}

template <typename T, int R, int C> inline T helper1(threadgroup T (&tile)[R][C], uint i) {
    return tile[0][i];
}
[[kernel]] void template_tile_by_reference(PARAMETERS) {
    threadgroup float tile[4][8];
    tile[0][lane & 7] = 1;
    BARRIER;
    o[0] = helper1(tile, lane & 7);
}

inline float helper2(threadgroup const float (*tile)[8], uint i) {
    return tile[0][i];
}
[[kernel]] void pointer_to_row(PARAMETERS) {
    threadgroup float tile[4][8];
    tile[0][lane & 7] = 1;
    BARRIER;
    o[0] = helper2(tile, lane & 7);
}

[[kernel]] void uniform_return(PARAMETERS) {
    if (p.n == 0) return;
    BARRIER;
    o[0] = t[0];
}

[[kernel]] void uniform_return_by_group(device float* o [[buffer(0)]], device const uint* counts [[buffer(1)]],
    uint3 g [[threadgroup_position_in_grid]], uint l [[thread_index_in_threadgroup]]) {
    threadgroup float t[64];
    const uint n = counts[g.z];
    if (g.x * 32 >= n) {
        return;
    }
    t[l & 63] = 1;
    BARRIER;
    o[l] = t[l & 63 ^ 1];
}

[[kernel]] void simdgroup_uniform_return_before_simd_sum(PARAMETERS) {
    if (sg >= p.n) return;
    o[sg] = simd_sum(1.0f);
}

[[kernel]] void return_at_the_end(PARAMETERS) {
    BARRIER;
    if (lane > 0) return;
    o[0] = t[0];
}

inline float helper7(uint i) {
    if (i > 3) return 1.0f;
    return 2.0f;
}
[[kernel]] void early_return_in_a_plain_helper(PARAMETERS) {
    const float x = helper7(lane);
    o[0] = simd_sum(x);
}

struct Shared {
    float a[4][8];
    uint n;
};
[[kernel]] void struct_in_threadgroup_memory(PARAMETERS) {
    threadgroup Shared s;
    if (lane == 0) s.n = 3;
    s.a[0][lane & 7] = 1;
    BARRIER;
    o[0] = s.a[0][s.n];
}

struct Pair9 {
    float value;
    uint index;
};
[[kernel]] void array_of_structs_in_threadgroup_memory(PARAMETERS) {
    threadgroup Pair9 best[32];
    best[lane] = Pair9{1.0f, i};
    BARRIER;
    Pair9 mine = best[lane ^ 1];
    o[0] = mine.value + float(mine.index);
}

[[kernel]] void threadgroup_atomics(PARAMETERS) {
    threadgroup atomic_uint c[4];
    if (lane < 4) atomic_store_explicit(&c[lane], 0u, memory_order_relaxed);
    BARRIER;
    atomic_fetch_add_explicit(&c[lane & 3], 1u, memory_order_relaxed);
    BARRIER;
    o[0] = float(atomic_load_explicit(&c[0], memory_order_relaxed));
}

[[kernel]] void wide_loads(PARAMETERS) {
    device const uchar* b = (device const uchar*)h;
    const uint4 q = *(device const uint4*)(b + 16 * i);
    device const uint4& r = *reinterpret_cast<device const uint4*>(b);
    o[0] = float(q.x + r.y);
}

[[kernel]] void bytes_of_a_word(PARAMETERS) {
    const uchar4 b = as_type<uchar4>(i);
    const char4 c = as_type<char4>(b);
    o[0] = dot(float4(b), float4(c));
}

[[kernel]] void half_shuffles(PARAMETERS) {
    half x = h[0].x;
    x = simd_shuffle_xor(x, 1);
    const float4 v = simd_shuffle(float4(1), ushort(3));
    o[0] = float(x) + v.x;
}

[[kernel]] void votes_as_bits(PARAMETERS) {
    const ulong votes = ulong(simd_vote::vote_t(simd_ballot(lane > 3)));
    o[0] = float(popcount(votes)) + float(ctz(votes));
}

[[kernel]] void ballot_cast(PARAMETERS) {
    const uint votes = uint((ulong)simd_ballot(lane > 3));
    o[0] = float(popcount(votes & ((1u << lane) - 1)));
}

[[kernel]] void cases(PARAMETERS) {
    switch (p.n) {
        case 0:
            o[0] = 1;
            break;
        case 1:
            o[0] = 2;
            break;
        default:
            o[0] = 3;
    }
}

[[kernel]] void sigmoids(PARAMETERS) {
    const float x = float(h[0].x);
    o[0] = x / (1.0f + fast::exp(-x)) + precise::exp(-x) + 1.0f / (1.0f + metal::exp(-x));
}

[[kernel]] void largest_numbers(PARAMETERS) {
    float m = numeric_limits<float>::lowest();
    m = max(m, -INFINITY);
    o[0] = m;
}

[[kernel]] void arrays_of_a_thread(PARAMETERS) {
    float4 acc[4] = {};
    float sums[4] = {0};
    device const half4* rows[2] = {h, h + 1};
    o[0] = acc[0].x + sums[1] + float(rows[0][1].x);
}

template <typename T, int N> struct Tile {
    T v[N];
    void fill20(T x) {
        for (int k = 0; k < N; k++) v[k] = x;
    }
    T at(int k) const {
        return v[k];
    }
};
[[kernel]] void class_template(PARAMETERS) {
    Tile<float, 4> a;
    a.fill20(2);
    o[0] = a.at(1);
}

[[kernel]] void least_of_mixed_types(PARAMETERS) {
    o[0] = float(min(p.n, uint(lane)) + max(ushort(4), lane));
}

namespace sizes {
    constant constexpr ushort TILE = 32;
    static constant constexpr uint WIDE = 4;
    constant float UNIT = 2;
}
[[kernel]] void namespaced_constants(PARAMETERS) {
    threadgroup float a[sizes::TILE];
    a[lane] = 1;
    o[0] = a[lane] * sizes::WIDE * sizes::UNIT;
}

[[kernel]] void matrix_to_threadgroup_memory(PARAMETERS) {
    threadgroup float tile[8][8];
    simdgroup_float8x8 m;
    simdgroup_load(m, o, ulong(p.n));
    simdgroup_store(m, &tile[0][0], 8);
    BARRIER;
    o[0] = tile[0][0];
}

[[kernel]] void unrolled_loops(PARAMETERS) {
    float x = 0;
#pragma unroll(4)
    for (uint k = 0; k < 4; k++) x += 1;
#pragma clang loop unroll(full)
    for (uint k = 0; k < 4; k++) x += 1;
    _Pragma("unroll") for (uint k = 0; k < 4; k++) x += 1;
    o[0] = x;
}

[[kernel]] void angles(PARAMETERS) {
    float c;
    const float s = sincos(p.s, c);
    o[0] = s + c + precise::cos(p.s) + precise::sin(p.s) + pow(2.0f, p.s) + exp2(p.s);
}

inline void fill26(thread float* x, thread float (&y)[4]) {
    for (int k = 0; k < 4; k++) x[k] = y[k];
}
[[kernel]] void array_parameters(PARAMETERS) {
    float a[4], b[4] = {1};
    fill26(a, b);
    o[0] = a[i & 3];
}

[[kernel]] void constant_array_buffer(device float* o [[buffer(0)]], constant uint* offsets [[buffer(1)]],
    constant uint& n [[buffer(2)]], uint i [[thread_position_in_grid]]) {
    o[i] = float(offsets[i] + n);
}

[[kernel]] void device_atomics(device atomic_uint* c [[buffer(0)]], device uint* o [[buffer(1)]], uint i
    [[thread_position_in_grid]]) {
    const uint at = atomic_fetch_add_explicit(&c[i & 7], 1u, memory_order_relaxed);
    o[at] = i;
}

[[kernel]] void binary_search(PARAMETERS) {
    uint low = 0, high = p.n;
    while (low < high) {
        const uint mid = (low + high) / 2;
        if (o[mid] < 1.0f) low = mid + 1;
        else high = mid;
    }
    o[0] = float(low);
}

[[kernel]] void uniform_break(PARAMETERS) {
    for (uint e = 0; e < p.n; e++) {
        if (e == 7) break;
        BARRIER;
    }
    o[0] = t[0];
}

[[kernel]] void shuffle_loop(PARAMETERS) {
    float x = 1;
    for (ushort d = 16; d > 0; d /= 2) x += simd_shuffle_down(x, d);
    if (lane == 0) o[0] = x;
}

[[kernel]] void largest_and_where(PARAMETERS) {
    float best = 1;
    uint at = lane;
    for (ushort d = 16; d > 0; d >>= 1) {
        const float other = simd_shuffle_xor(best, d);
        const uint other_at = simd_shuffle_xor(at, d);
        if (other > best || (other == best && other_at < at)) {
            best = other;
            at = other_at;
        }
    }
    o[0] = best + float(at);
}

[[kernel]] void not_a_number(PARAMETERS) {
    o[0] = isnan(p.s) || isinf(p.s) ? select(1.0f, 2.0f, p.n > 3) : 0.0f;
}

[[kernel]] void threadgroup_pointers(PARAMETERS) {
    threadgroup float tile[4][8];
    threadgroup const float* row = tile[lane & 3];
    threadgroup float* q = &tile[0][lane & 7];
    *q = 1;
    BARRIER;
    o[0] = row[0];
}

template <typename P> inline float at35(P q, uint i) {
    return float(q[i]);
}
[[kernel]] void deduced_pointers(PARAMETERS) {
    o[0] = at35(o, 1) + at35(t, 2);
}

[[kernel]] void shared_in_simdgroup_loop(PARAMETERS) {
    for (uint r = sg; r < p.n; r += 4) {
        const float x = simd_sum(o[r * 32 + lane]);
        if (lane == 0) o[r] = x;
    }
}

[[kernel]] void barrier_after_uniform_while(PARAMETERS) {
    uint n = p.n;
    while (n > 1) {
        n = (n + 1) / 2;
        if (lane < n) t[lane] += t[lane + n];
        BARRIER;
    }
    o[0] = t[0];
}

[[kernel]] void local_struct(PARAMETERS) {
    struct Pair38 {
        float a;
        uint b;
    };
    Pair38 q = {1.0f, 2u};
    o[0] = q.a + float(q.b);
}

inline float helper39(half x) {
    const float f = float(x);
    return f * f;
}
[[kernel]] void half_to_float_in_helper(PARAMETERS) {
    o[0] = helper39(h[0].x);
}

[[kernel]] void bfloat_vector(device const bfloat4* a [[buffer(0)]], device bfloat4* b [[buffer(1)]], uint i
    [[thread_position_in_grid]]) {
    b[i] = bfloat4(float4(a[i]) * 2.0f);
}

[[kernel]] void element_by_index(PARAMETERS) {
    float4 v = float4(1);
    for (ushort e = 0; e < 4; e++) v[e] = float(e);
    uint4 w = uint4(i);
    o[0] = v[2] + float(w[lane & 3]);
}

[[kernel]] void ternary_space_pointer(PARAMETERS) {
    device const half4* q = p.n > 2 ? h : h + 1;
    o[0] = float(q[0].x);
}

[[kernel]] void sizes_of_the_grid(device float* o [[buffer(0)]], uint3 g [[threadgroup_position_in_grid]], uint3 n
    [[threadgroups_per_grid]], uint3 s [[threads_per_threadgroup]]) {
    o[g.x + n.x * s.x] = 1;
}

[[kernel]] void loop_by_count_in_threadgroup_memory(PARAMETERS) {
    threadgroup uint n;
    if (lane == 0) n = p.n;
    BARRIER;
    for (uint e = 0; e < n; e++) {
        BARRIER;
    }
    o[0] = 1;
}

[[kernel]] void barrier_of_a_simdgroup(PARAMETERS) {
    t[lane] = 1;
    simdgroup_barrier(mem_flags::mem_threadgroup);
    o[0] = t[lane ^ 1];
}

struct Record46 {
    uint a, b;
};
[[kernel]] void struct_copy_from_device(PARAMETERS) {
    device const Record46* r = (device const Record46*)o;
    Record46 mine = r[i];
    threadgroup Record46 s[4];
    s[lane & 3] = mine;
    BARRIER;
    const Record46 other = s[0];
    o[0] = float(mine.a + other.b);
}

struct Record47 {
    uint a, b;
};
inline uint helper47(constant Record47& r) {
    return r.a;
}
[[kernel]] void struct_copy_const_ref_param(PARAMETERS) {
    constant Record47& r = *(constant Record47*)&p;
    o[0] = float(helper47(r));
}

[[kernel]] void conversions_of_vectors(PARAMETERS) {
    const ushort4 s = ushort4(h[0]);
    const half2 q = h[0].xy;
    half4 w = h[0];
    w.x = q.y;
    const float2 f = float2(q);
    o[0] = float(s.x) + f.x + float(w.x);
}

[[kernel]] void long_indices(PARAMETERS) {
    const ulong at = ulong(p.n) * i + lane;
    o[at] = 1;
}

[[kernel]] void mixed_scalars(PARAMETERS) {
    const uint a = lane * 4 + sg;
    const int b = int(a) - 3;
    o[0] = float(b) * 2 + a;
}

[[kernel]] void all_threads_one_if_barrier_in_both(PARAMETERS) {
    if (p.n > 3) {
        BARRIER;
    } else {
        BARRIER;
    }
    o[0] = 1;
}

struct Place {
    uint first;
    uint own;
};
[[kernel]] void members_of_different_levels(PARAMETERS) {
    Place place;
    place.first = p.n;
    place.own = lane;
    if (place.first > 3) {
        o[1] = simd_sum(1.0f);
    }
    o[place.own] = 1;
}

static inline float spread(thread float (&values)[2], uint lane) {
    values[0] += float(lane);
    return simd_sum(values[0]);
}
[[kernel]] void elements_of_arrays_as_outputs(PARAMETERS) {
    float values[2][2] = {{0, 1}, {2, 3}};
    for (ushort m = 0; m < 2; m++) {
        o[m] = spread(values[m], lane);
    }
}
[[kernel]] void loads_by_the_group_beside_arrays_as_outputs(PARAMETERS) {
    float values[2][2] = {{0, 1}, {2, 3}};
    const float sum = spread(values[1], lane);
    if (o[p.n] > 3) {
        o[0] = simd_sum(sum);
    }
}
