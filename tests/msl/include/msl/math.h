// <metal_math>, <metal_geometric> and the arithmetic part of <metal_common>.
//
// Concrete overloads for each type, as in Metal, so that a call with mixed types is ambiguous there and here. half is
// computed in float and rounded once; vectors go by component. Metal has none of these for bfloat.
#pragma once

namespace metal {
#define MSL_FOR_SIZES(MAKE, NAME, T) MAKE(NAME, T, 2) MAKE(NAME, T, 3) MAKE(NAME, T, 4)
#define MSL_COMPONENTS1(NAME, T, N)                        \
  MSL_FN T##N NAME(T##N x) {                               \
    T##N r = {};                                           \
    for (int i = 0; i < N; i++) r[i] = NAME(T(x[i]));      \
    return r;                                              \
  }
#define MSL_COMPONENTS2(NAME, T, N)                              \
  MSL_FN T##N NAME(T##N x, T##N y) {                             \
    T##N r = {};                                                 \
    for (int i = 0; i < N; i++) r[i] = NAME(T(x[i]), T(y[i]));   \
    return r;                                                    \
  }
#define MSL_COMPONENTS3(NAME, T, N)                                       \
  MSL_FN T##N NAME(T##N x, T##N y, T##N z) {                              \
    T##N r = {};                                                          \
    for (int i = 0; i < N; i++) r[i] = NAME(T(x[i]), T(y[i]), T(z[i]));   \
    return r;                                                             \
  }

// Functions of one float. E is an expression in x.
#define MSL_FLOAT1(NAME, E)                                                  \
  MSL_FN float NAME(float x) { return E; }                                   \
  MSL_FN half NAME(half narrow) { float x = float(narrow); return half(E); } \
  bfloat NAME(bfloat) = delete;                                              \
  MSL_FOR_SIZES(MSL_COMPONENTS1, NAME, float) MSL_FOR_SIZES(MSL_COMPONENTS1, NAME, half)
MSL_FLOAT1(exp, libm::exp(x))
MSL_FLOAT1(exp2, libm::exp2(x))
MSL_FLOAT1(exp10, libm::pow(10.0f, x))
MSL_FLOAT1(log, libm::log(x))
MSL_FLOAT1(log2, libm::log2(x))
MSL_FLOAT1(log10, libm::log10(x))
MSL_FLOAT1(sqrt, __builtin_sqrtf(x))
MSL_FLOAT1(rsqrt, 1.0f / __builtin_sqrtf(x))
MSL_FLOAT1(sin, libm::sin(x))
MSL_FLOAT1(cos, libm::cos(x))
MSL_FLOAT1(tan, libm::tan(x))
MSL_FLOAT1(sinh, libm::sinh(x))
MSL_FLOAT1(cosh, libm::cosh(x))
MSL_FLOAT1(tanh, libm::tanh(x))
MSL_FLOAT1(fabs, __builtin_fabsf(x))
MSL_FLOAT1(floor, __builtin_floorf(x))
MSL_FLOAT1(ceil, __builtin_ceilf(x))
MSL_FLOAT1(round, __builtin_roundf(x))
MSL_FLOAT1(rint, __builtin_rintf(x))
MSL_FLOAT1(trunc, __builtin_truncf(x))
MSL_FLOAT1(fract, x - __builtin_floorf(x))
MSL_FLOAT1(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f))
MSL_FLOAT1(sign, float((x > 0.0f) - (x < 0.0f)))

// Functions of two floats. E is an expression in x and y.
#define MSL_FLOAT2(NAME, E)                                                                        \
  MSL_FN float NAME(float x, float y) { return E; }                                                \
  MSL_FN half NAME(half a, half b) { float x = float(a), y = float(b); return half(E); }           \
  bfloat NAME(bfloat, bfloat) = delete;                                                            \
  MSL_FOR_SIZES(MSL_COMPONENTS2, NAME, float) MSL_FOR_SIZES(MSL_COMPONENTS2, NAME, half)
