// A block of threads on the host: its shared memory as threads see it and as the asynchronous units do, its barriers.
//
// What hardware may do early or late is done late (a TMA load lands when somebody waits for it) or, with the
// environment's FUSEDFORMER_EMULATED_SEED other than 0, at a time drawn from the seed, as is the order in which threads
// run. Memory is NaN until it is written. Blocks run one after the other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <vector>

#include "fibers.h"
#include "mma.h"
#include "tensor_core.h"
#include "tma.h"

namespace fusedformer::cuda {

struct Index3 {
    int x, y, z;
};

namespace emulator {

constexpr int kMostThreads = 1024;

// Threads that meet: what bar.sync and the collectives of warps are made of.
struct Meeting {
    int arrived = 0, expected = 0;
    long round = 0;

    // True for the last of `threads`, who ends the round.
    bool arrive(int threads) {
        expected = threads;
        if (++arrived < threads) return false;
        arrived = 0;
        ++round;
        return true;
    }
};

struct Warp {
    Meeting meeting;
    uint64_t slots[2][32];  // of even and odd rounds
};

struct Range {
    uint32_t offset, size;
};

struct Thread {
    std::vector<Range> unpublished;  // stored to shared memory, not yet fenced for the asynchronous units
    TensorCoreQueue products;
    CopyQueue copies;
    std::vector<StoreGroup> stores;  // the last group is open
    std::vector<PendingWrite> writes;
    int registers = 0;
};

// A barrier in shared memory: who initialised it, before how many block_barriers, and whether it was fenced since.
struct Initialised {
    int thread;
    long round;
    bool fenced;
};

struct Block {
    Fibers fibers{kMostThreads};
    Index3 index{}, grid{};
    int threads = 0;
    uint32_t shared_bytes = 0;
    char* shared = nullptr;        // as threads see it
    std::vector<char> async_view;  // as TMA and WGMMA do
    std::vector<char> allocation;
    std::vector<Thread> thread;
    std::vector<Warp> warps;
    std::vector<Meeting> warpgroups;
    Meeting named[16];
    std::vector<PendingLoad> loads;
    std::map<uint32_t, Initialised> barriers;
    int free_registers = 0;

    Thread& self() { return thread[fibers.current()]; }
    Warp& warp() { return warps[fibers.current() / 32]; }
    // The offset of `size` bytes of shared memory, or failure.
    uint32_t offset_of(const void* pointer, size_t size) const;
    void check_range(long offset, size_t size, const char* what) const;
};

// The running one, for the calls below it.
Block& block();

// All blocks, x first; nullptr or the first error.
const char* run_grid(int x, int y, int z, int threads, size_t shared_bytes, const std::function<void()>& kernel);

// Threads of a warp give a number each; a lane sees another's.
uint64_t exchange(uint64_t mine, int lane);
void warp_exchange(uint64_t mine, uint64_t (&all)[32]);
void meet_warp();
void meet_named(int id, int threads, bool wait);
// All of a warpgroup; the last to come does `work` before the others go on.
void meet_warpgroup(const std::function<void()>& work, const char* what);

void stored(const void* destination, size_t size);
void publish();
void change_registers(int count, bool increase);
void wait_for_flag(const uint32_t* flag, uint32_t value);

void barrier_init(uint64_t* bar, int count);
void barrier_init_fence();
void barrier_arrive(uint64_t* bar, int bytes);
void barrier_bytes_came(uint64_t* bar, int bytes);
void barrier_wait(uint64_t* bar, int parity);

}  // namespace emulator
}  // namespace fusedformer::cuda
