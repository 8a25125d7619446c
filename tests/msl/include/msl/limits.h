// <metal_limits>: numeric_limits.
#pragma once

namespace metal {
template <class T>
struct numeric_limits;

#define MSL_FLOAT_LIMITS(T, MIN, MAX, EPSILON)                                \
  template <>                                                                 \
  struct numeric_limits<T> {                                                  \
    static constexpr T min() { return T(MIN); }                               \
    static constexpr T max() { return T(MAX); }                               \
    static constexpr T lowest() { return T(-(MAX)); }                         \
    static constexpr T epsilon() { return T(EPSILON); }                       \
    static constexpr T infinity() { return T(__builtin_inff()); }             \
    static constexpr T quiet_NaN() { return T(__builtin_nanf("")); }          \
  };
MSL_FLOAT_LIMITS(float, FLT_MIN, FLT_MAX, FLT_EPSILON)
MSL_FLOAT_LIMITS(half, 6.103515625e-05f, 65504.0f, 0.0009765625f)
MSL_FLOAT_LIMITS(bfloat, FLT_MIN, 3.38953139e+38f, 0.0078125f)

#define MSL_INTEGER_LIMITS(T, MIN, MAX)            \
  template <>                                      \
  struct numeric_limits<T> {                       \
    static constexpr T min() { return T(MIN); }    \
    static constexpr T max() { return T(MAX); }    \
    static constexpr T lowest() { return T(MIN); } \
  };
MSL_INTEGER_LIMITS(char, -128, 127)
MSL_INTEGER_LIMITS(uchar, 0, 255)
MSL_INTEGER_LIMITS(short, -32768, 32767)
MSL_INTEGER_LIMITS(ushort, 0, 65535)
MSL_INTEGER_LIMITS(int, INT_MIN, INT_MAX)
MSL_INTEGER_LIMITS(uint, 0, UINT_MAX)
MSL_INTEGER_LIMITS(long, (-0x7fffffffffffffffl - 1), 0x7fffffffffffffffl)
MSL_INTEGER_LIMITS(ulong, 0, ~0ul)
}  // namespace metal
