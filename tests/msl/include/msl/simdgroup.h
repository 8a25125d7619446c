// <metal_simdgroup>: reductions, prefix sums, shuffles, broadcasts, votes.
//
// Every lane leaves its operand with the simdgroup; the last one to arrive computes the results of all.
#pragma once

namespace metal {
template <class T>
MSL_FN T operand_of(msl::Simdgroup& group, uint lane) {
  T value;
  __builtin_memcpy(&value, msl::operand(group, lane), sizeof(T));
  return value;
}
template <class T>
MSL_FN void set_result(msl::Simdgroup& group, uint lane, T value) {
  __builtin_memcpy(msl::result(group, lane), &value, sizeof(T));
}
template <class F>
MSL_FN void for_lanes(msl::Simdgroup& group, F f) {
  for (uint left = group.members; left != 0; left &= left - 1) f(uint(__builtin_ctz(left)));
}

template <class Result, class Operand, class Compute>
MSL_FN Result collective(Operand operand, const char* operation, msl::Site site, Compute compute) {
  static_assert(sizeof(Operand) <= 32 && sizeof(Result) <= 32, "operands of at most 32 bytes");
  {
    msl::Unobserved unobserved;
    __builtin_memcpy(msl::operand(msl::simdgroup(), msl::lane()), &operand, sizeof(Operand));
  }
  if (msl::begin_collective(operation, site)) {
    msl::Unobserved unobserved;
    compute(msl::simdgroup());
    msl::end_collective();
  }
  msl::Unobserved unobserved;
  Result result;
  __builtin_memcpy(&result, msl::result(msl::simdgroup(), msl::lane()), sizeof(Result));
  return result;
}

// What simdgroup functions take: scalars and vectors of numbers, no bool, no 64-bit integers, and no bfloat: the
// language has it, but compilers for Apple's GPUs have been seen to refuse it.
template <class T>
constexpr bool in_simdgroup() {
  typedef typename elements<T>::type E;
  return is_arithmetic_v<E> && sizeof(E) < 8 && sizeof(T) <= 16 && !is_same_v<E, bool> && !is_same_v<E, bfloat>;
}

MSL_FN void simdgroup_barrier(mem_flags flags, MSL_HERE) {
  msl::order_simdgroup(uint(flags), true);
  collective<int>(0, "simdgroup_barrier", site, [](msl::Simdgroup&) {});
  msl::order_simdgroup(uint(flags), false);
}

// Pairs of lanes 1, 2, 4, 8 and 16 apart; lanes that do not exist add nothing.
template <class T, class F>
MSL_FN T reduce(T value, const char* operation, msl::Site site, F f) {
  static_assert(in_simdgroup<T>(), "simdgroup reduction: type not supported");
  return collective<T>(value, operation, site, [f](msl::Simdgroup& group) {
    T tree[32];
    for_lanes(group, [&](uint lane) { tree[lane] = operand_of<T>(group, lane); });
    for (uint apart = 1; apart < 32; apart *= 2) {
      for (uint lane = 0; lane + apart < 32; lane += 2 * apart) {
        if (group.members >> (lane + apart) & 1) tree[lane] = f(tree[lane], tree[lane + apart]);
      }
    }
    for_lanes(group, [&](uint lane) { set_result(group, lane, tree[0]); });
  });
}
#define MSL_REDUCTION(NAME, E)                                             \
  template <class T>                                                       \
  MSL_FN T NAME(T value, MSL_HERE) {                                       \
    return reduce(value, #NAME, site, [](T a, T b) { return T(E); });      \
  }
MSL_REDUCTION(simd_sum, a + b)
MSL_REDUCTION(simd_product, a * b)
MSL_REDUCTION(simd_min, min(a, b))
MSL_REDUCTION(simd_max, max(a, b))
MSL_REDUCTION(simd_and, a & b)
MSL_REDUCTION(simd_or, a | b)
MSL_REDUCTION(simd_xor, a ^ b)

template <class T>
MSL_FN T prefix_sum(T value, bool inclusive, const char* operation, msl::Site site) {
  static_assert(in_simdgroup<T>(), "simdgroup prefix sum: type not supported");
  return collective<T>(value, operation, site, [inclusive](msl::Simdgroup& group) {
    T sum = T(0);
    for_lanes(group, [&](uint lane) {
      T next = T(sum + operand_of<T>(group, lane));
      set_result(group, lane, inclusive ? next : sum);
      sum = next;
    });
  });
}
template <class T>
MSL_FN T simd_prefix_inclusive_sum(T value, MSL_HERE) {
  return prefix_sum(value, true, "simd_prefix_inclusive_sum", site);
}
template <class T>
MSL_FN T simd_prefix_exclusive_sum(T value, MSL_HERE) {
  return prefix_sum(value, false, "simd_prefix_exclusive_sum", site);
}

// A lane that takes the value of another. From a lane that does not exist comes poison, as Metal leaves it undefined.
template <class T>
struct Taken {
  T value;
  int from;
};
template <class T>
MSL_FN T take(T value, int from, const char* operation, msl::Site site) {
  static_assert(in_simdgroup<T>(), "simdgroup shuffle: type not supported");
  return collective<T>(Taken<T>{value, from}, operation, site, [](msl::Simdgroup& group) {
    for_lanes(group, [&](uint lane) {
      int from = operand_of<Taken<T>>(group, lane).from;
      T taken;
      if (from >= 0 && from < 32 && (group.members >> from & 1)) {
        taken = operand_of<Taken<T>>(group, uint(from)).value;
      } else {
        poison(taken);
      }
      set_result(group, lane, taken);
    });
  });
}
// E says from which lane; `lane` is the own one. Shuffles up and down leave lanes without a source unchanged.
#define MSL_SHUFFLE(NAME, E)                        \
  template <class T>                                \
  MSL_FN T NAME(T value, ushort by, MSL_HERE) {     \
    int lane = int(msl::lane());                    \
    return take(value, E, #NAME, site);             \
  }
MSL_SHUFFLE(simd_shuffle, by + 0 * lane)
MSL_SHUFFLE(simd_shuffle_xor, lane ^ by)
MSL_SHUFFLE(simd_shuffle_down, lane + by < 32 ? lane + by : lane)
MSL_SHUFFLE(simd_shuffle_up, lane >= by ? lane - by : lane)
MSL_SHUFFLE(simd_shuffle_rotate_down, (lane + by) & 31)
MSL_SHUFFLE(simd_shuffle_rotate_up, (lane - by) & 31)

template <class T>
MSL_FN T simd_shuffle_and_fill_down(T value, T filling, ushort by, MSL_HERE) {
  T taken = take(value, int(msl::lane() + by) & 31, "simd_shuffle_and_fill_down", site);
  return msl::lane() + by < 32 ? taken : filling;
}
template <class T>
MSL_FN T simd_shuffle_and_fill_up(T value, T filling, ushort by, MSL_HERE) {
  T taken = take(value, int(msl::lane() - by) & 31, "simd_shuffle_and_fill_up", site);
  return msl::lane() >= by ? taken : filling;
}

template <class T>
MSL_FN T simd_broadcast(T value, ushort from, MSL_HERE) {
  static_assert(in_simdgroup<T>(), "simd_broadcast: type not supported");
  return collective<T>(Taken<T>{value, from}, "simd_broadcast", site, [](msl::Simdgroup& group) {
    int chosen = operand_of<Taken<T>>(group, uint(__builtin_ctz(group.members))).from;
    if (chosen > 31 || !(group.members >> chosen & 1)) msl::collective_failed("from a lane that does not exist");
    T taken = operand_of<Taken<T>>(group, uint(chosen)).value;
    for_lanes(group, [&](uint lane) {
      int from = operand_of<Taken<T>>(group, lane).from;
      if (from != chosen) msl::collective_failed("the lane to take from must be the same in all lanes");
      set_result(group, lane, taken);
    });
  });
}
template <class T>
MSL_FN T simd_broadcast_first(T value, MSL_HERE) {
  return take(value, int(msl::first_lane()), "simd_broadcast_first", site);
}

struct simd_vote {
  typedef ulong vote_t;
  vote_t lanes;
  explicit operator vote_t() const { return lanes; }
};
MSL_FN ulong vote(bool value, const char* operation, msl::Site site) {
  return collective<ulong>(uint(value), operation, site, [](msl::Simdgroup& group) {
    ulong lanes = 0;
    for_lanes(group, [&](uint lane) { lanes |= ulong(operand_of<uint>(group, lane)) << lane; });
    for_lanes(group, [&](uint lane) { set_result(group, lane, lanes); });
  });
}
MSL_FN simd_vote simd_ballot(bool value, MSL_HERE) { return simd_vote{vote(value, "simd_ballot", site)}; }
MSL_FN bool simd_any(bool value, MSL_HERE) { return vote(value, "simd_any", site) != 0; }
MSL_FN bool simd_all(bool value, MSL_HERE) { return vote(!value, "simd_all", site) == 0; }
MSL_FN bool simd_is_first() { return msl::lane() == msl::first_lane(); }
}  // namespace metal
