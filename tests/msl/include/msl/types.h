// Scalars, vectors, and the named constants of <metal_math>.
#pragma once

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef _Float16 half;
typedef __bf16 bfloat;

constexpr half operator""h(long double value) { return half(value); }
constexpr half operator""h(unsigned long long value) { return half(value); }
constexpr half operator""H(long double value) { return half(value); }

#define MSL_VECTOR(T, N) typedef T T##N __attribute__((ext_vector_type(N)));
// Packed vectors have the alignment of their elements. Those of three are missing: clang gives them the size of four.
#define MSL_PACKED(T, N) typedef T packed_##T##N __attribute__((ext_vector_type(N), aligned(sizeof(T))));
#define MSL_VECTORS_OF(T) MSL_VECTOR(T, 2) MSL_VECTOR(T, 3) MSL_VECTOR(T, 4) MSL_PACKED(T, 2) MSL_PACKED(T, 4)
MSL_VECTORS_OF(char)
MSL_VECTORS_OF(uchar)
MSL_VECTORS_OF(short)
MSL_VECTORS_OF(ushort)
MSL_VECTORS_OF(int)
MSL_VECTORS_OF(uint)
MSL_VECTORS_OF(long)
MSL_VECTORS_OF(ulong)
MSL_VECTORS_OF(half)
MSL_VECTORS_OF(bfloat)
MSL_VECTORS_OF(float)

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define MAXFLOAT FLT_MAX
#define HALF_MAX half(65504.0f)
#define MAXHALF HALF_MAX
#define HALF_MIN half(6.103515625e-05f)
#define CHAR_BIT 8
#define SHRT_MAX 32767
#define USHRT_MAX 65535
#define INT_MAX 2147483647
#define INT_MIN (-INT_MAX - 1)
#define UINT_MAX 4294967295u
#define M_PI_F 3.14159265358979323846f
#define M_2_SQRTPI_F 1.12837916709551257390f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.69314718055994530942f
