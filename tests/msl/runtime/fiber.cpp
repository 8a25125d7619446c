// The context switch (x86-64 only) and the sanitizers' fiber interfaces.
#include "fiber.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#ifndef __x86_64__
#error "the context switch is written for x86-64"
#endif

extern "C" {
void msl_switch_stack(void** save, void* to);
#ifdef MSL_SANITIZE_THREAD
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void* __tsan_get_current_fiber();
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateBenignRaceSized(const char*, int, const volatile void*, long, const char*);
#endif
#ifdef MSL_SANITIZE_ADDRESS
void __sanitizer_start_switch_fiber(void**, const void*, size_t);
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
void __asan_unpoison_memory_region(const volatile void*, size_t);
#endif
}

__asm__(R"(
.text
.globl msl_switch_stack
.hidden msl_switch_stack
.type msl_switch_stack,@function
msl_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size msl_switch_stack, .-msl_switch_stack
)");

namespace msl {
namespace {
constexpr size_t kGuard = 4096;
#if defined(MSL_SANITIZE_ADDRESS) || defined(MSL_SANITIZE_THREAD)
constexpr size_t kStack = 512 << 10;
#else
constexpr size_t kStack = 128 << 10;
#endif

unsigned watched = kDevice | kThreadgroup;

char* map(void* where, size_t size, int flags) {
  flags |= MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(where, size, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED) {
    perror("the stack of a fiber");
    abort();
  }
  return static_cast<char*>(memory);
}
}  // namespace

void make_stack(Context& context) {
  char* memory = map(nullptr, kGuard + kStack, 0);
  mprotect(memory, kGuard, PROT_NONE);
  context.stack_bottom = memory + kGuard;
  context.stack_size = kStack;
#ifdef MSL_SANITIZE_THREAD
  context.sanitizer_fiber = __tsan_create_fiber(0);
#endif
}

void free_stack(Context& context) {
#ifdef MSL_SANITIZE_THREAD
  __tsan_destroy_fiber(context.sanitizer_fiber);
#endif
  munmap(const_cast<char*>(static_cast<const char*>(context.stack_bottom)) - kGuard, kGuard + kStack);
}

void prepare(Context& context, void (*entry)(), unsigned stagger) {
  char* top = const_cast<char*>(static_cast<const char*>(context.stack_bottom)) + kStack - 64 - stagger % 61 * 320;
  void** stack = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15));
  *--stack = nullptr;  // no return address: the entry never returns
  *--stack = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--stack = nullptr;
  context.stack_pointer = stack;
  context.fake_stack = nullptr;
}

void make_stranger([[maybe_unused]] Context& context) {
#ifdef MSL_SANITIZE_THREAD
  __tsan_destroy_fiber(context.sanitizer_fiber);
  context.sanitizer_fiber = __tsan_create_fiber(0);
  Unobserved unobserved;  // a fresh stack, that nobody has written to
  map(const_cast<void*>(context.stack_bottom), kStack, MAP_FIXED);
#endif
}

void forget(Context& context) {
  make_stranger(context);
#ifdef MSL_SANITIZE_ADDRESS
  __asan_unpoison_memory_region(context.stack_bottom, context.stack_size);
#endif
}

void switch_context(Context& from, Context& to, [[maybe_unused]] bool from_ended) {
#ifdef MSL_SANITIZE_THREAD
  const unsigned without_order = 1;
  __tsan_switch_to_fiber(to.sanitizer_fiber, without_order);
#endif
#ifdef MSL_SANITIZE_ADDRESS
  __sanitizer_start_switch_fiber(from_ended ? nullptr : &from.fake_stack, to.stack_bottom, to.stack_size);
#endif
  msl_switch_stack(&from.stack_pointer, to.stack_pointer);
#ifdef MSL_SANITIZE_ADDRESS
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void entered([[maybe_unused]] Context& main) {
#ifdef MSL_SANITIZE_ADDRESS
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (!main.stack_bottom) main.stack_bottom = bottom, main.stack_size = size;  // the first switch of all came from main
#endif
}

void adopt_thread([[maybe_unused]] Context& main) {
#ifdef MSL_SANITIZE_THREAD
  main.sanitizer_fiber = __tsan_get_current_fiber();
#endif
}

void acquire([[maybe_unused]] void* at) {
#ifdef MSL_SANITIZE_THREAD
  __tsan_acquire(at);
#endif
}

void release([[maybe_unused]] void* at) {
#ifdef MSL_SANITIZE_THREAD
  __tsan_release(at);
#endif
}

void watch(Memory memory) { watched = memory; }

bool orders(unsigned flags) { return flags & watched; }

void belongs_to([[maybe_unused]] Memory memory, [[maybe_unused]] void* start, [[maybe_unused]] unsigned long size) {
#ifdef MSL_SANITIZE_THREAD
  if (!(memory & watched)) AnnotateBenignRaceSized(__FILE__, __LINE__, start, long(size), "not watched");
#endif
}
}  // namespace msl
