// Switching between stacks, with the sanitizers told.
#pragma once
#include "executor.h"

namespace msl {
// A stack of its own for `context`, which will begin in `entry`; released by free_stack.
void make_stack(Context&);
void free_stack(Context&);

// The next switch to `context` calls `entry`, on an empty stack. `stagger` spreads the stacks' tops over the cache.
void prepare(Context&, void (*entry)(), unsigned stagger);
// The stack may have been left in the middle of a function.
void forget(Context&);
// For the race detector: what runs next in this context is a stranger to what ran before. Without it, a barrier would
// order the threads of a threadgroup behind all earlier threadgroups.
void make_stranger(Context&);

// Keeps what runs now in `from`, and goes on with `to`. A `from` that has ended is never switched to again.
void switch_context(Context& from, Context& to, bool from_ended);
// First of all in `entry`: the switch that led to it is over.
void entered(Context& main);

void adopt_thread(Context& main);  // `main` is the stack that runs now

// The race detector's orders: what happened before release(x) happened before what follows acquire(x).
void acquire(void*);
void release(void*);

// The race detector has one order for all memory, a barrier may order one kind only: so it watches one kind at a time.
enum Memory : unsigned { kDevice = 1, kThreadgroup = 2 };  // as in metal::mem_flags
void watch(Memory);                                         // from now on; before the first launch
bool orders(unsigned flags);                                // does a barrier with these flags order what is watched?
void belongs_to(Memory, void*, unsigned long size);
}  // namespace msl
