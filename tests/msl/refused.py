"""Snippets that the check must refuse, each with words of the reason it must give, and files that it must accept; more
of what it must accept is in accepted.metal.

A snippet is the body of a kernel with a buffer `o`, halves `h`, parameters `p`, threadgroup memory `t` and three
indices; declarations before it, or instead of it, end with `===`.
"""
HEADER = """#include <metal_stdlib>
using namespace metal;
struct P { uint n; float s; float f() const { return s; } };
inline float first(device const float* p) { return p[0]; }
"""
KERNEL = """[[kernel]] void k(device float* o [[buffer(0)]], device const half4* h [[buffer(1)]],
  constant P& p [[buffer(2)]], threadgroup float* t [[threadgroup(0)]], uint i [[thread_position_in_grid]],
  ushort lane [[thread_index_in_simdgroup]], ushort sg [[simdgroup_index_in_threadgroup]]) { %s }
"""


def file_of(snippet):
    """The whole .metal file: what stands before `===` is declarations, what stands after is the body of the kernel."""
    before, separator, body = snippet.partition("===")
    if not separator:
        before, body = "", snippet
    return HEADER + before + (KERNEL % body if body else "") + "\n"


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
REFUSED = [
    # Address spaces
    ("device pointer from threadgroup", "device float* q = t; o[0] = q[0];", "cannot initialize a variable"),
    ("threadgroup for device parameter", "o[0] = first(t);", "no matching function"),
    ("constant for device parameter", "o[0] = first(&p.s);", "no matching function"),
    ("write through constant", "p.n = 1;", "read-only|const-qualified"),
    ("write through const", "h[0] = half4(0);", "read-only|const-qualified"),
    ("thread pointer from device", "thread float* q = o; q[0] = 1;", "cannot initialize a variable"),
    ("constant as thread pointer", "thread const float* q = &p.s; o[0] = *q;", "cannot initialize a variable"),
    ("device method", "device P* q = (device P*)o; o[0] = q->f();", "cannot initialize object parameter"),
    ("constant method", "o[0] = p.f();", "cannot initialize object parameter"),
    ("local pointer without space", "float a = 1; float* q = &a; o[0] = *q;", "without address space: 'q'"),
    ("local reference without space", "float a = 1; float& q = a; o[0] = q;", "without address space: 'q'"),
    (
        "pointer parameter without space",
        "inline float g(float* p) { return *p; }===",
        "without address space: 'float \\* p'",
    ),
    (
        "reference parameter without space",
        "inline void g(float& p) { p = 1; }===",
        "without address space: 'float & p'",
    ),
    ("pointer result without space", "inline float* g(device float* p) { return p; }===", "returns a pointer"),
    (
        "cast to another space",
        "threadgroup float* q = (threadgroup float*)o; o[0] = q[0];",
        "reinterpret_cast from .* is not allowed",
    ),
    ("cast of an element's address", "o[0] = *(device float*)(&t[1]);", "reinterpret_cast from .* is not allowed"),
    # Program scope
    ("mutable global", "float g = 1;===", "program-scope variable 'g' must be constant"),
    ("static const global", "static const float g = 1;===", "program-scope variable 'g' must be constant"),
    ("global threadgroup", "threadgroup float g[4];===", "threadgroup variable 'g' outside a kernel"),
    ("half function constant", "constant half c [[function_constant(0)]];===", "function constant 'c' must be one of"),
    ("function constant with value", "constant bool c [[function_constant(0)]] = true;===", "with an initialiser"),
    (
        "function constant twice",
        "constant bool a [[function_constant(0)]];\nconstant bool b [[function_constant(0)]];===",
        "index 0 is also 'a'",
    ),
    # Not in Metal
    ("double", "double d = 1; o[0] = d;", "'double' is not in Metal"),
    ("goto", "goto e; e: o[0] = 1;", "'goto' is not in Metal"),
    ("throw", "throw 1;", "'throw' is not in Metal"),
    ("new", "thread float* x = new float; o[0] = *x;", "'new' is not in Metal"),
    ("typeid", "o[0] = typeid(o) == typeid(t);", "'typeid' is not in Metal"),
    ("virtual", "struct V { virtual float f() { return 1; } };===", "'virtual' is not in Metal"),
    ("static local", "static float x; o[0] = x;", "static variable that is not constant"),
    ("lambda", "auto f = [](float a) { return a; }; o[0] = f(1);", "lambda"),
    ("function pointer", "float (*f)(device const float*) = first; o[0] = f(o);", "'f' is a function pointer"),
    ("recursion", "inline float g(uint n) { return n ? g(n - 1) + 1 : 0; }===", "recursion through 'g'"),
    (
        "mutual recursion",
        "inline float b(uint n);\ninline float a(uint n) { return n ? b(n - 1) : 0; }\n"
        "inline float b(uint n) { return a(n); }===",
        "recursion through 'a'",
    ),
    ("variable-length array", "float x[p.n]; x[0] = 1; o[0] = x[0];", "variable.length array"),
    ("std::max", "o[0] = std::max(1.0f, 2.0f);", "undeclared identifier 'std'"),
    ("expf", "o[0] = expf(1.0f);", "undeclared identifier 'expf'"),
    ("printf", 'printf("x");', "undeclared identifier 'printf'"),
    ("unknown header", '#include <vector>\n===o[0] = 1;', "file not found"),
    ("OpenCL swizzle", "o[0] = float4(1).lo.x;", "swizzle '.lo'"),
    ("kernel as a name", "float kernel = 1; o[0] = kernel;", "expected"),
    # Kernels
    (
        "pointer parameter of a kernel",
        "[[kernel]] void k(float* o [[buffer(0)]]) { o[0] = 1; }===",
        "without address space",
    ),
    ("buffer by value", "[[kernel]] void k(float o [[buffer(0)]]) {}===", "buffer 'o' must be a device or constant"),
    (
        "threadgroup buffer",
        "[[kernel]] void k(threadgroup float* o [[buffer(0)]]) {}===",
        "buffer 'o' must be a device",
    ),
    (
        "device threadgroup",
        "[[kernel]] void k(device float* o [[threadgroup(0)]]) {}===",
        "'o' must be a threadgroup pointer",
    ),
    ("no attribute", "[[kernel]] void k(uint i) {}===", "neither a buffer nor has an attribute"),
    (
        "buffer index twice",
        "[[kernel]] void k(device int* a [[buffer(0)]], device int* b [[buffer(0)]]) {}===",
        "duplicate",
    ),
    ("buffer index 31", "[[kernel]] void k(device float* a [[buffer(31)]]) { a[0] = 1; }===", "greater than 30"),
    ("pointer to pointer", "[[kernel]] void k(device float** a [[buffer(0)]]) {}===", "pointer to pointer"),
    ("signed position", "[[kernel]] void k(int i [[thread_position_in_grid]]) {}===", "must be one of uint"),
    ("vector lane", "[[kernel]] void k(uint3 i [[thread_index_in_simdgroup]]) {}===", "must be one of uint, ushort"),
    ("misspelt attribute", "[[kernel]] void k(uint i [[thread_position_in_gird]]) {}===", "thread_position_in_gird"),
    ("misspelt kernel", "[[kernal]] void k(uint i [[thread_position_in_grid]]) {}===", "unknown attribute"),
    ("kernel returns", "[[kernel]] float k(device float* a [[buffer(0)]]) { return a[0]; }===", "must return void"),
    (
        "mixed widths",
        "[[kernel]] void k(uint2 g [[threadgroup_position_in_grid]], uint3 t [[thread_position_in_threadgroup]]) {}===",
        "different vector widths",
    ),
    ("kernel calls kernel", "[[kernel]] void a() {}\n===a(); o[0] = 1;", "call of kernel 'a'"),
    # Threadgroup memory and synchronisation
    (
        "threadgroup variable in a helper",
        "inline float g() { threadgroup float x[4]; return x[0]; }===",
        "outside a kernel",
    ),
    ("threadgroup initialiser", "threadgroup float x = 1; o[0] = x;", "'x' with an initialiser"),
    ("too much threadgroup memory", "threadgroup float a[8000], b[200]; a[0] = b[0]; o[0] = a[0];", "more than 32768"),
    ("barrier without flags", "threadgroup_barrier(); o[0] = 1;", "no matching function|too few arguments"),
    ("barrier under a lane", f"if (lane == 0) {{ {BARRIER} }} o[0] = 1;", "threadgroup_barrier under a condition"),
    ("barrier under a simdgroup", f"if (sg == 0) {{ {BARRIER} }} o[0] = 1;", "varies by simdgroup"),
    ("barrier in a lane's loop", f"for (uint e = lane; e < p.n; e += 32) {{ {BARRIER} }}", "varies by lane"),
    (
        "barrier after continue",
        f"for (uint e = 0; e < p.n; e++) {{ if (e == i) continue; {BARRIER} }}",
        "varies by lane",
    ),
    ("simd_sum under a lane", "float x = 1; if (lane < 8) x = simd_sum(x); o[0] = x;", "simd_sum under a condition"),
    ("by a variable", "const bool low = lane < 8; float x = 1; if (low) x = simd_sum(x); o[0] = x;", "simd_sum under"),
    (
        "barrier in a helper under a lane",
        f"inline void sync() {{ {BARRIER} }}\n===if (lane == 0) sync(); o[0] = 1;",
        "sync under a condition",
    ),
    (
        "lane given to a helper",
        "inline float sum(uint a, float x) { if (a < 8) x = simd_sum(x); return x; }\n===o[0] = sum(lane, 1);",
        "simd_sum under a condition that varies by lane",
    ),
    ("return before a barrier", f"if (i >= p.n) return; {BARRIER} o[0] = 1;", "threadgroup_barrier under a condition"),
    ("return before a reduction", "if (i >= p.n) return; o[0] = simd_sum(1.0f);", "simd_sum under a condition"),
    # Types
    (
        "atomic on a plain pointer",
        "atomic_fetch_add_explicit((device uint*)o, 1u, memory_order_relaxed);",
        "no matching",
    ),
    ("atomic order", "atomic_fetch_add_explicit((device atomic_uint*)o, 1u, memory_order_seq_cst);", "undeclared"),
    ("atomic of a short", "device atomic<short>* a = (device atomic<short>*)o; a->value = 1;", "atomic of int, uint"),
    ("simd_sum of bool", "o[0] = simd_sum(true);", "type not supported"),
    ("simd_sum of ulong", "o[0] = simd_sum((ulong)i);", "type not supported"),
    ("shuffle of a struct", "P q = p; q = simd_shuffle(q, 1); o[0] = q.s;", "type not supported"),
    ("integer matrix", "simdgroup_matrix<int, 8, 8> m; o[0] = m.thread_elements()[0];", "half, bfloat or float"),
    ("16x16 matrix", "simdgroup_matrix<float, 16, 16> m; o[0] = m.thread_elements()[0];", "8x8 only"),
    (
        "load of another type",
        "simdgroup_float8x8 m; simdgroup_load(m, (device const half*)h, 8);",
        "no matching function",
    ),
    ("store to constant", "simdgroup_float8x8 m; simdgroup_store(m, &p.s, 8);", "no matching function"),
    ("max of int and uint", "o[0] = max(1, i);", "ambiguous"),
    ("max of half and float", "half x = h[0].x; o[0] = max(x, 0.0f);", "ambiguous"),
    ("float4 from half4", "float4 v = h[0]; o[0] = v.x;", "cannot initialize|cannot convert"),
    ("float4 times half4", "o[0] = (float4(1) * h[0]).x;", "cannot convert between vector"),
    ("three components", "float4 v = float4(1, 2, 3); o[0] = v.x;", "wrong number of components"),
    ("float3 from float4", "float3 v = float4(1); o[0] = v.x;", "cannot initialize|cannot convert"),
    ("uint4 from int4", "uint4 v = int4(1); o[0] = v.x;", "cannot initialize"),
    ("float4 plus int4", "o[0] = (float4(1) + int4(1)).x;", "cannot convert between vector"),
    ("float4 plus uint4 compound", "float4 v = 1; v += uint4(1); o[0] = v.x;", "cannot convert between vector"),
    ("conversion in a scope", "struct Q { typedef float4 V; };\n===o[0] = Q::V(uint4(1)).x;", "through a scope"),
    ("as_type of another size", "o[0] = as_type<float>(ushort(1));", "different sizes"),
    ("missing return", "inline float g(uint i) { if (i) return 1; }===", "does not return a value"),
    ("uninitialised", "float x; o[0] = x;", "uninitialized"),
    ("unused", "float x = 1; o[0] = 1;", "unused variable"),
    # What a stranger got past it
    (
        "cast of a member's value",
        "struct B { device float* q; };\n"
        "===B b{o}; threadgroup float* q = (threadgroup float*)b.q; o[0] = q[0];",
        "reinterpret_cast from .* is not allowed",
    ),
    (
        "cast of a sum",
        "threadgroup float* q = (threadgroup float*)(1 + o); o[0] = q[0];",
        "reinterpret_cast from .* is not allowed",
    ),
    ("cast that drops const", "device half4* q = (device half4*)h; q[0] = half4(0);", "casts away qualifiers"),
    (
        "cast of a local variable's address",
        "device float* q = (device float*)&i; o[0] = q[0];",
        "reinterpret_cast from .* is not allowed",
    ),
    (
        "host name twice",
        "template <typename T> [[kernel]] void q(device T* a [[buffer(0)]]) { a[0] = T(1); }\n"
        'template [[host_name("q")]] [[kernel]] decltype(q<float>) q<float>;\n'
        'template [[host_name("q")]] [[kernel]] decltype(q<half>) q<half>;\n'
        "===",
        "another kernel of the name 'q'",
    ),
    (
        "kernel overloaded",
        "[[kernel]] void q(device int* a [[buffer(0)]]) { a[0] = 1; }\n"
        "[[kernel]] void q(device float* a [[buffer(0)]]) { a[0] = 1; }===",
        "another kernel of the name 'q'",
    ),
    (
        "simd_sum under a member",
        "P q; q.n = lane; q.s = 1; if (q.n > 3) q.s = simd_sum(q.s); o[0] = q.s;",
        "simd_sum under a condition that varies by lane",
    ),
    ("simd_sum under a whole", "P q; q.n = lane; P r = q; if (r.s > 3) o[0] = simd_sum(1.0f);", "varies by lane"),
    ("long long", "long long x = i; o[x] = 1;", "'long long' is not in Metal"),
    ("fragment as a name", "float fragment = 1; o[0] = fragment;", "'fragment' is not in Metal, or means"),
    (
        "structured binding",
        "struct A { float a, b; };\n"
        "===A x{1, 2}; auto [a, b] = x; o[0] = a + b;",
        r"C\+\+17 extension",
    ),
    (
        "nested namespace",
        "namespace a::b { constant float c = 1; }\n"
        "===o[0] = a::b::c;",
        r"C\+\+17 extension",
    ),
    ("if with a declaration", "if (uint k = i; k > 3) o[0] = 1;", r"C\+\+17 extension"),
    ("barrier under simd_is_first", f"if (simd_is_first()) {{ {BARRIER} }} o[0] = 1;", "varies by lane"),
    (
        "simd_sum under a prefix sum",
        "const uint k = simd_prefix_exclusive_sum(1u); float x = 1; if (k < 4) x = simd_sum(x); o[0] = x;",
        "simd_sum under a condition that varies by lane",
    ),
    (
        "barrier under an atomic's result",
        "threadgroup atomic_uint c; if (lane == 0) atomic_store_explicit(&c, 0u, memory_order_relaxed); "
        f"{BARRIER} const uint at = atomic_fetch_add_explicit(&c, 1u, memory_order_relaxed); "
        f"if (at < 3) {{ {BARRIER} }} o[0] = "
        "1;",
        "varies by lane",
    ),
    ("simd_sum in ?:", "o[0] = lane < 8 ? simd_sum(1.0f) : 0.0f;", "simd_sum under a condition"),
    ("simd_any behind &&", "if (lane < 8 && simd_any(p.n > i)) o[0] = 1;", "simd_any under a condition"),
    (
        "simd_any behind ||",
        "const bool b = lane < 8 || simd_any(p.n > i); o[0] = float(b);",
        "simd_any under a condition",
    ),
    (
        "first of two overloads",
        "inline float g(uint lane, float x) { if (lane < 3) x = simd_sum(x); return x; }\n"
        "inline float g(float x) { return x; }\n"
        "===o[0] = g(lane, 1.0f) + g(1.0f);",
        "simd_sum under a condition",
    ),
    (
        "barrier in a method under a lane",
        f"struct T {{ void sync() {{ {BARRIER} }} }};\n"
        "===T a; if (lane == 0) a.sync(); o[0] = 1;",
        "sync under a condition",
    ),
    (
        "return in a loop behind its barrier",
        f"for (uint e = 0; e < p.n; e++) {{ {BARRIER} if (e == i) return; }} o[0] = 1;",
        "threadgroup_barrier under a condition",
    ),
    ("return of a simdgroup before a barrier", f"if (sg == 1) return; {BARRIER} o[0] = 1;", "varies by simdgroup"),
    ("64 bits kept in 32", "uint at = ulong(p.n) * i; o[at] = 1;", "loses integer precision"),
    ("32 bits kept in 16", "ushort at = p.n * i; o[at] = 1;", "loses integer precision"),
    ("float kept in an integer", "uint at = p.s; o[at] = 1;", "turns floating-point number into integer"),
    ("comparison of int and uint", "int a = int(i) - 5; if (a < p.n) o[i] = 1;", "different signs"),
    ("uint not below 0", "for (uint a = p.n; a >= 0; a--) o[a] = 1;", "always true"),
    (
        "atomic_float in threadgroup memory",
        "threadgroup atomic_float a; atomic_fetch_add_explicit(&a, 1.0f, memory_order_relaxed); o[0] = 1;",
        "device memory only",
    ),
    (
        "maximum of atomic_float",
        "atomic_fetch_max_explicit((device atomic_float*)o, 1.0f, memory_order_relaxed);",
        "no matching",
    ),
    ("simd_sum of bfloat", "o[0] = float(simd_sum(bfloat(1.0f)));", "type not supported"),
    ("exp of bfloat", "o[0] = float(exp(bfloat(1.0f)));", "deleted function"),
    ("max of bfloat", "o[0] = float(max(bfloat(1.0f), bfloat(2.0f)));", "deleted function"),
    (
        "cast to a type in a scope",
        "struct Q { typedef float4 V; };\n"
        "===o[0] = ((Q::V)uint4(1)).x;",
        "through a scope",
    ),
    (
        "lookup table of a function's own",
        "const float table[4] = {1, 2, 3, 4}; o[0] = table[i & 3];",
        "constant table 'table' indexed by 'i'",
    ),
    (
        "lookup table of two dimensions",
        "constant float table[2][4] = {{1, 2, 3, 4}, {1,2,3,4}};\n"
        "===o[0] = table[0][i & 3];",
        "constant table 'table' indexed by 'i'",
    ),
    (
        "lookup table given to a helper",
        "constant float table[4] = {1, 2, 3, 4};\n"
        "inline float at(constant float* q, uint i) { return q[i]; }\n"
        "===o[0] = at(table, i);",
        "taken as a pointer",
    ),
    (
        "arithmetic on a reference to half4",
        "inline float g(thread const half4& a) { return float(a.x * a.y); }\n"
        "===half4 v = h[0]; o[0] = g(v);",
        "narrow parameter 'a'",
    ),
    (
        "arithmetic on what may be a half",
        "template <typename T> inline T g(T a) { return a * a; }\n"
        "===o[0] = float(g(h[0].x));",
        "narrow parameter 'a'",
    ),
    # Rules of the house
    ("arithmetic on a half", "inline half g(half a) { return a * a; }===", "narrow parameter 'a'"),
    ("arithmetic on a half4", "inline float g(half4 a) { return float(a.x + a.y); }===", "narrow parameter 'a'"),
    ("arithmetic on a bfloat", "inline float g(bfloat a) { return 2.0f * a; }===", "narrow parameter 'a'"),
    (
        "lookup table",
        "constant float table[4] = {1, 2, 3, 4};\n===o[0] = table[i & 3];",
        "constant table 'table' indexed by 'i'",
    ),
    ("unbalanced", "o[0] = (1;", "without its opening bracket|never closed"),
]

