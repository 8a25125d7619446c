// msl_run: checks a launch against its kernel, then runs the threadgroups one after another.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "abi.h"
#include "scheduler.h"

namespace msl {
namespace {
constexpr unsigned kBuffers = 31;
constexpr uint64_t kMaxBytes = 4096;  // of setBytes

class Launch {
 public:
  explicit Launch(const msl_launch& launch) : launch_(launch), e_(executor()) {}
  ~Launch() {
    for (unsigned i = 0; i < copy_count_; i++) free(copies_[i]);
  }
  Launch(const Launch&) = delete;

  bool run() { return find_kernel() && check_grid() && set_constants() && bind() && execute(); }
  const char* error() const { return error_; }

 private:
  bool refuse(const char* format, ...) __attribute__((format(printf, 2, 3))) {
    int used = snprintf(error_, sizeof(error_), "%s: ", launch_.kernel ? launch_.kernel : "(no name)");
    va_list arguments;
    va_start(arguments, format);
    if (used < int(sizeof(error_))) vsnprintf(error_ + used, sizeof(error_) - used, format, arguments);
    va_end(arguments);
    return false;
  }

  bool find_kernel() {
    if (!launch_.kernel) return refuse("a kernel must be named");
    for (kernel_ = first_kernel(); kernel_; kernel_ = kernel_->next) {
      if (strcmp(kernel_->name, launch_.kernel) == 0) break;
    }
    return kernel_ || refuse("no such kernel");
  }

  bool check_grid() {
    const uint32_t *threads = launch_.threads, *groups = launch_.threadgroups;
    const uint64_t product = uint64_t(threads[0]) * threads[1];
    if (!threads[0] || !threads[1] || !threads[2]) return refuse("an empty threadgroup");
    if (!groups[0] || !groups[1] || !groups[2]) return refuse("an empty grid");
    if (product > kMaxThreads || product * threads[2] > kMaxThreads) {
      return refuse("%ux%ux%u threads in a threadgroup, at most 1024", threads[0], threads[1], threads[2]);
    }
    return true;
  }

  // A constant that the launch leaves out is poison. That is refused where the kernel reads it, unless the file asks
  // is_function_constant_defined about it.
  bool set_constants() {
    for (const Constant* c = kernel_->file->first_constant; c; c = c->next) {
      memset(c->value(), 0xFF, c->size);
      *c->defined() = false;
    }
    for (unsigned i = 0; i < launch_.constant_count; i++) {
      const msl_constant& given = launch_.constants[i];
      const Constant* c = find_constant(given.index);
      if (!c) return refuse("function constant %u: the kernel's file has none of that index", given.index);
      if (c->size != given.size) {
        return refuse("function constant %u '%s': %u bytes given, it has %lu", given.index, c->name, given.size,
                      c->size);
      }
      if (*c->defined()) return refuse("function constant %u '%s' is given twice", given.index, c->name);
      memcpy(c->value(), given.value, c->size);
      *c->defined() = true;
    }
    for (const int* index = kernel_->required; *index >= 0; index++) {
      const Constant* c = find_constant(unsigned(*index));
      if (!*c->defined()) return refuse("function constant %d '%s' is not set", *index, c->name);
    }
    for (void (*const* derive)() = kernel_->derived; *derive; derive++) (*derive)();
    return true;
  }

  const Constant* find_constant(unsigned index) const {
    const Constant* c = kernel_->file->first_constant;
    while (c && c->index != int(index)) c = c->next;
    return c;
  }

  bool bind() {
    const msl_binding* bound[kBuffers] = {};
    for (unsigned i = 0; i < launch_.binding_count; i++) {
      const msl_binding& given = launch_.bindings[i];
      if (!parameter(Parameter::kBuffer, given.index)) return refuse("buffer %u: the kernel has no such", given.index);
      if (given.kind > MSL_BYTES) return refuse("buffer %u: unknown kind %u", given.index, given.kind);
      if (bound[given.index]) return refuse("buffer %u is bound twice", given.index);
      bound[given.index] = &given;
    }
    for (unsigned i = 0; i < launch_.threadgroup_memory_count; i++) {
      const unsigned size = launch_.threadgroup_memory[i];
      if (!parameter(Parameter::kShared, i)) return refuse("threadgroup memory %u: the kernel has no such", i);
      if (size == 0 || size % 16) return refuse("threadgroup memory %u: %u bytes, not a multiple of 16", i, size);
    }
    e_.arguments = {};
    for (unsigned i = 0; i < kernel_->parameter_count; i++) {
      const Parameter& p = kernel_->parameters[i];
      if (p.kind == Parameter::kShared && unsigned(p.index) >= launch_.threadgroup_memory_count) {
        return refuse("threadgroup memory %d '%s' is not given", p.index, p.name);
      }
      if (p.kind == Parameter::kBuffer && unsigned(p.index) >= kBuffers) return refuse("buffer %d of 31", p.index);
      if (p.kind != Parameter::kBuffer || (p.enabled && !p.enabled())) continue;
      if (!bound[p.index]) return refuse("buffer %d '%s' is not bound", p.index, p.name);
      if (!bind_one(p, kernel_->shapes[i], *bound[p.index])) return false;
    }
    return true;
  }

