// What the kernels of the backward pass share: tiles, workspace, parameters, and who works on what.
#pragma once

#include <cstddef>
#include <type_traits>

#include "device.h"
#include "problem.h"

namespace fusedformer::cuda::backward {

constexpr int kRows = 64;      // of a warpgroup's product
constexpr int kThreads = 256;  // two warpgroups: the consumers, and the blocks of the small kernels
constexpr float kLog2E = 1.4426950408889634f;
constexpr int kFar = 1 << 30;  // an open side of the band; lengths are below it

template <int HEAD_DIM_>
struct Tiles {
    static constexpr int HEAD_DIM = HEAD_DIM_;
    static constexpr int PANELS = HEAD_DIM / kPanelFeatures;
    static constexpr int KEYS = 2 * kRows;
    static constexpr int QUERIES = HEAD_DIM == 64 ? 128 : 64;
};

struct Range {
    int begin, end;
    DEVICE int size() const { return end - begin; }
};

// Query i sees the keys i + first .. i + last of [0, len_k). A tile is visited if one of its queries sees one of its
// keys, from either side by the same two conditions.
struct Band {
    int len_q, len_k, first, last;

    template <typename T>
    DEVICE Range key_blocks(int query_block) const {
        const int query = query_block * T::QUERIES, last_query = min(query + T::QUERIES, len_q) - 1;
        return blocks(query + first, last_query + last, len_k, T::KEYS);
    }
    template <typename T>
    DEVICE Range query_blocks(int key_block) const {
        const int key = key_block * T::KEYS, last_key = min(key + T::KEYS, len_k) - 1;
        return blocks(key - last, last_key - first, len_q, T::QUERIES);
    }

  private:
    // Of the rows from `begin` to `last` that there are.
    DEVICE static Range blocks(int begin, int last, int len, int block) {
        begin = max(begin, 0), last = min(last, len - 1);
        return begin > last ? Range{0, 0} : Range{begin / block, last / block + 1};
    }
};

struct Workspace {
    uint32_t* started;  // blocks of keys that are under way
    uint32_t* turns;    // (batch, heads, query blocks): blocks of keys that have added to dQ
    float* lse;         // (batch, heads, query blocks, QUERIES), in base 2; +inf where there is nothing to see
    float* delta;       // likewise; rowsum(dO ∘ O) - dlse
    float* grad_q;      // (batch, heads, query blocks, QUERIES x HEAD_DIM in the order of the consumers' fragments)
};

// The workspace's arrays from `start`; how many bytes they take.
template <typename T>
size_t lay_out(Workspace& workspace, const AttentionProblem& x, char* start) {
    constexpr size_t ALIGNMENT = 256;
    const size_t blocks = static_cast<size_t>(x.batch) * x.heads * ((x.len_q + T::QUERIES - 1) / T::QUERIES);
    size_t bytes = 0;
    const auto take = [&](auto*& array, size_t numbers) {
        array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(start + bytes);
        bytes += (numbers * 4 + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    };
    take(workspace.started, 1);
    take(workspace.turns, blocks);
    take(workspace.lse, blocks * T::QUERIES);
    take(workspace.delta, blocks * T::QUERIES);
    take(workspace.grad_q, blocks * T::QUERIES * T::HEAD_DIM);
    return bytes;
}

struct Params {
    TensorMap q, k, v, grad_out, grad_q, grad_k, grad_v;
    Tensor4 out, grad_out_rows;
    const float *lse, *lse_residual, *grad_lse;
    Workspace workspace;
    Band band;
    int heads, heads_kv, group, value_dim;
    int query_blocks, key_blocks;
    int matrices_kv, matrices_at_once;
    float scale;
};

// Neighbours: four accumulators of a thread, as they go to dQ's sums and come back; what two columns have.
struct alignas(16) Four {
    float numbers[4];
};
struct alignas(8) Two {
    float numbers[2];
};

// Which (64 queries, 64 features) of a tile of dQ a consumer warpgroup works on.
struct Place {
    int query, feature;
};
template <typename T>
DEVICE Place place_of(int warpgroup) {
    return T::PANELS == 2 ? Place{0, warpgroup * kPanelFeatures} : Place{warpgroup * kRows, 0};
}

// Accumulators in 16 bits: the A operands of a next product, or what store_matrix takes.
template <bool BF16, int NUMBERS>
DEVICE void round(uint32_t (&fragments)[NUMBERS / 8][4], const float (&x)[NUMBERS]) {
#pragma unroll
    for (int i = 0; i < NUMBERS / 2; ++i) fragments[i / 4][i % 4] = pack<BF16>(x[2 * i], x[2 * i + 1]);
}

// A warpgroup's fragments (64, features) to the rows from `row` of a tile of panels.
template <int CHUNKS>
DEVICE void store_fragments(char* tile, int rows, int row, const uint32_t (&fragments)[CHUNKS][4]) {
    const int lane = lane_index();
    const int start = swizzled(row + warp_index() % 4 * 16 + lane % 16, lane / 16 * 8, rows);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk)  // 16 features, two of a row's swizzled 16 bytes, further
        store_matrix(tile + chunk / 4 * (rows * kPanelRowBytes) + (start ^ chunk % 4 * 32), fragments[chunk]);
}

// A warpgroup's accumulators (64, features), times `factor`, to a tensor, through panels of its own.
template <bool BF16, int NUMBERS>
DEVICE void store_result(float (&x)[NUMBERS], float factor, char* panels, const TensorMap& map, int feature, int row,
                         int head, int batch) {
    uint32_t fragments[NUMBERS / 8][4];
#pragma unroll
    for (float& number : x) number *= factor;
    round<BF16>(fragments, x);
    store_fragments(panels, kRows, 0, fragments);
    async_proxy_fence();
    named_barrier_sync(2 + warpgroup_index(), 128);
    if (thread_index() % 128 == 0) {
#pragma unroll
        for (int panel = 0; panel < NUMBERS * 2 / kPanelFeatures; ++panel)
            tma_store(map, panels + panel * kRows * kPanelRowBytes, feature + panel * kPanelFeatures, row, head, batch);
        tma_store_commit();
    }
}

}  // namespace fusedformer::cuda::backward
