// The one include of a kernel: the machine's primitives, or with FUSEDFORMER_EMULATED the host's imitation of them.
//
// Both sides declare the same functions. A kernel is written in terms of them alone, so that g++ can compile it too and
// a test can run it, thread by thread, where there is no GPU.
#pragma once

#include <cstdint>

#ifdef FUSEDFORMER_EMULATED
#include "emulator/device.h"
#else
#include "primitives/barrier.h"
#include "primitives/bulk.h"
#include "primitives/math.h"
#include "primitives/memory.h"
#include "primitives/mma.h"
#include "primitives/thread.h"
#include "primitives/tma.h"
#include "primitives/wgmma.h"
#endif
#include "descriptor.h"
