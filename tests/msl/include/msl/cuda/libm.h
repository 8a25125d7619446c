// The functions of <metal_math> that a library computes, of the GPU's own approximations: there is no library. Errors are
// some units in the last place, as they are under Metal's fast math.
#pragma once

namespace metal {
namespace libm {
MSL_FN float exp2(float x) { return __nvvm_ex2_approx_f(x); }
MSL_FN float log2(float x) { return __nvvm_lg2_approx_f(x); }
MSL_FN float exp(float x) {
  // The exponent in two parts: its rounding would count as often as the result has doubled.
  const float rounded = x * M_LOG2E_F;
  const float rest = __builtin_fmaf(x, M_LOG2E_F, -rounded) + x * 1.925963033e-8f;
  const float power = exp2(rounded);
  return rest - rest == 0.0f ? __builtin_fmaf(power, rest * M_LN2_F, power) : power;
}
MSL_FN float log(float x) { return log2(x) * M_LN2_F; }
MSL_FN float log10(float x) { return log2(x) * 0.30102999566398119521f; }
MSL_FN float pow(float x, float y) { return exp2(y * log2(x)); }
MSL_FN float tanh(float x) {
  const float e = exp(-2.0f * __builtin_fabsf(x));
  return __builtin_copysignf((1.0f - e) / (1.0f + e), x);
}
// An angle less its whole turns: the approximations are good within one.
MSL_FN float turned(float x) {
  const float turns = __builtin_rintf(x * 0.15915494309189533577f);
  return __builtin_fmaf(turns, 1.7484555e-7f, __builtin_fmaf(turns, -6.28318548202514648f, x));
}
MSL_FN float sin(float x) { return __nvvm_sin_approx_f(turned(x)); }
MSL_FN float cos(float x) { return __nvvm_cos_approx_f(turned(x)); }
MSL_FN float tan(float x) { return sin(x) / cos(x); }
MSL_FN float sinh(float x) { return (exp(x) - exp(-x)) * 0.5f; }
MSL_FN float cosh(float x) { return (exp(x) + exp(-x)) * 0.5f; }
MSL_FN float fmod(float x, float y) { return x - y * __builtin_truncf(x / y); }
MSL_FN float atan2(float x, float y) { return __builtin_atan2f(x, y); }  // refused where it is used: nothing has it
}  // namespace libm
}  // namespace metal
