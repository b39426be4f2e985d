#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#define FF_LEVEL amx
#define FF_WIDTH 16
#include "../kernels.h"
