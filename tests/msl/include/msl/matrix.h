// <metal_simdgroup_matrix>: 8x8 matrices spread over the 32 lanes of a simdgroup, two neighbouring elements a lane.
#pragma once

namespace metal {
// Apple's layout: the lane holds (row, column) and (row, column + 1).
struct Fragment {
  uint row, column;
  explicit MSL_FN Fragment(uint lane)
      : row(lane / 16 * 4 + lane / 2 % 4), column((lane / 8 & 1) * 4 + (lane & 1) * 2) {}
};

template <class T, int Columns, int Rows = Columns>
struct simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8, "simdgroup_matrix: 8x8 only");
  static_assert(is_floating_point_v<T>, "simdgroup_matrix: half, bfloat or float");
  typedef vec<T, 2> storage_type;
  storage_type elements_;

  MSL_FN simdgroup_matrix() { poison(elements_); }
  explicit MSL_FN simdgroup_matrix(T diagonal) {
    Fragment at(msl::lane());
    elements_[0] = at.row == at.column ? diagonal : T(0.0f);
    elements_[1] = at.row == at.column + 1 ? diagonal : T(0.0f);
  }
  MSL_FN storage_type& thread_elements() { return elements_; }
  MSL_FN const storage_type& thread_elements() const { return elements_; }
};
typedef simdgroup_matrix<float, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8> simdgroup_bfloat8x8;

template <class T, int Columns, int Rows = Columns>
MSL_FN simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Columns, Rows> matrix;
  matrix.elements_ = value;
  return matrix;
}

#define MSL_LOAD(SPACE)                                                                                            \
  template <class T>                                                                                               \
  MSL_FN void simdgroup_load(simdgroup_matrix<T, 8>& matrix, const SPACE T* from, ulong elements_per_row = 8,      \
                             ulong2 origin = ulong2{}, bool transpose = false, MSL_HERE)                           \
      MSL_BODY(Fragment at(msl::lane()); from += origin[1] * elements_per_row + origin[0];                         \
               msl::add_to_trail(site, ulong(from) ^ elements_per_row << 48 ^ (transpose ? 1 : 0));                \
               for (uint i = 0; i < 2; i++) matrix.elements_[i] =                                                  \
                   transpose ? from[(at.column + i) * elements_per_row + at.row]                                   \
                             : from[at.row * elements_per_row + at.column + i];)
MSL_FOR_READABLE(MSL_LOAD)

#define MSL_STORE(SPACE)                                                                                           \
  template <class T>                                                                                               \
  MSL_FN void simdgroup_store(simdgroup_matrix<T, 8> matrix, SPACE T* to, ulong elements_per_row = 8,              \
                              ulong2 origin = ulong2{}, bool transpose = false, MSL_HERE)                          \
      MSL_BODY(Fragment at(msl::lane()); to += origin[1] * elements_per_row + origin[0];                           \
               msl::add_to_trail(site, ulong(to) ^ elements_per_row << 48 ^ (transpose ? 1 : 0));                  \
               for (uint i = 0; i < 2; i++)                                                                        \
                   (transpose ? to[(at.column + i) * elements_per_row + at.row]                                    \
                              : to[at.row * elements_per_row + at.column + i]) = matrix.elements_[i];)
MSL_FOR_WRITABLE(MSL_STORE)

}  // namespace metal
#ifdef MSL_CUDA
#include "cuda/fragments.h"
#else
#include "fragments.h"
#endif

namespace metal {
template <class D, class A, class B>
MSL_FN void simdgroup_multiply(simdgroup_matrix<D, 8>& d, simdgroup_matrix<A, 8> a, simdgroup_matrix<B, 8> b,
                               MSL_HERE) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8>(D(0.0f)), site);
}
}  // namespace metal
