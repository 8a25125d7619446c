// What the executor offers, for the type check: nothing runs.
#pragma once

namespace msl {
struct Site {
  const char* file;
  int line, column;
};
struct Simdgroup {
  unsigned members;
};
struct Unobserved {
  ~Unobserved() {}  // not trivial: its variables are not unused
};
void threadgroup_barrier(unsigned flags, Site);
void order_simdgroup(unsigned flags, bool before);
MSL_THREADGROUP void* shared_memory(unsigned long size, int id, const char* name);
void add_to_trail(Site, unsigned long what);
void collective_failed(const char* why);
unsigned lane();
unsigned first_lane();
bool begin_collective(const char* operation, Site);
void end_collective();
Simdgroup& simdgroup();
void* operand(Simdgroup&, unsigned lane);
void* result(Simdgroup&, unsigned lane);
}  // namespace msl
