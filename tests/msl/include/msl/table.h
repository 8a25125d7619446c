// The table behind each rewritten file: how to call its kernels. Types come from the kernels themselves, kinds and
// indices from their attributes.
#pragma once
#include "../../runtime/registry.h"

namespace {
msl::File msl_file;
}

namespace metal {
MSL_FN void* pointer_of(const msl::Parameter& parameter, const msl::Arguments& arguments) {
  const bool shared = parameter.kind == msl::Parameter::kShared;
  return (shared ? arguments.shared : arguments.buffers)[parameter.index];
}

template <class T>
struct Argument;
template <class T, bool REFERENCE>
constexpr msl::Shape shape_of() {
  typedef __remove_cv(T) Plain;
  return {sizeof(T), alignof(T), sizeof(typename elements<Plain>::type), !__is_const(T), REFERENCE};
}
template <class T>
struct Argument<T*> {
  static constexpr msl::Shape shape = shape_of<T, false>();
  static MSL_FN T* get(const msl::Parameter& parameter, const msl::Arguments& arguments) {
    return static_cast<T*>(pointer_of(parameter, arguments));
  }
};
template <class T>
struct Argument<T&> {
  static constexpr msl::Shape shape = shape_of<T, true>();
  // A reference that a function constant turns off is null, and the kernel must not use it.
  __attribute__((no_sanitize("null")))
  static MSL_FN T& get(const msl::Parameter& parameter, const msl::Arguments& arguments) {
    return *static_cast<T*>(pointer_of(parameter, arguments));
  }
};
#define MSL_BUILTIN_ARGUMENT(T, ...)                                                       \
  template <>                                                                              \
  struct Argument<T> {                                                                     \
    static constexpr msl::Shape shape = {};                                                \
    static MSL_FN T get(const msl::Parameter& parameter, const msl::Arguments&) {          \
      uint3 value = msl::builtin(msl::Builtin(parameter.index));                           \
      return T{__VA_ARGS__};                                                               \
    }                                                                                      \
  };
MSL_BUILTIN_ARGUMENT(uint, value[0])
MSL_BUILTIN_ARGUMENT(uint2, value[0], value[1])
MSL_BUILTIN_ARGUMENT(uint3, value[0], value[1], value[2])
MSL_BUILTIN_ARGUMENT(ushort, ushort(value[0]))
MSL_BUILTIN_ARGUMENT(ushort2, ushort(value[0]), ushort(value[1]))
MSL_BUILTIN_ARGUMENT(ushort3, ushort(value[0]), ushort(value[1]), ushort(value[2]))

template <int... I>
struct Indices {};

// Calls a kernel of type void(A...).
template <class Signature>
struct Caller;
template <class... A>
struct Caller<void(A...)> {
  static constexpr unsigned count = sizeof...(A);
  static constexpr msl::Shape shapes[] = {Argument<A>::shape..., msl::Shape{}};

  template <void (*F)(A...)>
  static void call(const msl::Parameter* parameters, const msl::Arguments& arguments) {
    with<F>(parameters, arguments, __make_integer_seq<Sequence, int, int(sizeof...(A))>{});
  }

 private:
  template <class, int... I>
  using Sequence = Indices<I...>;
  template <void (*F)(A...), int... I>
  static MSL_FN void with(const msl::Parameter* parameters, const msl::Arguments& arguments, Indices<I...>) {
    F(Argument<A>::get(parameters[I], arguments)...);
  }
};
}  // namespace metal
