// Who a thread is, and how threads of a block meet.
#pragma once

#include <cstdint>

#define DEVICE __device__ __forceinline__
#define HOST_DEVICE __host__ __device__ __forceinline__

namespace fusedformer::cuda {

struct Index3 {
    int x, y, z;
};

DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
DEVICE int lane_index() { return static_cast<int>(threadIdx.x) % 32; }
DEVICE Index3 block_index() {
    return {static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z)};
}
DEVICE Index3 grid_size() {
    return {static_cast<int>(gridDim.x), static_cast<int>(gridDim.y), static_cast<int>(gridDim.z)};
}

// Uniform over a warp, and known to the compiler as such: roles that are chosen by them become uniform branches.
DEVICE int warp_index() { return __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / 32, 0); }
DEVICE int warpgroup_index() { return __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / 128, 0); }

DEVICE void block_barrier() { __syncthreads(); }
DEVICE void warp_barrier() { __syncwarp(); }

// Of the 16 hardware barriers 0 is block_barrier's. `threads`, a multiple of 32, sync and arrive together.
DEVICE void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DEVICE void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, x, mask); }
DEVICE float shuffle(float x, int lane) { return __shfl_sync(0xFFFFFFFFu, x, lane); }
DEVICE uint32_t shuffle_xor(uint32_t x, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, x, mask); }
DEVICE uint32_t shuffle(uint32_t x, int lane) { return __shfl_sync(0xFFFFFFFFu, x, lane); }

// Registers of a warpgroup's threads, a multiple of 8 in 24..256: every thread of the warpgroup calls it.
template <int REGISTERS>
DEVICE void registers_increase() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
DEVICE void registers_decrease() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

}  // namespace fusedformer::cuda
