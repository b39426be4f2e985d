// Launching a kernel, on the machine or in the emulator.
#pragma once

#include <cstddef>

#ifdef FUSEDFORMER_EMULATED
#include "emulator/cta.h"
#else
#include <cuda_runtime.h>
#endif

namespace fusedformer::cuda {

struct Grid {
    int x, y = 1, z = 1;
};

// Multiprocessors of the current device; few in the emulator: blocks of small problems too take several turns.
inline int processors() {
#ifdef FUSEDFORMER_EMULATED
    return 3;
#else
    int device = 0, count = 1;
    if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
#endif
}

// Runs `kernel(params)`; nullptr, or why not. The message of an emulated failure lives until the thread's next launch.
template <auto kernel, typename Params>
const char* launch(Grid grid, int threads, size_t shared_bytes, void* stream, const Params& params) {
#ifdef FUSEDFORMER_EMULATED
    (void)stream;
    return emulator::run_grid(grid.x, grid.y, grid.z, threads, shared_bytes, [&] { kernel(params); });
#else
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error == cudaSuccess) {
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(grid.x, grid.y, grid.z);
        config.blockDim = dim3(threads);
        config.dynamicSmemBytes = shared_bytes;
        config.stream = static_cast<cudaStream_t>(stream);
        error = cudaLaunchKernelEx(&config, kernel, params);
    }
    if (error == cudaSuccess) return nullptr;
    (void)cudaGetLastError();  // the failure is reported here, not by the next call
    return cudaGetErrorString(error);
#endif
}

}  // namespace fusedformer::cuda
