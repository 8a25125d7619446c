// <metal_type_traits>, as far as templates over element types need it, and what the shim asks about vectors.
#pragma once

namespace metal {
template <class T, T Value>
struct integral_constant {
  static constexpr T value = Value;
};
template <bool B>
using bool_constant = integral_constant<bool, B>;
typedef bool_constant<true> true_type;
typedef bool_constant<false> false_type;

template <class A, class B>
struct is_same : false_type {};
template <class A>
struct is_same<A, A> : true_type {};
template <class A, class B>
constexpr bool is_same_v = is_same<A, B>::value;

template <bool B, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;

template <bool B, class T, class F>
struct conditional {
  typedef T type;
};
template <class T, class F>
struct conditional<false, T, F> {
  typedef F type;
};
template <bool B, class T, class F>
using conditional_t = typename conditional<B, T, F>::type;

template <class T>
struct type_identity {
  typedef T type;
};

template <class T>
constexpr bool is_floating_point_v = is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>;
template <class T>
struct is_floating_point : bool_constant<is_floating_point_v<T>> {};
template <class T>
constexpr bool is_integral_v = __is_integral(T);
template <class T>
struct is_integral : bool_constant<is_integral_v<T>> {};
template <class T>
constexpr bool is_arithmetic_v = is_integral_v<T> || is_floating_point_v<T>;
template <class T>
struct is_arithmetic : bool_constant<is_arithmetic_v<T>> {};

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

// The element type and the number of elements of a vector; 1 for a scalar.
template <class T>
struct elements {
  typedef T type;
  static constexpr int count = 1;
  static constexpr bool is_vector = false;
};
template <class T, int N>
struct elements<T __attribute__((ext_vector_type(N)))> {
  typedef T type;
  static constexpr int count = N;
  static constexpr bool is_vector = true;
};

template <class... T>
constexpr unsigned long total_size() {
  return (0 + ... + ((sizeof(T) + 15) / 16 * 16));
}
}  // namespace metal
