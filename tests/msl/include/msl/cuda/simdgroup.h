// <metal_simdgroup> as shuffles among the 32 threads of a warp, all of which take part.
#pragma once

namespace metal {
// A shuffle of words, for a value of any size.
template <class T, class Shuffle>
MSL_FN T by_words(T value, Shuffle shuffle) {
  constexpr int count = (sizeof(T) + 3) / 4;
  int words[count] = {};
  __builtin_memcpy(words, &value, sizeof(T));
  for (int i = 0; i < count; i++) words[i] = shuffle(words[i]);
  __builtin_memcpy(&value, words, sizeof(T));
  return value;
}
template <class T>
MSL_FN T take(T value, uint from) {
  return by_words(value, [from](int word) { return __nvvm_shfl_sync_idx_i32(~0u, word, from, 31); });
}
template <class T>
MSL_FN T across(T value, uint apart) {
  return by_words(value, [apart](int word) { return __nvvm_shfl_sync_bfly_i32(~0u, word, apart, 31); });
}

#define MSL_REDUCTION(NAME, E)                          \
  template <class T>                                    \
  MSL_FN T NAME(T a) {                                  \
    _Pragma("unroll") for (uint apart = 1; apart < 32; apart *= 2) { \
      T b = across(a, apart);                           \
      a = T(E);                                         \
    }                                                   \
    return a;                                           \
  }
MSL_REDUCTION(simd_sum, a + b)
MSL_REDUCTION(simd_product, a * b)
MSL_REDUCTION(simd_min, min(a, b))
MSL_REDUCTION(simd_max, max(a, b))
MSL_REDUCTION(simd_and, a & b)
MSL_REDUCTION(simd_or, a | b)
MSL_REDUCTION(simd_xor, a ^ b)

// Lanes without a source keep their own value.
#define MSL_SHUFFLE(NAME, FROM)            \
  template <class T>                       \
  MSL_FN T NAME(T value, ushort by) {      \
    const int lane = int(msl::lane());     \
    return take(value, uint(FROM));        \
  }
MSL_SHUFFLE(simd_shuffle, by + 0 * lane)
MSL_SHUFFLE(simd_shuffle_xor, lane ^ by)
MSL_SHUFFLE(simd_shuffle_down, lane + by < 32 ? lane + by : lane)
MSL_SHUFFLE(simd_shuffle_up, lane >= by ? lane - by : lane)
MSL_SHUFFLE(simd_shuffle_rotate_down, (lane + by) & 31)
MSL_SHUFFLE(simd_shuffle_rotate_up, (lane - by) & 31)
template <class T>
MSL_FN T simd_shuffle_and_fill_down(T value, T filling, ushort by) {
  const T taken = simd_shuffle_rotate_down(value, by);
  return msl::lane() + by < 32 ? taken : filling;
}
template <class T>
MSL_FN T simd_shuffle_and_fill_up(T value, T filling, ushort by) {
  const T taken = simd_shuffle_rotate_up(value, by);
  return msl::lane() >= by ? taken : filling;
}
template <class T>
MSL_FN T simd_broadcast(T value, ushort from) {
  return take(value, from);
}
template <class T>
MSL_FN T simd_broadcast_first(T value) {
  return take(value, 0);
}

template <class T>
MSL_FN T simd_prefix_inclusive_sum(T value) {
  _Pragma("unroll") for (uint apart = 1; apart < 32; apart *= 2) {
    const T before = take(value, (msl::lane() - apart) & 31);
    if (msl::lane() >= apart) value = T(value + before);
  }
  return value;
}
template <class T>
MSL_FN T simd_prefix_exclusive_sum(T value) {
  const T before = take(simd_prefix_inclusive_sum(value), (msl::lane() - 1) & 31);
  return msl::lane() == 0 ? T(0) : before;
}

struct simd_vote {
  typedef ulong vote_t;
  vote_t lanes;
  explicit MSL_FN operator vote_t() const { return lanes; }
};
MSL_FN simd_vote simd_ballot(bool value) { return simd_vote{uint(__nvvm_vote_ballot_sync(~0u, value))}; }
MSL_FN bool simd_any(bool value) { return __nvvm_vote_any_sync(~0u, value); }
MSL_FN bool simd_all(bool value) { return __nvvm_vote_all_sync(~0u, value); }
MSL_FN bool simd_is_first() { return msl::lane() == 0; }
}  // namespace metal
