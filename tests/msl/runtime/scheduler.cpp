// Rendezvous and schedule.
//
// Everything that Metal leaves undefined fails at once, before anything can wait for ever: a barrier that some thread
// has returned before, threads at different barriers, lanes at different simdgroup operations.
#include "scheduler.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <memory>
#include <new>

#include "fiber.h"

namespace msl {
__thread Fiber* current __attribute__((tls_model("initial-exec")));

namespace {
// Mapped, not allocated: the race detector would take the deallocation for an access by the program, unordered with
// those of fibers that failed.
struct Unmap {
  void operator()(Executor* e) const {
    e->~Executor();
    munmap(e, sizeof(Executor));
  }
};
thread_local std::unique_ptr<Executor, Unmap> owned;
__thread Executor* mine __attribute__((tls_model("initial-exec")));

// seed 0: in order; odd: any thread; even: simdgroups by priorities that change now and then, which finds missing
// barriers that a fair choice does not.
bool by_priorities(uint64_t seed) { return seed != 0 && seed % 2 == 0; }

unsigned bit(unsigned lane) { return 1u << lane; }

bool same(const Site& a, const Site& b) { return a.file == b.file && a.line == b.line && a.column == b.column; }

// A lane of the set: the next one after `lane` in order, else any.
unsigned pick_lane(Executor& e, unsigned set, unsigned lane) {
  unsigned first = e.seed ? e.random() % kLanes : (lane + 1) % kLanes;
  unsigned rotated = set >> first | (first ? set << (kLanes - first) : 0);
  return (unsigned(__builtin_ctz(rotated)) + first) % kLanes;
}

Simdgroup* pick_simdgroup(Executor& e, Simdgroup* own) {
  const unsigned count = e.simdgroup_count;
  if (by_priorities(e.seed)) {
    if (e.random() % 64 == 0) e.priority[e.random() % count] = e.random();
    Simdgroup* best = nullptr;
    for (unsigned i = 0; i < count; i++) {
      Simdgroup* group = &e.simdgroups[i];
      if (group->runnable && (!best || e.priority[i] > e.priority[best->index])) best = group;
    }
    return best;
  }
  unsigned at = e.seed ? e.random() % count : own ? own->index : 0;
  for (unsigned i = 0; i < count; i++) {
    if (e.simdgroups[at].runnable) return &e.simdgroups[at];
    at = at + 1 < count ? at + 1 : 0;
  }
  return nullptr;
}

// The fiber to run after `from`, which cannot go on; null at the end.
Fiber* next(Executor& e, Fiber* from) {
  Simdgroup* own = from ? from->simdgroup : nullptr;
  Simdgroup* group = pick_simdgroup(e, own);
  if (!group) return nullptr;
  unsigned after = group == own ? from->lane : kLanes - 1;
  return &e.fibers[group->index * kLanes + pick_lane(e, group->runnable, after)];
}

void go_on(Executor& e, Fiber* from, bool ended) {
  Fiber* to = next(e, from);
  if (to == from) return;
  if (!to && e.live) e.fail("%u threads wait for ever", e.live);
  current = to;
  switch_context(from->context, to ? to->context : e.main, ended);
}

void run_fiber() {
  Executor& e = executor();
  entered(e.main);
  Fiber* me = current;
  acquire(&e.begin_order);
  e.kernel->call(e.kernel->parameters, e.arguments);
  release(&e.end_order);

  Simdgroup& group = *me->simdgroup;
  if (group.arrived) {
    e.fail("%s:%d: %s after lane %u of simdgroup %u has returned", group.site.file, group.site.line, group.operation,
           me->lane, group.index);
  }
  if (e.waiting) {
    e.fail("%s:%d: threadgroup_barrier after thread %u has returned", e.site.file, e.site.line, me->index);
  }
  group.live &= ~bit(me->lane);
  group.runnable &= ~bit(me->lane);
  e.live--;
  go_on(e, me, true);
  __builtin_unreachable();
}
}  // namespace

Executor& executor() {
  if (!mine) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS;
    void* memory = mmap(nullptr, sizeof(Executor), PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED) {
      perror("the executor of kernels");
      abort();
    }
    owned.reset(new (memory) Executor());
    mine = owned.get();
  }
  return *mine;
}