MSL_FLOAT2(pow, libm::pow(x, y))
MSL_FLOAT2(powr, libm::pow(x, y))
MSL_FLOAT2(fmod, libm::fmod(x, y))
MSL_FLOAT2(atan2, libm::atan2(x, y))
MSL_FLOAT2(copysign, __builtin_copysignf(x, y))
MSL_FLOAT2(divide, x / y)
MSL_FLOAT2(step, y < x ? 0.0f : 1.0f)
MSL_FLOAT2(fmin, __builtin_fminf(x, y))
MSL_FLOAT2(fmax, __builtin_fmaxf(x, y))
MSL_FLOAT2(min, __builtin_fminf(x, y))
MSL_FLOAT2(max, __builtin_fmaxf(x, y))

#define MSL_FLOAT3(NAME, E)                                                                                    \
  MSL_FN float NAME(float x, float y, float z) { return E; }                                                   \
  MSL_FN half NAME(half a, half b, half c) { float x = float(a), y = float(b), z = float(c); return half(E); } \
  bfloat NAME(bfloat, bfloat, bfloat) = delete;                                                                \
  MSL_FOR_SIZES(MSL_COMPONENTS3, NAME, float) MSL_FOR_SIZES(MSL_COMPONENTS3, NAME, half)
MSL_FLOAT3(fma, __builtin_fmaf(x, y, z))
MSL_FLOAT3(mix, x + (y - x) * z)
MSL_FLOAT3(clamp, __builtin_fminf(__builtin_fmaxf(x, y), z))

#define MSL_INTEGERS(MAKE) \
  MAKE(char) MAKE(uchar) MAKE(short) MAKE(ushort) MAKE(int) MAKE(uint) MAKE(long) MAKE(ulong)
#define MSL_INTEGER_ORDER(T)                                                                            \
  MSL_FN T min(T x, T y) { return y < x ? y : x; }                                                      \
  MSL_FN T max(T x, T y) { return x < y ? y : x; }                                                      \
  MSL_FN T clamp(T x, T low, T high) { return min(max(x, low), high); }                                 \
  MSL_FN T abs(T x) { return x < T(0) ? T(-x) : x; }                                                    \
  MSL_FOR_SIZES(MSL_COMPONENTS2, min, T) MSL_FOR_SIZES(MSL_COMPONENTS2, max, T)                         \
  MSL_FOR_SIZES(MSL_COMPONENTS3, clamp, T) MSL_FOR_SIZES(MSL_COMPONENTS1, abs, T)
MSL_INTEGERS(MSL_INTEGER_ORDER)
MSL_FLOAT1(abs, __builtin_fabsf(x))

template <class T>
MSL_FN T min3(T x, T y, T z) {
  return min(x, min(y, z));
}
template <class T>
MSL_FN T max3(T x, T y, T z) {
  return max(x, max(y, z));
}

MSL_FN float sincos(float x, float& cosine) {
  cosine = cos(x);
  return sin(x);
}
MSL_FN float ldexp(float x, int exponent) { return __builtin_ldexpf(x, exponent); }
MSL_FN half ldexp(half x, int exponent) { return half(__builtin_ldexpf(float(x), exponent)); }

#define MSL_DOT(NAME, T, N)                                  \
  MSL_FN T NAME(T##N x, T##N y) {                            \
    T sum = x[0] * y[0];                                     \
    for (int i = 1; i < N; i++) sum += x[i] * y[i];          \
    return sum;                                              \
  }
MSL_FOR_SIZES(MSL_DOT, dot, float)
MSL_FOR_SIZES(MSL_DOT, dot, half)

#define MSL_VARIANTS                                                                                                  \
  using metal::exp, metal::exp2, metal::exp10, metal::log, metal::log2, metal::log10, metal::sqrt, metal::rsqrt,      \
      metal::sin, metal::cos, metal::tan, metal::sinh, metal::cosh, metal::tanh, metal::floor, metal::ceil,           \
      metal::round, metal::rint, metal::trunc, metal::fract, metal::pow, metal::powr, metal::fmod, metal::divide,     \
      metal::fmin, metal::fmax, metal::min, metal::max, metal::clamp, metal::fma, metal::abs, metal::fabs;
namespace precise {
MSL_VARIANTS
}
namespace fast {
MSL_VARIANTS
}
}  // namespace metal
