// A thread's place and barriers on an NVIDIA GPU: a threadgroup is a block, a simdgroup a warp.
#pragma once

namespace msl {
// Threadgroups have one dimension: that of every kernel here, and a GPU that says a thread's index would not compute it.
MSL_FN unsigned index_in_threadgroup() { return __nvvm_read_ptx_sreg_tid_x(); }
MSL_FN unsigned threads() { return __nvvm_read_ptx_sreg_ntid_x(); }
MSL_FN unsigned lane() { return index_in_threadgroup() & 31; }
// Where a call is written matters to the executor alone.
struct Site {};
MSL_FN void add_to_trail(Site, unsigned long) {}
}  // namespace msl

#define MSL_HERE msl::Site site = {}

namespace metal {
enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
constexpr MSL_FN mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }

MSL_FN void threadgroup_barrier(mem_flags) { __syncthreads(); }
MSL_FN void simdgroup_barrier(mem_flags) { __nvvm_bar_warp_sync(~0u); }
}  // namespace metal
