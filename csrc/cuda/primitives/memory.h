// Shared memory, and flags in global memory.
#pragma once

#include <cstdint>

#include "thread.h"

namespace fusedformer::cuda {

// The block's one dynamic buffer.
DEVICE char* shared_memory() {
    extern __shared__ __align__(1024) char buffer[];
    return buffer;
}
DEVICE uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

// What WGMMA or TMA reads is written by store_shared or store_matrix, then async_proxy_fence by the same thread, then a
// barrier with the reader.
template <typename T>
DEVICE void store_shared(void* destination, T value) {
    *static_cast<T*>(destination) = value;
}
template <typename T>
DEVICE T load_shared(const void* source) {
    return *static_cast<const T*>(source);
}
DEVICE void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Four 8 x 8 matrices of 16-bit numbers, from fragments as WGMMA's accumulators have them: lane l gives the address of
// row l % 8 of matrix l / 8, and of each matrix holds row l / 4, columns 2 (l % 4) and the next (PTX ISA, "stmatrix").
DEVICE void store_matrix(void* row, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}
// The same, each matrix transposed on its way.
DEVICE void store_matrix_transposed(void* row, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

// 16 bytes at once; both addresses are multiples of 16.
struct alignas(16) Chunk {
    uint32_t words[4];
};

// A flag in global memory by which blocks take turns: what a thread wrote before raising it (and what the threads wrote
// that it met at a barrier before), another sees after waiting for it.
DEVICE void flag_raise(uint32_t* flag, uint32_t value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
DEVICE uint32_t flag_read(const uint32_t* flag) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}
DEVICE void flag_wait(const uint32_t* flag, uint32_t value) {
    while (flag_read(flag) != value) __nanosleep(32);
}
// What it was before. Of the blocks that count on one flag, the last sees what the others wrote before.
DEVICE uint32_t flag_increment(uint32_t* flag) {
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(flag) : "memory");
    return before;
}

}  // namespace fusedformer::cuda
