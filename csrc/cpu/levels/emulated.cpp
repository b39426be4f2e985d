// The amx level's code with vectors and tiles emulated on AVX2: slow, built for tests alone, so that all of it is
// proven on machines that have neither.
#ifdef FUSEDFORMER_EMULATED
#pragma GCC target("avx2,fma,f16c")
#define FF_LEVEL emulated
#define FF_WIDTH 16
#define FF_AMX
#define FF_AVX512_BF16
#define FF_EMULATE
#include "../kernels.h"
#endif
