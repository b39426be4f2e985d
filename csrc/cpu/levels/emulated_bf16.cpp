// The avx512_bf16 level's code with vectors and dot products emulated on AVX2, as in emulated.cpp.
#ifdef FUSEDFORMER_EMULATED
#pragma GCC target("avx2,fma,f16c")
#define FF_LEVEL emulated_bf16
#define FF_WIDTH 16
#define FF_AVX512_BF16
#define FF_EMULATE
#include "../kernels.h"
#endif
