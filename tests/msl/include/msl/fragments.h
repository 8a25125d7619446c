// Products of simdgroup matrices: the lane that comes last computes those of all.
#pragma once

namespace metal {
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
}  // namespace metal
