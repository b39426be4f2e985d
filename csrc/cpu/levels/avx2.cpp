#pragma GCC target("avx2,fma,f16c")
#define FF_LEVEL avx2
#define FF_WIDTH 8
#define FF_AVX2
#include "../kernels.h"
