// <metal_integer>: bit operations.
#pragma once

namespace metal {
#define MSL_BITS(T) (int(sizeof(T)) * 8)

template <class T>
MSL_FN T popcount(T x) {
  static_assert(is_integral_v<T>, "popcount of a scalar integer");
  return T(__builtin_popcountll(ulong(x) << (64 - MSL_BITS(T))));
}
template <class T>
MSL_FN T clz(T x) {
  static_assert(is_integral_v<T>, "clz of a scalar integer");
  return x == T(0) ? T(MSL_BITS(T)) : T(__builtin_clzll(ulong(x) << (64 - MSL_BITS(T))));
}
template <class T>
MSL_FN T ctz(T x) {
  static_assert(is_integral_v<T>, "ctz of a scalar integer");
  return x == T(0) ? T(MSL_BITS(T)) : T(__builtin_ctzll(ulong(x)));
}
template <class T>
MSL_FN T reverse_bits(T x) {
  static_assert(is_integral_v<T>, "reverse_bits of a scalar integer");
  return T(__builtin_bitreverse64(ulong(x)) >> (64 - MSL_BITS(T)));
}
template <class T>
MSL_FN T rotate(T x, T count) {
  static_assert(is_integral_v<T>, "rotate of a scalar integer");
  ulong bits = ulong(x) << (64 - MSL_BITS(T)) >> (64 - MSL_BITS(T));
  int by = int(count & T(MSL_BITS(T) - 1));
  return by == 0 ? x : T(bits << by | bits >> (MSL_BITS(T) - by));
}
template <class T>
MSL_FN T extract_bits(T x, uint offset, uint bits) {
  static_assert(is_integral_v<T>, "extract_bits of a scalar integer");
  if (bits == 0) return T(0);
  T top = T(ulong(x) << (MSL_BITS(T) - offset - bits));
  return T(top >> (MSL_BITS(T) - bits));  // arithmetic for signed types: the field is sign-extended
}
template <class T>
MSL_FN T insert_bits(T base, T insert, uint offset, uint bits) {
  static_assert(is_integral_v<T>, "insert_bits of a scalar integer");
  ulong mask = (bits >= 64 ? ~0ul : (1ul << bits) - 1) << offset;
  return T((ulong(base) & ~mask) | (ulong(insert) << offset & mask));
}
MSL_FN uint mulhi(uint x, uint y) { return uint(ulong(x) * y >> 32); }
MSL_FN int mulhi(int x, int y) { return int(long(x) * y >> 32); }
}  // namespace metal
