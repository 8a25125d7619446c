// float to bfloat, which clang calls a library function for: libgcc has it only since version 13.
#include <stdint.h>

extern "C" __bf16 __truncsfbf2(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  const bool nan = (bits & 0x7FFFFFFF) > 0x7F800000;
  const uint32_t to_nearest_even = bits + 0x7FFF + (bits >> 16 & 1);
  const uint32_t rounded = nan ? bits | 0x400000 : to_nearest_even;
  return __builtin_bit_cast(__bf16, uint16_t(rounded >> 16));
}
