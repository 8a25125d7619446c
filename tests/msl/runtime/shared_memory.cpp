// Threadgroup memory: at most 32 KB, poisoned for every threadgroup (0xFF: NaN in half, bfloat and float).
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "fiber.h"
#include "scheduler.h"

#ifdef MSL_SANITIZE_ADDRESS
extern "C" void __asan_poison_memory_region(const volatile void*, size_t);
extern "C" void __asan_unpoison_memory_region(const volatile void*, size_t);
#endif

namespace msl {
namespace {
constexpr size_t kLimit = 32768;
constexpr size_t kGap = 128;  // between variables, for the address sanitizer
// The race detector remembers addresses: there, every threadgroup gets fresh ones until the arena is used up.
#ifdef MSL_SANITIZE_THREAD
constexpr size_t kArena = 256 << 20;
#else
constexpr size_t kArena = 128 << 10;
#endif
constexpr size_t kMost = 64 << 10;  // the most that one threadgroup takes, with the gaps
static_assert(kLimit + kMaxShared * kGap < kMost);

// Not memset: sanitizers would take that for an access by the program.
void fill(void* memory, size_t size) {
  __asm__ volatile("rep stosb" : "+D"(memory), "+c"(size) : "a"(0xFF) : "memory");
}
}  // namespace

void make_arena(Executor& e) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, kArena, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED) {
    perror("threadgroup memory");
    abort();
  }
  e.arena = static_cast<char*>(memory);
  belongs_to(kThreadgroup, memory, kArena);
}

void free_arena(Executor& e) {
#ifdef MSL_SANITIZE_ADDRESS
  __asan_unpoison_memory_region(e.arena, kArena);
#endif
  munmap(e.arena, kArena);
}

void Executor::begin_shared() {
#ifdef MSL_SANITIZE_THREAD
  if (shared_top + kMost > kArena) {
    acquire(&end_order);  // all threadgroups so far happened before those that reuse their memory
    release(&begin_order);
    shared_top = 0;
  }
#else
  shared_top = 0;
#endif
  shared_count = 0;
  shared_size = 0;
  order = arena + shared_top;  // addresses for the race detector; nothing is stored there
  shared_top += 64;
#ifdef MSL_SANITIZE_ADDRESS
  __asan_poison_memory_region(arena, kMost);
#endif
}

void* shared_memory(unsigned long size, int id, const char* name) {
  Executor& e = executor();
  for (unsigned i = 0; i < e.shared_count; i++) {
    if (e.shared[i].id == id) return e.shared[i].memory;
  }
  const size_t rounded = (size + 15) / 16 * 16;
  e.shared_size += rounded;
  char why[256] = "";
  if (e.shared_size > kLimit) {
    snprintf(why, sizeof(why), "%lu bytes of threadgroup memory with '%s', of %zu", e.shared_size, name, kLimit);
  } else if (e.shared_count == kMaxShared) {
    snprintf(why, sizeof(why), "more than %u threadgroup variables", kMaxShared);
  }
  if (why[0]) {
    if (current) e.fail("%s", why);
    memcpy(e.failure, why, sizeof(why));  // before the first fiber runs
    return nullptr;
  }
  char* memory = e.arena + e.shared_top;
  e.shared_top += rounded;
#ifdef MSL_SANITIZE_ADDRESS
  e.shared_top += kGap;
  __asan_unpoison_memory_region(memory, size);
#endif
  fill(memory, size);
  e.shared[e.shared_count++] = {id, memory};
  return memory;
}
}  // namespace msl
