// <metal_atomic>: relaxed atomics in device and threadgroup memory; of floats in device memory only (mslc/lint.py).
#pragma once

namespace metal {
enum memory_order { memory_order_relaxed };

template <class T>
struct atomic {
  static_assert(is_same_v<T, int> || is_same_v<T, uint> || is_same_v<T, float>, "atomic of int, uint or float");
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;

template <class T>
using Plain = typename type_identity<T>::type;  // not deduced: the atomic's type decides

#define MSL_ATOMIC_PLAIN(SPACE)                                                                          \
  template <class T>                                                                                     \
  MSL_FN T atomic_load_explicit(const volatile SPACE atomic<T>* object, memory_order)                    \
      MSL_BODY(T result; __atomic_load(&object->value, &result, __ATOMIC_RELAXED); return result;)       \
  template <class T>                                                                                     \
  MSL_FN void atomic_store_explicit(volatile SPACE atomic<T>* object, Plain<T> operand, memory_order)    \
      MSL_BODY(__atomic_store(&object->value, &operand, __ATOMIC_RELAXED);)                              \
  template <class T>                                                                                     \
  MSL_FN bool atomic_compare_exchange_weak_explicit(volatile SPACE atomic<T>* object, T* expected,       \
                                                    Plain<T> operand, memory_order, memory_order)        \
      MSL_BODY(return __atomic_compare_exchange(&object->value, expected, &operand, true,                \
                                                __ATOMIC_RELAXED, __ATOMIC_RELAXED);)
MSL_FOR_WRITABLE(MSL_ATOMIC_PLAIN)

// Read, change, write. E is an expression in `old` and `operand`; NUMBER says of which T.
#define MSL_ATOMIC_CHANGE(SPACE, NAME, NUMBER, E)                                                        \
  template <class T, class = enable_if_t<NUMBER<T>>>                                                     \
  MSL_FN T NAME(volatile SPACE atomic<T>* object, Plain<T> operand, memory_order)                        \
      MSL_BODY(T old; __atomic_load(&object->value, &old, __ATOMIC_RELAXED); T changed;                  \
               do { changed = T(E); } while (!__atomic_compare_exchange(                                 \
                   &object->value, &old, &changed, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));           \
               return old;)
#define MSL_ATOMIC_CHANGES(SPACE)                                                            \
  MSL_ATOMIC_CHANGE(SPACE, atomic_exchange_explicit, is_arithmetic_v, operand)               \
  MSL_ATOMIC_CHANGE(SPACE, atomic_fetch_add_explicit, is_arithmetic_v, old + operand)        \
  MSL_ATOMIC_CHANGE(SPACE, atomic_fetch_sub_explicit, is_arithmetic_v, old - operand)        \
  MSL_ATOMIC_CHANGE(SPACE, atomic_fetch_min_explicit, is_integral_v, min(old, operand))      \
  MSL_ATOMIC_CHANGE(SPACE, atomic_fetch_max_explicit, is_integral_v, max(old, operand))      \
  MSL_ATOMIC_CHANGE(SPACE, atomic_fetch_and_explicit, is_integral_v, old & operand)          \
  MSL_ATOMIC_CHANGE(SPACE, atomic_fetch_or_explicit, is_integral_v, old | operand)           \
  MSL_ATOMIC_CHANGE(SPACE, atomic_fetch_xor_explicit, is_integral_v, old ^ operand)
MSL_FOR_WRITABLE(MSL_ATOMIC_CHANGES)
}  // namespace metal
