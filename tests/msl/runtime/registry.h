// The kernels and function constants of a library, registered by each file's table when the library is loaded.
#pragma once
#include "executor.h"

namespace msl {
enum class Builtin {
  thread_position_in_grid,
  thread_position_in_threadgroup,
  threadgroup_position_in_grid,
  threads_per_threadgroup,
  threadgroups_per_grid,
  threads_per_grid,
  thread_index_in_threadgroup,
  thread_index_in_simdgroup,
  simdgroup_index_in_threadgroup,
  simdgroups_per_threadgroup,
  threads_per_simdgroup,
  thread_execution_width = threads_per_simdgroup,
};

// A kernel's parameter as its attributes describe it.
struct Parameter {
  enum Kind { kBuffer, kShared, kBuiltin } kind;
  const char* name;
  int index;
  bool packed;        // of packed vectors: aligned to their elements only
  bool (*enabled)();  // the [[function_constant]] that decides whether the parameter exists

  static constexpr Parameter buffer(const char* name, int index, bool packed, bool (*enabled)()) {
    return {kBuffer, name, index, packed, enabled};
  }
  static constexpr Parameter shared(const char* name, int index) { return {kShared, name, index, false, nullptr}; }
  static constexpr Parameter builtin(Builtin which) { return {kBuiltin, "", int(which), false, nullptr}; }
};

// What the parameter's type says.
struct Shape {
  unsigned long size, alignment, element;  // of what it points to, and of that type's elements
  bool writable, reference;
};

struct Arguments {
  void* buffers[31];
  void* shared[31];
};

struct Constant {
  int index;
  const char* name;
  unsigned long size;
  void* (*value)();  // in the calling thread
  bool* (*defined)();
  Constant* next;
};

// One .metal file: a Metal library of its own.
struct File {
  Constant *first_constant, *last_constant;
};

struct Kernel {
  const char* name;
  File* file;
  void (*call)(const Parameter*, const Arguments&);
  const Parameter* parameters;
  const Shape* shapes;
  unsigned parameter_count;
  const int* required;          // indices of the function constants that it reads, then -1
  void (*const* derived)();     // computes the constants that it reads and that depend on others; then null
  Kernel* next;
};

Uint3 builtin(Builtin);

bool add(File&, Constant&);
bool add(Kernel&);
const Kernel* first_kernel();
}  // namespace msl
