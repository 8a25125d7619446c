// Address spaces as attributes, and the macros that overload a function over them.
#pragma once

#define MSL_FN inline __attribute__((always_inline))

#ifdef MSL_CHECK
#define MSL_DEVICE __attribute__((address_space(1)))
#define MSL_CONSTANT __attribute__((address_space(2)))
#define MSL_THREADGROUP __attribute__((address_space(3)))
#define MSL_FOR_READABLE(X) X(MSL_DEVICE) X(MSL_CONSTANT) X(MSL_THREADGROUP) X()
#define MSL_FOR_WRITABLE(X) X(MSL_DEVICE) X(MSL_THREADGROUP)
#define MSL_BODY(...) ;  // functions on pointers into address spaces are only declared
#else
#define MSL_DEVICE
#define MSL_CONSTANT
#define MSL_THREADGROUP
#define MSL_FOR_READABLE(X) X()
#define MSL_FOR_WRITABLE(X) X()
#define MSL_BODY(...) { __VA_ARGS__ }
#endif
