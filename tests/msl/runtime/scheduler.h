// One threadgroup at a time: its fibers, what each waits for, and which runs next.
#pragma once
#include <stdint.h>

#include "executor.h"
#include "registry.h"

namespace msl {
constexpr unsigned kMaxShared = 64;  // threadgroup variables of a kernel

struct SharedVariable {
  int id;
  void* memory;
};

// All that an OS thread needs to run launches; kept from one to the next.
struct Executor {
  Executor();
  ~Executor();

  // The launch.
  const Kernel* kernel;
  Arguments arguments;
  Uint3 threads, threadgroups;
  const uint32_t* shared_parameters;  // sizes of [[threadgroup(i)]]
  unsigned shared_parameter_count;
  uint64_t seed;
  char failure[1024];  // empty if all is well
  uint64_t groups_run;

  // The threadgroup.
  Uint3 group;
  unsigned thread_count, simdgroup_count, live, waiting;
  const char* operation;  // of the barrier that `waiting` threads are at
  Site site;
  SharedVariable shared[kMaxShared];
  unsigned shared_count;
  unsigned long shared_size, shared_top;
  char* order;  // for the race detector: the barrier of even and of odd rounds, then one for each simdgroup
  unsigned round;

  // The schedule.
  uint64_t random_state;
  unsigned priority[kMaxSimdgroups];

  Context main;
  Fiber fibers[kMaxThreads];
  Simdgroup simdgroups[kMaxSimdgroups];
  unsigned stack_count;
  char* arena;
  char begin_order, end_order;  // for the race detector: the launch's begin, and the end of every threadgroup

  void begin_launch();
  void run_threadgroup();
  void end_launch();

  unsigned random();
  void begin_shared();
  [[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 2, 3)));
};

Executor& executor();

void make_arena(Executor&);
void free_arena(Executor&);
}  // namespace msl
