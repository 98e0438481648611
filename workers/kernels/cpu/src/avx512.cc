#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#define KERNELS avx512_kernels
#define NAME "avx512"
#define LANES 16
#include "vector.inc"
#endif