  const Parameter* parameter(Parameter::Kind kind, unsigned index) const {
    for (unsigned i = 0; i < kernel_->parameter_count; i++) {
      const Parameter& p = kernel_->parameters[i];
      if (p.kind == kind && p.index == int(index)) return &p;
    }
    return nullptr;
  }

  bool bind_one(const Parameter& p, const Shape& shape, const msl_binding& given) {
    if (shape.writable != (given.kind == MSL_WRITE)) {
      return refuse("buffer %d '%s' is %s", p.index, p.name,
                    shape.writable ? "written by the kernel, but bound for reading" : "read, but bound for writing");
    }
    void* pointer = given.pointer;
    if (given.kind == MSL_BYTES) {
      if (given.size > kMaxBytes) return refuse("buffer %d '%s': %lu bytes, at most 4096", p.index, p.name, given.size);
      if (shape.reference ? given.size != shape.size : given.size % shape.size) {
        return refuse("buffer %d '%s': %lu bytes, its type has %lu", p.index, p.name, given.size, shape.size);
      }
      pointer = copies_[copy_count_++] = malloc(given.size);
      memcpy(pointer, given.pointer, given.size);
    } else if (shape.reference && given.size < shape.size) {
      return refuse("buffer %d '%s': %lu bytes, its type has %lu", p.index, p.name, given.size, shape.size);
    }
    if (!pointer && given.size) return refuse("buffer %d '%s' is null", p.index, p.name);
    const uint64_t alignment = p.packed ? shape.element : shape.alignment;
    if (reinterpret_cast<uintptr_t>(pointer) % alignment) {
      return refuse("buffer %d '%s' is not aligned to %lu bytes", p.index, p.name, alignment);
    }
    e_.arguments.buffers[p.index] = pointer;
    return true;
  }

  bool execute() {
    const uint32_t *t = launch_.threads, *g = launch_.threadgroups;
    e_.kernel = kernel_;
    e_.threads = Uint3{t[0], t[1], t[2]};
    e_.threadgroups = Uint3{g[0], g[1], g[2]};
    e_.seed = launch_.seed;
    e_.shared_parameters = launch_.threadgroup_memory;
    e_.shared_parameter_count = launch_.threadgroup_memory_count;
    e_.begin_launch();
    const uint64_t total = uint64_t(g[0]) * g[1] * g[2];
    for (uint64_t i = 0; i < total && !e_.failure[0]; i++) {
      const uint64_t at = e_.seed % 2 ? total - 1 - i : (i + e_.seed / 2 % total) % total;
      e_.group = Uint3{unsigned(at % g[0]), unsigned(at / g[0] % g[1]), unsigned(at / g[0] / g[1])};
      e_.run_threadgroup();
    }
    e_.end_launch();
    return !e_.failure[0] || refuse("threadgroup %u, %u, %u: %s", e_.group[0], e_.group[1], e_.group[2], e_.failure);
  }

  const msl_launch& launch_;
  Executor& e_;
  const Kernel* kernel_ = nullptr;
  void* copies_[kBuffers];
  unsigned copy_count_ = 0;
  char error_[1280] = "";
};
}  // namespace
}  // namespace msl

uint32_t msl_abi(void) { return 1; }

uint32_t msl_kernel_count(void) {
  uint32_t count = 0;
  for (const msl::Kernel* kernel = msl::first_kernel(); kernel; kernel = kernel->next) count++;
  return count;
}

const char* msl_kernel_name(uint32_t index) {
  const msl::Kernel* kernel = msl::first_kernel();
  while (kernel && index--) kernel = kernel->next;
  return kernel ? kernel->name : nullptr;
}

int msl_run(const msl_launch* launch, char* error, uint64_t error_size) {
  msl::Launch attempt(*launch);
  if (attempt.run()) return 0;
  snprintf(error, error_size, "%s", attempt.error());
  return 1;
}
