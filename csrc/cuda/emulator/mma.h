// A warp's products of fragments, and copies to shared memory that land when they are waited for.
#pragma once

#include <cstdint>
#include <vector>

namespace fusedformer::cuda::emulator {

// 16 bytes on their way.
struct PendingCopy {
    uint32_t destination;  // in shared memory
    const void* source;    // null: zeros
    long group;
};

// A thread's copies. Waiting shows them to the thread alone, a barrier after it to the others: since no thread reads
// its own copies alone, they land at the barrier.
struct CopyQueue {
    std::vector<PendingCopy> copies;
    long groups = 0;      // committed
    long done_below = 0;  // groups that were waited for
};

void copy_async(void* destination, const void* source, bool exists);
void commit_copies();
void wait_for_copies(int pending);
void land_copies();

// One thread's part in a product of its warp.
struct FragmentProduct {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
    bool bf16;
};
void multiply(FragmentProduct mine);

void load_matrix(uint32_t (&r)[4], const void* row, bool transposed);

}  // namespace fusedformer::cuda::emulator
