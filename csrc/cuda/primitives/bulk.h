// The copy engine on plain bytes: between global and shared memory, and sums of float32 in global memory.
//
// Addresses and sizes are multiples of 16 bytes; called by one thread. Stores and sums run in the groups of tma_store,
// closed by tma_store_commit; tma_store_wait<0> says that shared memory has been read, bulk_wait that all is written.
#pragma once

#include <cstdint>

#include "memory.h"

namespace fusedformer::cuda {

DEVICE void bulk_load(void* shared, const void* global, int bytes, uint64_t* bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(bar))
                 : "memory");
}
DEVICE void bulk_store(float* global, const void* shared, int bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
                 "r"(shared_address(shared)), "r"(bytes)
                 : "memory");
}
DEVICE void bulk_add(float* global, const void* shared, int bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
                 "r"(shared_address(shared)), "r"(bytes)
                 : "memory");
}
// Until all of the thread's committed groups are written, and seen by it: a flag may be raised.
DEVICE void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// Between a flag in global memory and the copy engine's work on what it stands for, on both sides.
DEVICE void bulk_fence() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

}  // namespace fusedformer::cuda
