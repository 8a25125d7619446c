// <metal_relational>. A comparison of vectors gives integers here (0 or -1), where Metal gives a vector of bool.
#pragma once

namespace metal {
#define MSL_CLASSIFY(T)                                                        \
  MSL_FN bool isnan(T x) { return __builtin_isnan(float(x)); }                 \
  MSL_FN bool isinf(T x) { return __builtin_isinf(float(x)); }                 \
  MSL_FN bool isfinite(T x) { return __builtin_isfinite(float(x)); }           \
  MSL_FN bool signbit(T x) { return __builtin_signbit(float(x)); }
MSL_CLASSIFY(float)
MSL_CLASSIFY(half)
MSL_CLASSIFY(bfloat)

MSL_FN bool any(bool x) { return x; }
MSL_FN bool all(bool x) { return x; }
template <class V>
MSL_FN bool any(V mask) {
  static_assert(elements<V>::is_vector && is_integral_v<typename elements<V>::type>, "any of a comparison");
  bool result = false;
  for (int i = 0; i < elements<V>::count; i++) result |= mask[i] != 0;
  return result;
}
template <class V>
MSL_FN bool all(V mask) {
  static_assert(elements<V>::is_vector && is_integral_v<typename elements<V>::type>, "all of a comparison");
  bool result = true;
  for (int i = 0; i < elements<V>::count; i++) result &= mask[i] != 0;
  return result;
}

// b where the condition holds, else a.
template <class T, class Condition>
MSL_FN T select(T a, T b, Condition condition) {
  if constexpr (elements<Condition>::is_vector) {
    static_assert(elements<Condition>::count == elements<T>::count, "select: another number of components");
    static_assert(is_integral_v<typename elements<Condition>::type>, "select by a comparison");
    T result = {};
    for (int i = 0; i < elements<T>::count; i++) result[i] = condition[i] != 0 ? b[i] : a[i];
    return result;
  } else {
    return static_cast<bool>(condition) ? b : a;
  }
}
}  // namespace metal
