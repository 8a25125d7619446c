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

template <class A, class B, class C>
struct Operands {
  A a[2];
  B b[2];
  C c[2];
};
template <class D>
struct Product {
  D d[2];
};

// d = a b + c, in float, rounded once.
template <class D, class A, class B, class C>
MSL_FN void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8>& d, simdgroup_matrix<A, 8> a, simdgroup_matrix<B, 8> b,
                                          simdgroup_matrix<C, 8> c, MSL_HERE) {
  typedef Operands<A, B, C> All;
  All mine = {{a.elements_[0], a.elements_[1]}, {b.elements_[0], b.elements_[1]}, {c.elements_[0], c.elements_[1]}};
  auto compute = [](msl::Simdgroup& group) {
    if (group.members != ~0u) msl::collective_failed("in a simdgroup of less than 32 threads");
    float x[8][8], y[8][8], z[8][8];
    for (uint lane = 0; lane < 32; lane++) {
      All given = operand_of<All>(group, lane);
      Fragment at(lane);
      for (uint i = 0; i < 2; i++) {
        x[at.row][at.column + i] = float(given.a[i]);
        y[at.row][at.column + i] = float(given.b[i]);
        z[at.row][at.column + i] = float(given.c[i]);
      }
    }
    for (uint row = 0; row < 8; row++) {
      for (uint k = 0; k < 8; k++) {
        for (uint column = 0; column < 8; column++) z[row][column] += x[row][k] * y[k][column];
      }
    }
    for (uint lane = 0; lane < 32; lane++) {
      Fragment at(lane);
      set_result(group, lane, Product<D>{{D(z[at.row][at.column]), D(z[at.row][at.column + 1])}});
    }
  };
  Product<D> product = collective<Product<D>>(mine, "simdgroup_multiply_accumulate", site, compute);
  d.elements_[0] = product.d[0];
  d.elements_[1] = product.d[1];
}
template <class D, class A, class B>
MSL_FN void simdgroup_multiply(simdgroup_matrix<D, 8>& d, simdgroup_matrix<A, 8> a, simdgroup_matrix<B, 8> b,
                               MSL_HERE) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8>(D(0.0f)), site);
}
}  // namespace metal
