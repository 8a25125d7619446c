// The C interface of a built library. Several threads may call it at once.
#pragma once
#include <stdint.h>

#define MSL_EXPORT __attribute__((visibility("default")))

extern "C" {
enum { MSL_READ = 0, MSL_WRITE = 1, MSL_BYTES = 2 };  // input buffer; output buffer, also read; bytes of setBytes

struct msl_binding {
  uint32_t index, kind;
  void* pointer;
  uint64_t size;
};
struct msl_constant {
  uint32_t index, size;  // bool 1, short and ushort 2, int, uint and float 4
  uint8_t value[8];
};
struct msl_launch {
  const char* kernel;
  const msl_constant* constants;
  uint32_t constant_count;
  const msl_binding* bindings;
  uint32_t binding_count;
  const uint32_t* threadgroup_memory;  // bytes of [[threadgroup(i)]]
  uint32_t threadgroup_memory_count;
  uint32_t threadgroups[3], threads[3];  // the grid in threadgroups, and the threads of each
  uint64_t seed;                         // the schedule: 0 in order
};

MSL_EXPORT uint32_t msl_abi(void);
MSL_EXPORT uint32_t msl_kernel_count(void);
MSL_EXPORT const char* msl_kernel_name(uint32_t index);
// 0, or 1 and a message, with file and line where they are known.
MSL_EXPORT int msl_run(const msl_launch*, char* error, uint64_t error_size);
}
