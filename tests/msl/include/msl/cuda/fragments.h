// Products of simdgroup matrices by shuffles: right, and slow. Tensor cores lay fragments out otherwise.
#pragma once

namespace metal {
// The lane that holds an element.
MSL_FN uint holder(uint row, uint column) {
  return (row & 4) * 4 + (column & 4) * 2 + (row & 3) * 2 + (column >> 1 & 1);
}

template <class D, class A, class B, class C>
MSL_FN void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8>& d, simdgroup_matrix<A, 8> a, simdgroup_matrix<B, 8> b,
                                          simdgroup_matrix<C, 8> c, MSL_HERE) {
  const Fragment at(msl::lane());
  float first = float(c.elements_[0]), second = float(c.elements_[1]);
  const float a0 = float(a.elements_[0]), a1 = float(a.elements_[1]);
  const float b0 = float(b.elements_[0]), b1 = float(b.elements_[1]);
  _Pragma("unroll") for (uint k = 0; k < 8; k++) {
    const uint from_a = holder(at.row, k), from_b = holder(k, at.column);
    const float x = k % 2 == 0 ? take(a0, from_a) : take(a1, from_a);
    first += x * take(b0, from_b);
    second += x * take(b1, from_b);
  }
  d.elements_[0] = D(first);
  d.elements_[1] = D(second);
}
}  // namespace metal
