#define FF_LEVEL portable
#define FF_WIDTH 4
#include "../kernels.h"
