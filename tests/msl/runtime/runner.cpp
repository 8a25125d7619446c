// The program that runs a file of launches: for the sanitizers, which want to be in a program from its start.
//
// Little-endian: "MSLRUN1\0"; u32 buffers, each: u64 size, u64 misalignment, bytes; u32 launches, each: u32 length and
// name, u64 seed, u32[3] threadgroups, u32[3] threads, u32 n and u32[n] threadgroup memory, u32 n and n constants (u32
// index, u32 size, u8[8]), u32 n and n bindings (u32 index, u32 kind, then u32 buffer, u64 offset, u64 size; for bytes
// u32 length, bytes). The buffers' contents after the last launch go to FILE.out.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef MSL_SANITIZE_THREAD
#include <sys/wait.h>
#include <unistd.h>
#endif

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "abi.h"
#include "fiber.h"

#ifdef MSL_SANITIZE_ADDRESS
extern "C" void __asan_poison_memory_region(const volatile void*, size_t);
#endif

namespace {
[[noreturn]] void stop(const char* what, const char* name) {
  fprintf(stderr, "%s: %s\n", name, what);
  exit(1);
}

std::vector<char> read_all(const char* name) {
  FILE* file = fopen(name, "rb");
  if (!file) stop("cannot be read", name);
  std::vector<char> bytes;
  char part[65536];
  for (size_t n; (n = fread(part, 1, sizeof(part), file)) > 0;) bytes.insert(bytes.end(), part, part + n);
  fclose(file);
  return bytes;
}

class Reader {
 public:
  Reader(const char* name, const std::vector<char>& bytes) : name_(name), bytes_(bytes) {}

  const char* take(uint64_t size) {
    if (size > bytes_.size() - at_) stop("ends too early", name_);
    at_ += size;
    return bytes_.data() + at_ - size;
  }
  template <class T>
  T value() {
    T result;
    memcpy(&result, take(sizeof(T)), sizeof(T));
    return result;
  }
  uint32_t u32() { return value<uint32_t>(); }
  uint64_t u64() { return value<uint64_t>(); }
  template <class T>
  std::vector<T> list() {
    std::vector<T> result(u32());
    for (T& entry : result) entry = value<T>();
    return result;
  }

 private:
  const char* name_;
  const std::vector<char>& bytes_;
  uint64_t at_ = 0;
};

struct Buffer {
  std::unique_ptr<char, decltype(&free)> memory{nullptr, free};
  char* data = nullptr;
  uint64_t size = 0;
};

// Ends where its allocation ends, so that the address sanitizer sees the first byte too far.
Buffer read_buffer(Reader& in) {
  const uint64_t size = in.u64(), misalignment = in.u64();
  std::unique_ptr<char, decltype(&free)> memory(static_cast<char*>(malloc(misalignment + size)), free);
  char* data = memory.get() + misalignment;
#ifdef MSL_SANITIZE_ADDRESS
  __asan_poison_memory_region(memory.get(), misalignment);
#endif
  memcpy(data, in.take(size), size);
  msl::belongs_to(msl::kDevice, memory.get(), misalignment + size);
  return {std::move(memory), data, size};
}

msl_binding read_binding(Reader& in, const std::vector<Buffer>& buffers, const char* name) {
  msl_binding binding = {};
  binding.index = in.u32();
  binding.kind = in.u32();
  if (binding.kind == MSL_BYTES) {
    binding.size = in.u32();
    binding.pointer = const_cast<char*>(in.take(binding.size));
    return binding;
  }
  const uint32_t buffer = in.u32();
  const uint64_t offset = in.u64();
  binding.size = in.u64();
  if (buffer >= buffers.size()) stop("names a buffer that it does not have", name);
  if (offset > buffers[buffer].size || binding.size > buffers[buffer].size - offset) {
    stop("binds more than a buffer has", name);
  }
  binding.pointer = buffers[buffer].data + offset;
  return binding;
}

void run_launch(Reader& in, const std::vector<Buffer>& buffers, const char* file) {
  msl_launch launch = {};
  const uint32_t length = in.u32();
  const std::string name(in.take(length), length);
  launch.kernel = name.c_str();
  launch.seed = in.u64();
  for (uint32_t& n : launch.threadgroups) n = in.u32();
  for (uint32_t& n : launch.threads) n = in.u32();
  const auto memory = in.list<uint32_t>();
  launch.threadgroup_memory = memory.data();
  launch.threadgroup_memory_count = uint32_t(memory.size());
  const auto constants = in.list<msl_constant>();
  launch.constants = constants.data();
  launch.constant_count = uint32_t(constants.size());
  std::vector<msl_binding> bindings(in.u32());
  for (msl_binding& binding : bindings) binding = read_binding(in, buffers, file);
  launch.bindings = bindings.data();
  launch.binding_count = uint32_t(bindings.size());
  char error[1280];
  if (msl_run(&launch, error, sizeof(error))) stop(error, file);
}

int run_file(const char* name) {
  const std::vector<char> bytes = read_all(name);
  Reader in(name, bytes);
  if (memcmp(in.take(8), "MSLRUN1", 8) != 0) stop("is no file of launches", name);
  std::vector<Buffer> buffers(in.u32());
  for (Buffer& buffer : buffers) buffer = read_buffer(in);
  for (uint32_t left = in.u32(); left > 0; left--) run_launch(in, buffers, name);
  FILE* out = fopen((std::string(name) + ".out").c_str(), "wb");
  if (!out) stop("its output cannot be written", name);
  for (const Buffer& buffer : buffers) fwrite(buffer.data, 1, buffer.size, out);
  if (fclose(out)) stop("its output cannot be written", name);
  return 0;
}

#ifdef MSL_SANITIZE_THREAD
// Once for each kind of memory.
int run(const char* name) {
  for (msl::Memory memory : {msl::kThreadgroup, msl::kDevice}) {
    const pid_t child = fork();
    if (child == 0) {
      msl::watch(memory);
      return run_file(name);
    }
    int status = 0;
    if (child < 0 || waitpid(child, &status, 0) != child) stop("cannot be run in a process of its own", name);
    if (status) return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
  }
  return 0;
}
#else
int run(const char* name) { return run_file(name); }
#endif
}  // namespace

int main(int count, char** arguments) {
  if (count != 2) stop("takes one file of launches", arguments[0]);
  return run(arguments[1]);
}
