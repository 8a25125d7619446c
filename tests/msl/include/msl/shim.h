// The Metal Shading Language for clang, included before every rewritten .metal file.
//
// With MSL_CHECK the address spaces are real and nothing runs: strict type check. Without it they vanish, and barriers
// and simdgroup operations call the executor in runtime/, or, with MSL_CUDA, are a GPU's own.
#pragma once
#ifdef MSL_CUDA
#pragma clang force_cuda_host_device begin
#endif
#include "spaces.h"
#include "types.h"
#include "traits.h"
#include "construct.h"
#include "limits.h"
#ifdef MSL_CUDA
#include "cuda/libm.h"
#else
#include "libm.h"
#endif
#include "math.h"
#include "integer.h"
#include "relational.h"
#ifdef MSL_CUDA
#include "cuda/sync.h"
#include "cuda/simdgroup.h"
#else
#include "sync.h"
#include "simdgroup.h"
#endif
#include "matrix.h"
#include "atomic.h"
#ifdef MSL_CUDA
#include "cuda/table.h"
#elif !defined(MSL_CHECK)
#include "table.h"
#endif
#include "keywords.h"