Executor::Executor() {
  memset(static_cast<void*>(this), 0, sizeof(*this));
  make_arena(*this);
}

Executor::~Executor() {
  mine = nullptr;
  for (unsigned i = 0; i < stack_count; i++) free_stack(fibers[i].context);
  free_arena(*this);
}

unsigned Executor::random() {  // xorshift
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return unsigned(random_state >> 24);
}

void Executor::begin_launch() {
  failure[0] = 0;
  groups_run = 0;
  random_state = seed * 0x9E3779B97F4A7C15u + 1;
  for (unsigned& p : priority) p = random();
  thread_count = threads[0] * threads[1] * threads[2];
  simdgroup_count = (thread_count + kLanes - 1) / kLanes;
  for (; stack_count < thread_count; stack_count++) make_stack(fibers[stack_count].context);
  for (unsigned i = 0; i < thread_count; i++) {
    Fiber& fiber = fibers[i];
    fiber.simdgroup = &simdgroups[i / kLanes];
    fiber.lane = i % kLanes;
    fiber.index = i;
    fiber.position = Uint3{i % threads[0], i / threads[0] % threads[1], i / threads[0] / threads[1]};
  }
  adopt_thread(main);
  release(&begin_order);
}

void Executor::run_threadgroup() {
  live = thread_count;
  waiting = round = 0;
  begin_shared();
  for (unsigned i = 0; i < shared_parameter_count; i++) {
    arguments.shared[i] = shared_memory(shared_parameters[i], -1 - int(i), "a parameter");
  }
  if (failure[0]) return;
  for (unsigned i = 0; i < simdgroup_count; i++) {
    Simdgroup& simdgroup = simdgroups[i];
    const unsigned lanes = thread_count - i * kLanes;
    simdgroup.index = i;
    simdgroup.members = lanes >= kLanes ? ~0u : bit(lanes) - 1;
    simdgroup.live = simdgroup.runnable = simdgroup.members;
    simdgroup.arrived = simdgroup.waiting = 0;
  }
  for (unsigned i = 0; i < thread_count; i++) {
    fibers[i].trail = 0;
    fibers[i].operation = nullptr;
    if (groups_run > 0) make_stranger(fibers[i].context);  // the launch itself comes after all earlier ones
    prepare(fibers[i].context, run_fiber, i);
  }
  groups_run++;
  Fiber* first = next(*this, nullptr);
  current = first;
  switch_context(main, first->context, false);
  if (failure[0]) {
    for (unsigned i = 0; i < stack_count; i++) forget(fibers[i].context);
  }
}

void Executor::end_launch() { acquire(&end_order); }

void Executor::fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(failure, sizeof(failure), format, arguments);
  va_end(arguments);
  release(&end_order);  // the message is read after the launch
  Fiber* abandoned = current;
  current = nullptr;
  switch_context(abandoned->context, main, true);
  __builtin_unreachable();
}

void fail_at(const char* operation, Site site, const char* why) {
  executor().fail("%s:%d: %s: %s", site.file, site.line, operation, why);
}

void collective_failed(const char* why) { fail_at(current->operation, current->site, why); }

void limit_threads(unsigned limit) {
  Executor& e = executor();
  if (e.thread_count > limit) e.fail("%u threads in a threadgroup, at most %u", e.thread_count, limit);
}