REDUCE = """#include <metal_stdlib>
using namespace metal;
struct Args { uint n; float scale; };
constant bool has_bias [[function_constant(0)]];
constant uint given_width [[function_constant(1)]];
constant uint width = is_function_constant_defined(given_width) ? given_width : 8;
constant float signs[2] = {1.0f, -1.0f};
template <typename T> inline T narrow(float x) { return T(x); }
inline float wide(half x) { return float(x); }
template <typename T, uint SIZE>
[[kernel]] void f(device const T* x [[buffer(0)]], device T* y [[buffer(1)]], constant Args& args [[buffer(2)]],
    device const float* bias [[buffer(3), function_constant(has_bias)]], threadgroup float* shared [[threadgroup(0)]],
    uint tid [[thread_index_in_threadgroup]], uint3 tg [[threadgroup_position_in_grid]],
    ushort lane [[thread_index_in_simdgroup]], ushort sg [[simdgroup_index_in_threadgroup]]) {
  threadgroup float partial[SIZE / 32];
  const Args copy = args;
  float4 v = float4(1.0, 2.0h, float2(3, 4));
  half4 h = half4(v);
  float s = 0.0f;
  for (uint i = tid; i < args.n; i += SIZE) s += float(x[i]) * signs[0] + dot(v, float4(h)) + wide(h.x) + float(width);
  s = simd_sum(s);
  if (tid == 0) shared[0] = 1.0f;
  if (lane == 0) partial[sg] = s;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (sg == 0) {
    s = simd_max(lane < SIZE / 32 ? partial[lane] : 0.0f);
    if (lane == 0) y[tg.x] = narrow<T>(s + shared[0] + (has_bias ? bias[0] : 0.0f) + copy.scale);
  }
}
template [[host_name("f_half")]] [[kernel]] decltype(f<half, 64>) f<half, 64>;
template [[host_name("f_float")]] [[kernel]] void f<float, 64>(device const float*, device float*, constant Args&,
    device const float*, threadgroup float*, uint, uint3, ushort, ushort);
"""
MATRIX = """#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;
template <typename T>
kernel void product(device const T* a, device const T* b, device float* c, device atomic_uint* count,
                    uint tid [[thread_index_in_threadgroup]]) {
  threadgroup T tile[64];
  for (uint i = tid; i < 64; i += 32) tile[i] = a[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_matrix<T, 8, 8> x, y;
  simdgroup_float8x8 sum = make_filled_simdgroup_matrix<float, 8>(0.0f);
  simdgroup_load(x, tile, 8);
  simdgroup_load(y, b, 8, ulong2(0, 0), true);
  simdgroup_multiply_accumulate(sum, x, y, sum);
  simdgroup_store(sum, c, 8);
  atomic_fetch_add_explicit(count, 1u, memory_order_relaxed);
}
template [[host_name("product_f16")]] [[kernel]] decltype(product<half>) product<half>;
template [[host_name("product_bf16")]] [[kernel]] decltype(product<bfloat>) product<bfloat>;
template [[host_name("product_f32")]] [[kernel]] decltype(product<float>) product<float>;
"""
VECTORS = """#include <metal_stdlib>
using namespace metal;
template <typename V> inline V to(uint4 x) { return V(x); }
[[kernel]] void g(device const packed_uint4* w [[buffer(0)]], device float* y [[buffer(1)]],
                  uint i [[thread_position_in_grid]]) {
  const uint4 q = w[i];
  const float4 f = (float4)(q & 15u) + to<float4>(q >> 4) + static_cast<float4>(q >> 28);
  const vec<half, 4> n = vec<half, 4>(f);
  const half2 pair = as_type<half2>(q.x);
  using V = vec<float, 4>;
  const V local = V(q >> 24) + (V)q;
  const float4 big = local + select(f, float4(0.0f), f > 4.0f);
  device float4* out = (device float4*)y;
  out[i] = fma(f, float4(n), clamp(big, 0.0f, 1.0f)) + float(pair.x) + precise::exp(-f) * rsqrt(max(f, 1e-6f));
  if (any(f > 3.0f) && popcount(q.x) > ctz(q.y)) y[0] = -INFINITY;
}
"""
ONLINE = """#include <metal_stdlib>
using namespace metal;
constant ushort rows [[function_constant(0)]];
constant bool with_bias [[function_constant(1)]];
constant bool wide = rows > 4 && with_bias;
enum class Kind : uint { mx = 0, nv = 1 };
namespace online {
struct Args { uint columns; float scale; };
static_assert(sizeof(Args) == 8, "mirrored by the host");
struct State { float most; float sum; };
template <typename T> METAL_FUNC float load(device const T* p, uint i) { return float(p[i]); }
template <typename T, short N> inline void fill(thread T (&a)[N], T x) { for (short i = 0; i < N; i++) a[i] = x; }
inline void update(thread State& state, float x) {
  const float most = max(state.most, x);
  state = State{most, state.sum * exp(state.most - most) + metal::exp(x - most)};
}
}  // namespace online
using namespace online;
template <typename T, ushort SIMDGROUPS>
[[kernel, max_total_threads_per_threadgroup(SIMDGROUPS * 32)]] void softmax(
    device const T* x [[buffer(0)]], device T* y [[buffer(1)]], constant Args& args [[buffer(2)]],
    device const float* bias [[buffer(3), function_constant(with_bias)]], uint tg [[threadgroup_position_in_grid]],
    ushort tid [[thread_index_in_threadgroup]], ushort lane [[thread_index_in_simdgroup]],
    ushort sg [[simdgroup_index_in_threadgroup]], ushort sgs [[simdgroups_per_threadgroup]]) {
  threadgroup float partial[SIMDGROUPS][2];
  device const T* row = x + tg * args.columns;
  State state = {-INFINITY, 0.0f};
#pragma unroll
  for (uint i = tid; i < args.columns; i += SIMDGROUPS * 32) update(state, load(row, i) * args.scale);
  const float most = simd_max(state.most);
  const float sum = simd_sum(state.sum * exp(state.most - most));
  if (lane == 0) { partial[sg][0] = most; partial[sg][1] = sum; }
  threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
  float all = -numeric_limits<float>::infinity(), totals[1];
  fill(totals, 0.0f);
  for (ushort s = 0; s < sgs; s++) all = max(all, partial[s][0]);
  for (ushort s = 0; s < sgs; s++) totals[0] += partial[s][1] * precise::exp(partial[s][0] - all);
  for (uint i = tid; i < args.columns; i += SIMDGROUPS * 32) {
    const float shift = with_bias || wide ? bias[i] : 0.0f;
    y[tg * args.columns + i] = T(exp(load(row, i) * args.scale - all) / totals[0] + shift);
  }
}
#define INSTANTIATE(NAME, T) template [[host_name(NAME)]] [[kernel]] decltype(softmax<T, 2>) softmax<T, 2>;
INSTANTIATE("softmax", float)
INSTANTIATE("softmax" "_bf16", bfloat)
"""
ACCEPTED = [("online", ONLINE), ("reduction", REDUCE), ("matrices", MATRIX), ("vectors", VECTORS)]
