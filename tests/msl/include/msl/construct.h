// Constructors, conversions and as_type. The rewriter turns `float4(...)`, `vec<T, 4>(...)`, `(half4)x`, `T(x)` of a
// template parameter and `static_cast<half4>(x)` into metal::construct: clang would take the last component, or the
// bits.
#pragma once

namespace metal {
template <class To, class From>
constexpr MSL_FN To convert(From value) {
  constexpr bool between_halves = (is_same_v<To, half> && is_same_v<From, bfloat>) ||
                                  (is_same_v<To, bfloat> && is_same_v<From, half>);
  if constexpr (between_halves) {
    return static_cast<To>(static_cast<float>(value));  // clang has no direct conversion
  } else {
    return static_cast<To>(value);
  }
}

template <class V, class Part>
constexpr MSL_FN void append(V& vector, int& at, Part part) {
  typedef typename elements<V>::type Element;
  if constexpr (elements<Part>::is_vector) {
    for (int i = 0; i < elements<Part>::count; i++) vector[at++] = convert<Element>(part[i]);
  } else {
    vector[at++] = convert<Element>(part);
  }
}

template <class V>
constexpr MSL_FN V construct() {
  return V{};
}

template <class V, class A>
constexpr MSL_FN V construct(A value) {
  if constexpr (!elements<V>::is_vector) {
    static_assert(!elements<A>::is_vector, "a scalar from a vector");
    return convert<V>(value);
  } else if constexpr (!elements<A>::is_vector) {
    return (V)(convert<typename elements<V>::type>(value));
  } else {
    static_assert(elements<A>::count == elements<V>::count, "vector constructor: another number of components");
    V result = {};
    int at = 0;
    append(result, at, value);
    return result;
  }
}

template <class V, class A, class B, class... Rest>
constexpr MSL_FN V construct(A first, B second, Rest... rest) {
  if constexpr (!elements<V>::is_vector) {
    return V(first, second, rest...);
  } else {
    constexpr int given = elements<A>::count + elements<B>::count + (0 + ... + elements<Rest>::count);
    static_assert(given == elements<V>::count, "vector constructor: wrong number of components");
    typedef typename elements<V>::type Element;
    if constexpr (given == 2 + sizeof...(Rest)) {
      return V{convert<Element>(first), convert<Element>(second), convert<Element>(rest)...};
    } else {
      V result = {};
      int at = 0;
      append(result, at, first);
      append(result, at, second);
      (append(result, at, rest), ...);
      return result;
    }
  }
}

template <class To, class From>
constexpr MSL_FN To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as_type between types of different sizes");
  return __builtin_bit_cast(To, value);
}
// What Metal leaves undefined: NaN, or the largest integer.
template <class T>
MSL_FN void poison(T& value) {
  __builtin_memset(&value, 0xFF, sizeof(T));
}
}  // namespace metal

using metal::as_type;
