// The Metal Shading Language for clang, included before every rewritten .metal file.
//
// With MSL_CHECK the address spaces are real and nothing runs: strict type check. Without it they vanish, and barriers
// and simdgroup operations call the executor in runtime/.
#pragma once
#include "spaces.h"
#include "types.h"
#include "traits.h"
#include "construct.h"
#include "limits.h"
#include "math.h"
#include "integer.h"
#include "relational.h"
#include "sync.h"
#include "simdgroup.h"
#include "matrix.h"
#include "atomic.h"
#ifndef MSL_CHECK
#include "table.h"
#endif
#include "keywords.h"
