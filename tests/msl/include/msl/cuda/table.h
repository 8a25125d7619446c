// What an entry of PTX needs: how a kernel's parameters reach it, and where a thread is.
//
// Buffers are passed as pointers, argument structs by value: they then lie in constant memory, as a Mac's `setBytes` do.
#pragma once

namespace metal {
template <class T>
struct Argument {
  typedef T Passed;
};
template <class T>
struct Argument<T&> {
  typedef __remove_cv(T) Passed;
};

// The type in which parameter I of a kernel of type void(A...) is passed.
template <int I, class Signature>
struct ParameterType;
template <int I, class First, class... Rest>
struct ParameterType<I, void(First, Rest...)> : ParameterType<I - 1, void(Rest...)> {};
template <class First, class... Rest>
struct ParameterType<0, void(First, Rest...)> {
  typedef First Type;
  typedef typename Argument<First>::Passed Passed;
};

#define MSL_XYZ(REGISTER)                                                                              \
  uint3 {                                                                                              \
    uint(__nvvm_read_ptx_sreg_##REGISTER##_x()), uint(__nvvm_read_ptx_sreg_##REGISTER##_y()),          \
        uint(__nvvm_read_ptx_sreg_##REGISTER##_z())                                                    \
  }
#define MSL_BUILTIN(NAME, ...) \
  MSL_FN uint3 NAME() { return __VA_ARGS__; }
namespace builtin {
MSL_BUILTIN(thread_position_in_threadgroup, MSL_XYZ(tid))
MSL_BUILTIN(threadgroup_position_in_grid, MSL_XYZ(ctaid))
MSL_BUILTIN(threads_per_threadgroup, MSL_XYZ(ntid))
MSL_BUILTIN(threadgroups_per_grid, MSL_XYZ(nctaid))
MSL_BUILTIN(thread_position_in_grid, MSL_XYZ(ctaid) * MSL_XYZ(ntid) + MSL_XYZ(tid))
MSL_BUILTIN(threads_per_grid, MSL_XYZ(nctaid) * MSL_XYZ(ntid))
MSL_BUILTIN(thread_index_in_threadgroup, uint3(msl::index_in_threadgroup()))
MSL_BUILTIN(thread_index_in_simdgroup, uint3(msl::lane()))
MSL_BUILTIN(simdgroup_index_in_threadgroup, uint3(msl::index_in_threadgroup() / 32))
MSL_BUILTIN(simdgroups_per_threadgroup, uint3((msl::threads() + 31) / 32))
MSL_BUILTIN(threads_per_simdgroup, uint3(32))
MSL_BUILTIN(thread_execution_width, uint3(32))
}  // namespace builtin

// A builtin in the type that the kernel declares.
template <class T>
MSL_FN T builtin_as(uint3 value) {
  typedef typename elements<T>::type Element;
  if constexpr (elements<T>::count == 1) {
    return T(value[0]);
  } else if constexpr (elements<T>::count == 2) {
    return T{Element(value[0]), Element(value[1])};
  } else {
    return T{Element(value[0]), Element(value[1]), Element(value[2])};
  }
}
}  // namespace metal
