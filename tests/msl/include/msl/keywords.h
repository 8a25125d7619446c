// The words of Metal that C++ lacks. Last of all, so that the shim itself cannot trip over them.
#pragma once

#define kernel
#define thread
#define device MSL_DEVICE
#define constant const MSL_CONSTANT
#define threadgroup MSL_THREADGROUP

// `threadgroup T name;` became `typedef T ALIAS; MSL_SHARED(ALIAS, name, ID);`, and a limit over all that are visible.
#ifdef MSL_CUDA
#define MSL_SHARED(ALIAS, NAME, ID) static __attribute__((__shared__)) ALIAS NAME
#else
#define MSL_SHARED(ALIAS, NAME, ID) \
  MSL_THREADGROUP ALIAS& NAME = *static_cast<MSL_THREADGROUP ALIAS*>(msl::shared_memory(sizeof(ALIAS), ID, #NAME))
#endif
#define MSL_SHARED_LIMIT(...) \
  static_assert(metal::total_size<__VA_ARGS__>() <= 32768, "more than 32768 bytes of threadgroup memory")

#ifdef MSL_CHECK
#define is_function_constant_defined(NAME) (sizeof(NAME) > 0)
#elif defined(MSL_CUDA)
#define MSL_PER_LAUNCH constexpr
#define is_function_constant_defined(NAME) msl_defined_##NAME
#else
#define MSL_PER_LAUNCH static thread_local __attribute__((tls_model("initial-exec")))
#define is_function_constant_defined(NAME) msl_defined_##NAME
#endif
