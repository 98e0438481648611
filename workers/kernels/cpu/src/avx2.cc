#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define KERNELS avx2_kernels
#define NAME "avx2"
#define LANES 8
#include "vector.inc"
#endif
