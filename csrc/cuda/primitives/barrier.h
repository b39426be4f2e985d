// Barriers in shared memory that count arrivals and bytes (PTX ISA, "mbarrier").
//
// A phase ends when `count` threads have arrived and all bytes expected in it have come; then the next begins.
// barrier_wait(bar, parity) returns once the phase of that parity (the first is 0) has ended: on a new barrier a wait
// for parity 1 returns at once.
#pragma once

#include <cstdint>

#include "memory.h"
#include "thread.h"

namespace fusedformer::cuda {

DEVICE void barrier_init(uint64_t* bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory");
}
// By the thread that initialised, before the block_barrier that shows the barriers to the others and to TMA.
DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEVICE void barrier_arrive(uint64_t* bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
// Arrives, and lets the phase wait for `bytes` of TMA's too.
DEVICE void barrier_expect_bytes(uint64_t* bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes)
                 : "memory");
}
DEVICE void barrier_wait(uint64_t* bar, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over;\n"
        "bra again;\n"
        "over:\n"
        "}\n" ::"r"(shared_address(bar)),
        "r"(parity)
        : "memory");
}

}  // namespace fusedformer::cuda
