#define KERNELS portable_kernels
#define NAME "portable"
#define LANES 4
#include "vector.inc"
