// The lists behind registry.h, in the order of the files.
#include "registry.h"

namespace msl {
namespace {
Kernel *first, *last;

template <class T>
bool append(T*& head, T*& tail, T& entry) {
  (tail ? tail->next : head) = &entry;
  tail = &entry;
  return true;
}
}  // namespace

bool add(File& file, Constant& constant) { return append(file.first_constant, file.last_constant, constant); }
bool add(Kernel& kernel) { return append(first, last, kernel); }
const Kernel* first_kernel() { return first; }
}  // namespace msl
