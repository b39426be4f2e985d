// Before and after the main kernel: what it needs of each query, and dQ from its sums.
#pragma once

#include "attention_backward_plan.h"

namespace fusedformer::cuda::backward {

// Δ = rowsum(dO ∘ O) - dlse and the log-sum-exp in base 2 of a block of queries, up to the block's end, and its turn
// set to the first. Weights are exp2 of a difference to the log-sum-exp: +inf makes those of an empty row 0.
template <typename T, bool BF16>
__global__ void __launch_bounds__(kThreads) attention_backward_rows_kernel(const __grid_constant__ Params p) {
    constexpr int LANES = T::HEAD_DIM / 8;  // of a row, 16 bytes each
    const int matrix = block_index().x / p.query_blocks, first_row = block_index().x % p.query_blocks * T::QUERIES;
    const int64_t head = matrix % p.heads, batch = matrix / p.heads;
    const int feature = thread_index() % LANES * 8;
    if (thread_index() == 0) {
        p.workspace.turns[block_index().x] = 0;
        if (block_index().x == 0) *p.workspace.started = 0;
    }
    for (int within = thread_index() / LANES; within < T::QUERIES; within += kThreads / LANES) {
        const int row = first_row + within;
        float delta = 0.0f;
        if (row < p.band.len_q && feature < p.value_dim) {
            const auto load = [&](const Tensor4& x) {
                const int64_t offset = batch * x.batch_stride + head * x.head_stride + row * x.row_stride + feature;
                return *reinterpret_cast<const Chunk*>(static_cast<const uint16_t*>(x.data) + offset);
            };
            const Chunk out = load(p.out), grad_out = load(p.grad_out_rows);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                delta = fmaf(unpack_low<BF16>(out.words[i]), unpack_low<BF16>(grad_out.words[i]), delta);
                delta = fmaf(unpack_high<BF16>(out.words[i]), unpack_high<BF16>(grad_out.words[i]), delta);
            }
        }
#pragma unroll
        for (int lane = 1; lane < LANES; lane *= 2) delta += shuffle_xor(delta, lane);
        if (feature != 0) continue;
        const int64_t from = static_cast<int64_t>(matrix) * p.band.len_q + row;
        const bool empty = row >= p.band.len_q || p.lse[from] == -INFINITY;
        if (!empty && p.grad_lse != nullptr) delta -= p.grad_lse[from];
        const int64_t to = static_cast<int64_t>(block_index().x) * T::QUERIES + within;
        p.workspace.delta[to] = empty ? 0.0f : delta;
        p.workspace.lse[to] = empty ? INFINITY : fmaf(p.lse[from], kLog2E, p.lse_residual[from] * kLog2E);
    }
}

// dQ = scale * sums, 0 where no block of keys is seen; the sums are read as the consumers' threads wrote them.
template <typename T, bool BF16>
__global__ void __launch_bounds__(kThreads) attention_backward_round_kernel(const __grid_constant__ Params p) {
    const int matrix = block_index().x / p.query_blocks, block = block_index().x % p.query_blocks;
    const int warpgroup = warpgroup_index();
    float grad_q[kPanelFeatures / 2] = {};  // (64, 64)
    if (p.band.key_blocks<T>(block).size() > 0) {
        const float* sums = p.workspace.grad_q + static_cast<int64_t>(block_index().x) * (T::QUERIES * T::HEAD_DIM);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const auto four = reinterpret_cast<const Four*>(sums)[(warpgroup * 8 + i) * 128 + thread_index() % 128];
#pragma unroll
            for (int j = 0; j < 4; ++j) grad_q[4 * i + j] = four.numbers[j];
        }
    }
    char* panel = shared_memory() + warpgroup * kRows * kPanelRowBytes;
    const Place place = place_of<T>(warpgroup);
    store_result<BF16>(grad_q, p.scale, panel, p.grad_q, place.feature, block * T::QUERIES + place.query,
                       matrix % p.heads, matrix / p.heads);
    tma_store_wait<0>();
}

}  // namespace fusedformer::cuda::backward
