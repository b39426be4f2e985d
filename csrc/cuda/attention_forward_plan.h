// Who computes what in attention forward, and where it lies: tiles, work and shared memory of a block.
#pragma once

#include "device.h"
#include "problem.h"

namespace fusedformer::cuda::forward {

constexpr int kRows = 64;  // of a warpgroup
constexpr double kLog2E = 1.4426950408889634;
constexpr float kMinusInfinity = -INFINITY;
constexpr int kFar = 1 << 29;          // an open side of the band; lengths are below it
constexpr int64_t kCached = 24 << 20;  // bytes of K and V to keep within L2's 50 MB

template <int HEAD_DIM_, int KEYS_>
struct Tiles {
    static constexpr int HEAD_DIM = HEAD_DIM_;
    static constexpr int KEYS = KEYS_;
    static constexpr int PANELS = HEAD_DIM / kPanelFeatures;
    static constexpr int CONSUMERS = HEAD_DIM == 64 ? 3 : 2;
    static constexpr int QUERIES = CONSUMERS * kRows;
    static constexpr int STAGES = 2;
    static constexpr int THREADS = (1 + CONSUMERS) * 128;
    // Multiples of 8 that make at most 65536 with the producer's.
    static constexpr int CONSUMER_REGISTERS = CONSUMERS == 3 ? 160 : 240;
    static constexpr int PRODUCER_REGISTERS = CONSUMERS == 3 ? 32 : 24;

    static constexpr int Q_BYTES = kRows * HEAD_DIM * 2;  // of one warpgroup
    static constexpr int KV_BYTES = KEYS * HEAD_DIM * 2;
    static constexpr int K_OFFSET = CONSUMERS * Q_BYTES;
    static constexpr int V_OFFSET = K_OFFSET + STAGES * KV_BYTES;
    static constexpr int BARRIERS_OFFSET = V_OFFSET + STAGES * KV_BYTES;
    static constexpr int SHARED_BYTES = BARRIERS_OFFSET + (2 + 4 * STAGES) * 8;
    static_assert(SHARED_BYTES <= 227 * 1024);
};

// A work is what a block does at a time; a matrix one head of one batch.
struct Params {
    TensorMap q, k, v;
    Tensor4 out;
    float *lse, *lse_residual;
    int heads, group;  // query heads for each key head
    int len_q, len_k, value_dim;
    int first, last;  // query i sees keys i + first .. i + last
    int works, query_blocks, matrices, matrices_at_once;
    float premultiply;                // 1, or a scale that is not positive
    float unit;                       // scores times this are in units of log 2, and these
    float natural, natural_residual;  // times this, in two floats, in natural ones
};

// Where a thread is in a ring of stages.
template <int STAGES>
struct Turn {
    int stage = 0, parity = 0;

    DEVICE void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// The queries from `start` of one head, and the tiles of keys, from `begin` to before `end`, that they see.
struct Work {
    int start;
    int head, batch, matrix;
    int begin, end;
};

HOST_DEVICE int divide_up(int x, int y) { return (x + y - 1) / y; }

template <typename T>
DEVICE Work work_of(const Params& p, int index) {
    Work work;
    const int group_blocks = p.matrices_at_once * p.query_blocks;
    const int first_matrix = index / group_blocks * p.matrices_at_once;
    const int matrices = min(p.matrices_at_once, p.matrices - first_matrix);
    const int within = index % group_blocks;
    work.matrix = first_matrix + within % matrices;
    work.start = (p.query_blocks - 1 - within / matrices) * T::QUERIES;
    work.head = work.matrix % p.heads;
    work.batch = work.matrix / p.heads;
    const int last_query = min(work.start + T::QUERIES, p.len_q) - 1;
    const int begin = max(work.start + p.first, 0);
    const int end = min(last_query + p.last + 1, p.len_k);
    work.begin = begin / T::KEYS;
    work.end = end > begin ? divide_up(end, T::KEYS) : work.begin;
    return work;
}

// A block's shared memory: Q of each consumer, the rings of K and V, the barriers.
template <typename T>
struct Shared {
    char* base;

    DEVICE char* q(int warpgroup) const { return base + warpgroup * T::Q_BYTES; }
    DEVICE char* k(int stage) const { return base + T::K_OFFSET + stage * T::KV_BYTES; }
    DEVICE char* v(int stage) const { return base + T::V_OFFSET + stage * T::KV_BYTES; }
    DEVICE uint64_t* barriers() const { return reinterpret_cast<uint64_t*>(base + T::BARRIERS_OFFSET); }
    DEVICE uint64_t* q_full() const { return barriers(); }
    DEVICE uint64_t* q_empty() const { return barriers() + 1; }
    DEVICE uint64_t* k_full(int stage) const { return barriers() + 2 + stage; }
    DEVICE uint64_t* k_empty(int stage) const { return barriers() + 2 + T::STAGES + stage; }
    DEVICE uint64_t* v_full(int stage) const { return barriers() + 2 + 2 * T::STAGES + stage; }
    DEVICE uint64_t* v_empty(int stage) const { return barriers() + 2 + 3 * T::STAGES + stage; }
};

}  // namespace fusedformer::cuda::forward
