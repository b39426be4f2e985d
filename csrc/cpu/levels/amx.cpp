#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")
#define FF_LEVEL amx
#define FF_WIDTH 16
#define FF_AVX512
#define FF_AVX512_BF16
#define FF_AMX
#include "../kernels.h"