void threadgroup_barrier(unsigned flags, Site site) {
  Executor& e = executor();
  Fiber* me = current;
  Simdgroup& group = *me->simdgroup;
  me->operation = "threadgroup_barrier";
  if (e.live != e.thread_count) {
    e.fail("%s:%d: threadgroup_barrier reached by %u of %u threads: the others have returned", site.file, site.line,
           e.live, e.thread_count);
  }
  if (group.arrived) {
    e.fail("%s:%d: threadgroup_barrier in lane %u of simdgroup %u, %s in line %d in another", site.file, site.line,
           me->lane, group.index, group.operation, group.site.line);
  }
  if (e.waiting && !same(e.site, site)) {
    e.fail("%s:%d: divergent threadgroup_barrier: other threads are at the one in line %d", site.file, site.line,
           e.site.line);
  }
  char* order = &e.order[e.round % 2];
  if (orders(flags)) release(order);
  e.site = site;
  group.waiting |= bit(me->lane);
  group.runnable &= ~bit(me->lane);
  if (++e.waiting == e.thread_count) {
    for (unsigned i = 0; i < e.simdgroup_count; i++) {
      e.simdgroups[i].runnable = e.simdgroups[i].members;
      e.simdgroups[i].waiting = 0;
    }
    e.waiting = 0;
    e.round++;
    if (e.seed) go_on(e, me, false);
  } else {
    go_on(e, me, false);
  }
  if (orders(flags)) acquire(order);
}

void order_simdgroup(unsigned flags, bool before) {
  if (!orders(flags)) return;
  char* order = &executor().order[2 + current->simdgroup->index];
  before ? release(order) : acquire(order);
}

bool begin_collective(const char* operation, Site site) {
  Executor& e = executor();
  Fiber* me = current;
  Simdgroup& group = *me->simdgroup;
  me->operation = operation;
  me->site = site;
  if (group.live != group.members) {
    e.fail("%s:%d: %s after lanes %08x of simdgroup %u have returned", site.file, site.line, operation,
           group.members & ~group.live, group.index);
  }
  if (group.waiting) {
    e.fail("%s:%d: %s in lane %u of simdgroup %u, threadgroup_barrier in line %d in another", site.file, site.line,
           operation, me->lane, group.index, e.site.line);
  }
  if (!group.arrived) {
    group.operation = operation;
    group.site = site;
    group.trail = me->trail;
  } else if (group.operation != operation || !same(group.site, site)) {
    e.fail("%s:%d: lanes of simdgroup %u at different operations: %s, and %s in line %d", site.file, site.line,
           group.index, operation, group.operation, group.site.line);
  } else if (group.trail != me->trail) {
    e.fail("%s:%d: lanes of simdgroup %u did not do the same simdgroup_load and simdgroup_store calls before this %s",
           site.file, site.line, group.index, operation);
  }
  group.arrived |= bit(me->lane);
  if (group.arrived == group.members) {
    group.arrived = 0;
    return true;
  }
  group.runnable &= ~bit(me->lane);
  go_on(e, me, false);
  return false;
}

void end_collective() {
  Simdgroup& group = *current->simdgroup;
  group.runnable = group.members;
}

Uint3 builtin(Builtin which) {
  const Executor& e = executor();
  const Fiber& me = *current;
  switch (which) {
    case Builtin::thread_position_in_grid: return e.group * e.threads + me.position;
    case Builtin::thread_position_in_threadgroup: return me.position;
    case Builtin::threadgroup_position_in_grid: return e.group;
    case Builtin::threads_per_threadgroup: return e.threads;
    case Builtin::threadgroups_per_grid: return e.threadgroups;
    case Builtin::threads_per_grid: return e.threadgroups * e.threads;
    case Builtin::thread_index_in_threadgroup: return Uint3{me.index, 0, 0};
    case Builtin::thread_index_in_simdgroup: return Uint3{me.lane, 0, 0};
    case Builtin::simdgroup_index_in_threadgroup: return Uint3{me.simdgroup->index, 0, 0};
    case Builtin::simdgroups_per_threadgroup: return Uint3{e.simdgroup_count, 0, 0};
    case Builtin::threads_per_simdgroup: return Uint3{kLanes, 0, 0};
  }
  __builtin_unreachable();
}
}  // namespace msl
