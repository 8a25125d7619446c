// What kernels see of the executor: their place in the grid, barriers, simdgroup operations, threadgroup memory.
//
// Every thread of a threadgroup is a fiber. The lanes of a simdgroup run until each has reached the same operation; the
// last one computes the results of all. Shared by kernels and runtime, so it includes nothing.
#pragma once

namespace msl {
typedef unsigned Uint3 __attribute__((ext_vector_type(3)));

constexpr unsigned kLanes = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxSimdgroups = kMaxThreads / kLanes;

struct Site {
  const char* file;
  int line, column;
};

struct alignas(16) Slot {
  unsigned char bytes[32];
};

struct Simdgroup {
  unsigned index;
  unsigned members;   // the lanes it began with
  unsigned live;      // those that have not returned
  unsigned runnable;  // those that wait for nothing
  unsigned arrived;   // those at the simdgroup operation below
  unsigned waiting;   // those at a threadgroup barrier
  const char* operation;
  Site site;
  unsigned long trail;
  Slot operands[kLanes], results[kLanes];
};

struct Context {  // a stack that can be switched to
  void* stack_pointer;
  const void* stack_bottom;
  unsigned long stack_size;
  void* sanitizer_fiber;
  void* fake_stack;
};

struct Fiber {
  Context context;
  Simdgroup* simdgroup;
  unsigned lane, index;
  Uint3 position;       // in the threadgroup
  const char* operation;  // the last one
  Site site;
  unsigned long trail;  // of the simdgroup_load and simdgroup_store calls so far: must be the same in all lanes
};

extern __thread Fiber* current __attribute__((tls_model("initial-exec")));

inline unsigned lane() { return current->lane; }
inline Simdgroup& simdgroup() { return *current->simdgroup; }
inline unsigned first_lane() { return unsigned(__builtin_ctz(current->simdgroup->live)); }
inline void* operand(Simdgroup& group, unsigned lane) { return group.operands[lane].bytes; }
inline void* result(Simdgroup& group, unsigned lane) { return group.results[lane].bytes; }

void threadgroup_barrier(unsigned flags, Site);
// The memory order of a simdgroup_barrier, before and after its rendezvous.
void order_simdgroup(unsigned flags, bool before);
void limit_threads(unsigned);  // [[max_total_threads_per_threadgroup]]
void* shared_memory(unsigned long size, int id, const char* name);
[[noreturn]] void fail_at(const char* operation, Site, const char* why);
[[noreturn]] void collective_failed(const char* why);

// A lane has left its operand. True: it is the last one, and computes the results of all before end_collective.
bool begin_collective(const char* operation, Site);
void end_collective();

// Keeps the runtime's own memory traffic out of the race detector's sight.
#ifdef MSL_SANITIZE_THREAD
extern "C" void AnnotateIgnoreReadsBegin(const char*, int);
extern "C" void AnnotateIgnoreReadsEnd(const char*, int);
extern "C" void AnnotateIgnoreWritesBegin(const char*, int);
extern "C" void AnnotateIgnoreWritesEnd(const char*, int);
struct Unobserved {
  Unobserved() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__), AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
  ~Unobserved() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__), AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
};
#else
struct Unobserved {
  ~Unobserved() {}  // not trivial: its variables are not unused
};
#endif

// simdgroup_load and simdgroup_store: every lane must do the same ones, from the same place. No rendezvous, for speed:
// the next one compares.
inline void add_to_trail(Site site, unsigned long what) {
  Unobserved unobserved;
  if (current->simdgroup->members != ~0u) fail_at("simdgroup_load or _store", site, "in less than 32 threads");
  current->trail = (current->trail ^ what ^ (unsigned long)(site.line) << 32) * 0x9E3779B97F4A7C15ul;
}
}  // namespace msl
