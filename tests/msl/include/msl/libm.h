// The functions of <metal_math> that a library computes.
#pragma once

namespace metal {
namespace libm {
MSL_FN float exp(float x) { return __builtin_expf(x); }
MSL_FN float exp2(float x) { return __builtin_exp2f(x); }
MSL_FN float log(float x) { return __builtin_logf(x); }
MSL_FN float log2(float x) { return __builtin_log2f(x); }
MSL_FN float log10(float x) { return __builtin_log10f(x); }
MSL_FN float sin(float x) { return __builtin_sinf(x); }
MSL_FN float cos(float x) { return __builtin_cosf(x); }
MSL_FN float tan(float x) { return __builtin_tanf(x); }
MSL_FN float sinh(float x) { return __builtin_sinhf(x); }
MSL_FN float cosh(float x) { return __builtin_coshf(x); }
MSL_FN float tanh(float x) { return __builtin_tanhf(x); }
MSL_FN float pow(float x, float y) { return __builtin_powf(x, y); }
MSL_FN float fmod(float x, float y) { return __builtin_fmodf(x, y); }
MSL_FN float atan2(float x, float y) { return __builtin_atan2f(x, y); }
}  // namespace libm
}  // namespace metal
