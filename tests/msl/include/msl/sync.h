// Barriers and memory flags.
#pragma once
#ifdef MSL_CHECK
#include "executor_stub.h"
#else
#include "../../runtime/executor.h"
#endif

// The place of a call: a default argument is evaluated where the call is written.
#define MSL_HERE msl::Site site = msl::Site{__builtin_FILE(), __builtin_LINE(), __builtin_COLUMN()}

namespace metal {
enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
constexpr MSL_FN mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }

MSL_FN void threadgroup_barrier(mem_flags flags, MSL_HERE) {
  msl::threadgroup_barrier(uint(flags), site);
}
}  // namespace metal
