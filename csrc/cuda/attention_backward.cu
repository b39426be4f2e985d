// Attention backward for Hopper: five products a tile, nothing of size L x S in memory, the same bits every time.
//
//     P = exp(S scale - lse)      dP = dO Vᵀ      dS = P ∘ (dP - Δ)      Δ = rowsum(dO ∘ O) - dlse
//     dV = Pᵀ dO                  dK = dSᵀ Q scale                      dQ = dS K scale
//
// Three kernels: one computes Δ of every query, the main one all else, the last rounds dQ to 16 bits.
//
// In the main kernel a block keeps 128 keys of one KV head, K and V in shared memory and dK and dV in the registers of
// two consumer warpgroups, 64 keys each, and walks over the queries that see any of them, of every query head of the
// group (so dK and dV need no sum over blocks). The third warpgroup gives up its registers; one of its threads has TMA
// load Q with the log-sum-exp and dO with Δ into two stages each, whose barriers `full` count bytes and `empty` the
// consumers' warps; another adds up dQ. For each tile a consumer warpgroup does
//
//     start Sᵀ = K Qᵀ;  start dPᵀ = V dOᵀ
//     wait for S;   P = exp2(S scale log2(e) - lse)                     under dP
//     wait for dP;  dS = P ∘ (dP - Δ)                                   under the other warpgroup's products
//     start dV += Pᵀ dO
//     store dS, meet the other warpgroup                                under dV
//     start dQ = dS K over all 128 keys, a half of it;  start dK += dSᵀ Q
//     wait for dV and dQ, free dO; store dQ for the adding thread       under dK
//     wait for dK, free Q
//
// Scores are transposed, keys by queries: then P and dS, rounded, are the A operands of dV and dK in the very registers
// in which S and dP came. Only dS goes through shared memory, as the transposed A of dQ; it has two places, so that one
// meeting a tile is enough: who stores into a place knows by the meeting between that both have read it. The two
// warpgroups contend for the tensor cores and so fall behind one another; one's exponentials then run under the other's
// products.
//
// Registers of a consumer's thread, of 240. HEAD_DIM 128, 64 queries: dK 64, dV 64, S 32, dP 32; then dQ 32 in the
// place of one and both fragments 16 + 16 in that of the other. HEAD_DIM 64, 128 queries: 32, 32, 64, 64. To start the
// next tile's S under this one's dK, or dV before dS, needs 32 more, and ptxas then puts the products one after the
// other. Shared memory: K, V 64 KB (32), Q and dO 64, dS 32 (64), dQ 32: 192 KB. The producer lives on 24 registers,
// hence its simple loops.
//
// dQ. Blocks of keys add their parts to float32 sums in the workspace, by the copy engine's reduction, one block after
// the other: for each block of queries a counter says whose turn it is. The first to come, that of the last keys, sets
// the sums; thus nothing needs to be zeroed. The sums lie in the order of the consumers' fragments, not in rows: 16
// bytes a thread, no bank conflicts, one copy of 32 KB; the last kernel reads them the same way.
//
// Order. A block may wait only for blocks that have started. Hence it draws its number when it starts, and numbers go
// from the last keys to the first, as do the turns. It walks from the first query that sees its keys upwards: under
// causality each block of a head starts at another query, where it is the first, and arrives at the next as the block
// before has left; a walk from a common end would have each wait for all before. Heads take turns within groups whose
// Q, dO and dQ fit in the L2 cache. (Without a band all start at query 0, each one tile behind the one before.)
//
// The band is that of the forward kernel: query i sees the keys [i + first, i + last]. Only tiles that it touches are
// visited, only those that cross its edge or the keys' end are masked, after the exponential, whatever came of it. Rows
// past the end and empty rows have lse = +inf, so that P is 0. Features are padded by TMA's zeros.
#include "attention_backward_plan.h"
#include "attention_backward_rows.h"
#include "launch.h"

namespace fusedformer::cuda {
namespace backward {
namespace {

constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;  // (128 * 24 + 256 * 240) / 384 = 168 at the start
constexpr int kBlockThreads = 128 + kThreads;
constexpr int kConsumersBarrier = 1;
constexpr int64_t kCached = 24 << 20;  // bytes of Q, dO and dQ's sums to keep within L2's 50 MB

// Tiles of queries go through two stages; a barrier of a stage ends a phase each time round.
constexpr int kStages = 2;
DEVICE int stage_of(int tile) { return tile & 1; }
DEVICE int parity_of(int tile) { return tile >> 1 & 1; }

template <typename T>
struct Shared {
    static constexpr int TILE = T::QUERIES * T::HEAD_DIM;

    alignas(1024) uint16_t k[T::KEYS * T::HEAD_DIM];
    uint16_t v[T::KEYS * T::HEAD_DIM];
    uint16_t q[kStages][TILE];         // at the end dK
    uint16_t grad_out[kStages][TILE];  // at the end dV
    uint16_t grad_scores[kStages][T::KEYS * T::QUERIES];
    float grad_q[TILE];  // fragment by fragment
    float lse[kStages][T::QUERIES], delta[kStages][T::QUERIES];
    uint64_t keys_full, q_full[kStages], q_empty[kStages], grad_out_full[kStages], grad_out_empty[kStages];
    uint64_t grad_q_full, grad_q_empty;
    uint32_t number;  // of the block
};

// A block of keys, and the blocks of queries that see some of them, the same for each head of the group.
struct Work {
    int batch, head_kv, key_block;
    Range queries;
};

template <typename T>
DEVICE Work work_of(const Params& p, int number) {
    const int together = p.matrices_at_once * p.key_blocks;
    const int first_matrix = number / together * p.matrices_at_once, within = number % together;
    const int matrices = min(p.matrices_at_once, p.matrices_kv - first_matrix);
    const int matrix = first_matrix + within % matrices, key_block = p.key_blocks - 1 - within / matrices;
    return {matrix / p.heads_kv, matrix % p.heads_kv, key_block, p.band.query_blocks<T>(key_block)};
}

// Calls visit(tile, head, query block, place of that block in the workspace) for every tile in turn.
template <typename Visit>
DEVICE void each_tile(const Params& p, const Work& work, const Visit& visit) {
    int tile = 0;
#pragma unroll 1
    for (int member = 0; member < p.group; ++member) {
        const int head = work.head_kv * p.group + member, start = (work.batch * p.heads + head) * p.query_blocks;
#pragma unroll 1
        for (int block = work.queries.begin; block < work.queries.end; ++block)
            visit(tile++, head, block, start + block);
    }
}

// ---- producer warpgroup: a thread that loads, and one that sums dQ up

template <typename T>
DEVICE void load_panels(uint16_t* tile, const TensorMap& map, uint64_t* full, int rows, int row, int head, int batch) {
#pragma unroll
    for (int panel = 0; panel < T::PANELS; ++panel)
        tma_load(tile + panel * rows * kPanelFeatures, map, full, panel * kPanelFeatures, row, head, batch);
}

template <typename T>
DEVICE void load(const Params& p, Shared<T>& s, const Work& work) {
    for (const TensorMap* map : {&p.k, &p.v, &p.q, &p.grad_out}) tma_prefetch(*map);
    barrier_expect_bytes(&s.keys_full, sizeof(s.k) + sizeof(s.v));
    load_panels<T>(s.k, p.k, &s.keys_full, T::KEYS, work.key_block * T::KEYS, work.head_kv, work.batch);
    load_panels<T>(s.v, p.v, &s.keys_full, T::KEYS, work.key_block * T::KEYS, work.head_kv, work.batch);
    each_tile(p, work, [&](int tile, int head, int block, int64_t place) {
        const int stage = stage_of(tile), unused = parity_of(tile) ^ 1;
        constexpr int BYTES = sizeof(s.q[0]) + sizeof(s.lse[0]);
        barrier_wait(&s.q_empty[stage], unused);
        barrier_expect_bytes(&s.q_full[stage], BYTES);
        load_panels<T>(s.q[stage], p.q, &s.q_full[stage], T::QUERIES, block * T::QUERIES, head, work.batch);
        bulk_load(s.lse[stage], p.workspace.lse + place * T::QUERIES, sizeof(s.lse[0]), &s.q_full[stage]);
        barrier_wait(&s.grad_out_empty[stage], unused);
        barrier_expect_bytes(&s.grad_out_full[stage], BYTES);
        load_panels<T>(s.grad_out[stage], p.grad_out, &s.grad_out_full[stage], T::QUERIES, block * T::QUERIES, head,
                       work.batch);
        bulk_load(s.delta[stage], p.workspace.delta + place * T::QUERIES, sizeof(s.delta[0]), &s.grad_out_full[stage]);
    });
}

// Adds each tile's part of dQ after all later blocks of keys that its queries see; the last of those sets the sums.
template <typename T>
DEVICE void add_grad_q(const Params& p, Shared<T>& s, const Work& work) {
    each_tile(p, work, [&](int tile, int, int block, int64_t place) {
        float* sums = p.workspace.grad_q + place * Shared<T>::TILE;
        const int before = p.band.key_blocks<T>(block).end - 1 - work.key_block;
        barrier_wait(&s.grad_q_full, tile & 1);
        flag_wait(p.workspace.turns + place, before);
        bulk_fence();
        if (before == 0)
            bulk_store(sums, s.grad_q, sizeof(s.grad_q));
        else
            bulk_add(sums, s.grad_q, sizeof(s.grad_q));
        tma_store_commit();
        tma_store_wait<0>();
        barrier_arrive(&s.grad_q_empty);
        bulk_wait();
        bulk_fence();
        flag_raise(p.workspace.turns + place, before + 1);
    });
}

// ---- consumers: a warpgroup for each 64 keys

// The first and the last query of a tile that see each of a thread's two keys, counted from its first column.
struct Seen {
    int first[2], last[2];
};

DEVICE Seen seen(const Band& band, int first_key, int query) {
    Seen seen;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int key = first_key + warp_index() % 4 * 16 + lane_index() / 4 + 8 * i;
        const int distance = key - (query + lane_index() % 4 * 2);
        seen.first[i] = key < band.len_k ? distance - band.last : kFar;
        seen.last[i] = distance - band.first;
    }
    return seen;
}

// What belongs to a query that does not see the key becomes 0, whatever it was.
template <int NUMBERS>
DEVICE void mask(float (&x)[NUMBERS], const Seen& seen) {
#pragma unroll
    for (int i = 0; i < NUMBERS; ++i) {
        const int column = i / 4 * 8 + i % 2, key = i / 2 % 2;
        if (column < seen.first[key] || column > seen.last[key]) x[i] = 0.0f;
    }
}

template <typename T, bool BF16>
DEVICE void consume(const Params& p, Shared<T>& s, const Work& work, int warpgroup) {
    constexpr int KEYS = T::KEYS, QUERIES = T::QUERIES;
    const int lane = lane_index(), thread = thread_index() % 128;
    const int first_key = work.key_block * KEYS + warpgroup * kRows;
    const float unit = p.scale * kLog2E;
    const Place place = place_of<T>(warpgroup);

    float grad_k[T::HEAD_DIM / 2] = {}, grad_v[T::HEAD_DIM / 2] = {};     // (64 keys, HEAD_DIM)
    float scores[QUERIES / 2], grad_weights[QUERIES / 2];                 // (64 keys, QUERIES)
    uint32_t weights16[QUERIES / 16][4], grad_scores16[QUERIES / 16][4];  // (64 keys, QUERIES)
    float grad_q[kPanelFeatures / 2];                                     // (64 queries, 64 features)

    barrier_wait(&s.keys_full, 0);
    each_tile(p, work, [&](int tile, int, int block, int64_t) {
        const int stage = stage_of(tile), parity = parity_of(tile);
        const uint16_t *q = s.q[stage], *grad_out = s.grad_out[stage];
        barrier_wait(&s.q_full[stage], parity);
        wgmma_fence(scores);
#pragma unroll
        for (int e = 0; e < T::HEAD_DIM; e += kContracted)  // Sᵀ = K Qᵀ
            wgmma<BF16, false, false>(scores, contract_features(s.k, KEYS, e, warpgroup * kRows),
                                      contract_features(q, QUERIES, e), e > 0);
        wgmma_commit();
        barrier_wait(&s.grad_out_full[stage], parity);
        wgmma_fence(grad_weights);
#pragma unroll
        for (int e = 0; e < T::HEAD_DIM; e += kContracted)  // dPᵀ = V dOᵀ
            wgmma<BF16, false, false>(grad_weights, contract_features(s.v, KEYS, e, warpgroup * kRows),
                                      contract_features(grad_out, QUERIES, e), e > 0);
        wgmma_commit();

        wgmma_wait<1>(scores);
        const int query = block * QUERIES;
        const bool partial = first_key + kRows > p.band.len_k || first_key + kRows - 1 - query > p.band.last ||
                             first_key - (query + QUERIES - 1) < p.band.first;
#pragma unroll
        for (int i = 0; i < QUERIES / 2; i += 4) {  // P = exp2(S scale log2(e) - lse)
            const Two lse = load_shared<Two>(&s.lse[stage][i * 2 + lane % 4 * 2]);
#pragma unroll
            for (int j = i; j < i + 4; ++j) scores[j] = exp2_approx(fmaf(scores[j], unit, -lse.numbers[j % 2]));
        }
        if (partial) mask(scores, seen(p.band, first_key, query));
        wgmma_wait<0>(grad_weights);
#pragma unroll
        for (int i = 0; i < QUERIES / 2; i += 4) {  // dS = P ∘ (dP - Δ)
            const Two delta = load_shared<Two>(&s.delta[stage][i * 2 + lane % 4 * 2]);
#pragma unroll
            for (int j = i; j < i + 4; ++j) grad_weights[j] = scores[j] * (grad_weights[j] - delta.numbers[j % 2]);
        }
        if (partial) mask(grad_weights, seen(p.band, first_key, query));  // of infinite dP, 0 times it is NaN
        round<BF16>(weights16, scores);
        round<BF16>(grad_scores16, grad_weights);

        wgmma_fence(grad_v, weights16);
#pragma unroll
        for (int row = 0; row < QUERIES; row += kContracted)  // dV += Pᵀ dO
            wgmma<BF16, true>(grad_v, weights16[row / kContracted], contract_rows(grad_out, QUERIES, row), true);
        wgmma_commit();
        char* grad_scores = reinterpret_cast<char*>(s.grad_scores[stage]);
        store_fragments(grad_scores, KEYS, warpgroup * kRows, grad_scores16);
        async_proxy_fence();
        named_barrier_sync(kConsumersBarrier, kThreads);

        wgmma_fence(grad_q, grad_k, grad_scores16);
#pragma unroll
        for (int row = 0; row < KEYS; row += kContracted)  // dQ = dS K
            wgmma<BF16, true, true>(grad_q, contract_rows(grad_scores, KEYS, row, place.query),
                                    contract_rows(s.k, KEYS, row, place.feature), row > 0);
        wgmma_commit();
#pragma unroll
        for (int row = 0; row < QUERIES; row += kContracted)  // dK += dSᵀ Q
            wgmma<BF16, true>(grad_k, grad_scores16[row / kContracted], contract_rows(q, QUERIES, row), true);
        wgmma_commit();

        wgmma_wait<1>(grad_v, weights16, grad_q);
        if (lane == 0) barrier_arrive(&s.grad_out_empty[stage]);
        barrier_wait(&s.grad_q_empty, ~tile & 1);
#pragma unroll
        for (int i = 0; i < kPanelFeatures / 8; ++i)
            store_shared(s.grad_q + ((warpgroup * (kPanelFeatures / 8) + i) * 128 + thread) * 4,
                         Four{grad_q[4 * i], grad_q[4 * i + 1], grad_q[4 * i + 2], grad_q[4 * i + 3]});
        async_proxy_fence();
        warp_barrier();
        if (lane == 0) barrier_arrive(&s.grad_q_full);
        wgmma_wait<0>(grad_k, grad_scores16);
        if (lane == 0) barrier_arrive(&s.q_empty[stage]);
    });

    // Through the place of Q and dO, which both warpgroups have read.
    named_barrier_sync(kConsumersBarrier, kThreads);
    constexpr int OWN = kRows * T::HEAD_DIM * 2;
    char* place_of_q = reinterpret_cast<char*>(s.q) + warpgroup * OWN;
    char* place_of_grad_out = reinterpret_cast<char*>(s.grad_out) + warpgroup * OWN;
    store_result<BF16>(grad_v, 1.0f, place_of_grad_out, p.grad_v, 0, first_key, work.head_kv, work.batch);
    store_result<BF16>(grad_k, p.scale, place_of_q, p.grad_k, 0, first_key, work.head_kv, work.batch);
    tma_store_wait<0>();
}

template <typename T, bool BF16>
__global__ void __launch_bounds__(kBlockThreads, 1) attention_backward_kernel(const __grid_constant__ Params p) {
    Shared<T>& s = *reinterpret_cast<Shared<T>*>(shared_memory());
    if (thread_index() == 0) {
        s.number = flag_increment(p.workspace.started);
        for (uint64_t* bar :
             {&s.keys_full, s.q_full, s.q_full + 1, s.grad_out_full, s.grad_out_full + 1, &s.grad_q_empty})
            barrier_init(bar, 1);
        for (uint64_t* bar : {s.q_empty, s.q_empty + 1, s.grad_out_empty, s.grad_out_empty + 1, &s.grad_q_full})
            barrier_init(bar, kThreads / 32);
        barrier_init_fence();
    }
    block_barrier();
    const Work work = work_of<T>(p, static_cast<int>(s.number));
    if (warpgroup_index() == 0) {
        registers_decrease<kProducerRegisters>();
        if (warp_index() == 0 && lane_index() == 0) load(p, s, work);
        if (warp_index() == 1 && lane_index() == 0) add_grad_q(p, s, work);
    } else {
        registers_increase<kConsumerRegisters>();
        consume<T, BF16>(p, s, work, warpgroup_index() - 1);
    }
}

// ---- host

const char* make_tensor_maps(Params& p, const AttentionProblem& x, const AttentionGradients& y, int queries, int keys) {
    const char* error = nullptr;
    const auto make = [&](TensorMap& map, const Tensor4& tensor, int heads, int rows, int features, int box_rows) {
        if (error == nullptr) error = make_tensor_map(map, tensor, x.batch, heads, rows, features, x.bf16, box_rows);
    };
    make(p.q, x.q, x.heads, x.len_q, x.head_dim, queries);
    make(p.grad_out, y.grad_out, x.heads, x.len_q, x.value_dim, queries);
    make(p.k, x.k, x.heads_kv, x.len_k, x.head_dim, keys);
    make(p.v, x.v, x.heads_kv, x.len_k, x.value_dim, keys);
    make(p.grad_q, y.grad_q, x.heads, x.len_q, x.head_dim, kRows);
    make(p.grad_k, y.grad_k, x.heads_kv, x.len_k, x.head_dim, kRows);
    make(p.grad_v, y.grad_v, x.heads_kv, x.len_k, x.value_dim, kRows);
    return error;
}

template <typename T, bool BF16>
const char* run(const AttentionProblem& x, const AttentionGradients& y, void* stream) {
    Params p{};
    if (const char* error = make_tensor_maps(p, x, y, T::QUERIES, T::KEYS)) return error;
    lay_out<T>(p.workspace, x, static_cast<char*>(y.workspace));
    const auto clamp = [](int64_t far) { return static_cast<int>(far < -kFar ? -kFar : far > kFar ? kFar : far); };
    p.band = {x.len_q, x.len_k, x.window_left < 0 ? -kFar : clamp(x.position_offset - x.window_left),
              x.window_right < 0 ? kFar : clamp(x.position_offset + x.window_right)};
    p.out = x.out, p.grad_out_rows = y.grad_out;
    p.lse = x.lse, p.lse_residual = x.lse_residual, p.grad_lse = y.grad_lse;
    p.heads = x.heads, p.heads_kv = x.heads_kv, p.group = x.heads / x.heads_kv, p.value_dim = x.value_dim;
    p.scale = x.scale;
    p.query_blocks = (x.len_q + T::QUERIES - 1) / T::QUERIES;
    p.key_blocks = (x.len_k + T::KEYS - 1) / T::KEYS;
    p.matrices_kv = x.batch * x.heads_kv;
    const int64_t bytes =
        static_cast<int64_t>(x.len_q) * p.group * (2 * x.head_dim + 2 * x.value_dim + 4 * T::HEAD_DIM);
    const int64_t at_once = kCached / bytes + 1;
    p.matrices_at_once = static_cast<int>(at_once < p.matrices_kv ? at_once : p.matrices_kv);

    const int64_t blocks = static_cast<int64_t>(p.matrices_kv) * p.key_blocks;
    const int64_t small_blocks = static_cast<int64_t>(x.batch) * x.heads * p.query_blocks;
    if (blocks > INT32_MAX || small_blocks > INT32_MAX) return "more blocks than a grid has";
    const Grid grid{static_cast<int>(blocks)}, small_grid{static_cast<int>(small_blocks)};
    const char* error = launch<attention_backward_rows_kernel<T, BF16>>(small_grid, kThreads, 0, stream, p);
    if (error == nullptr)
        error = launch<attention_backward_kernel<T, BF16>>(grid, kBlockThreads, sizeof(Shared<T>), stream, p);
    if (error == nullptr)
        error = launch<attention_backward_round_kernel<T, BF16>>(small_grid, kThreads, 2 * kRows * kPanelRowBytes,
                                                                 stream, p);
    return error;
}

template <typename T>
const char* run_in_type(const AttentionProblem& x, const AttentionGradients& y, void* stream) {
    return x.bf16 ? run<T, true>(x, y, stream) : run<T, false>(x, y, stream);
}

// Calls `with` with the tiles for the problem's head dims.
template <typename With>
auto with_tiles(const AttentionProblem& x, const With& with) {
    return x.head_dim <= 64 && x.value_dim <= 64 ? with(Tiles<64>()) : with(Tiles<128>());
}

}  // namespace
}  // namespace backward

size_t attention_backward_workspace(const AttentionProblem& problem) {
    return backward::with_tiles(problem, [&](auto tiles) {
        backward::Workspace workspace;
        return backward::lay_out<decltype(tiles)>(workspace, problem, nullptr);
    });
}

const char* attention_backward(const AttentionProblem& problem, const AttentionGradients& gradients, void* stream) {
    if (problem.len_q >= backward::kFar || problem.len_k >= backward::kFar) return "sequences of 2^30 or more";
    return backward::with_tiles(
        problem, [&](auto tiles) { return backward::run_in_type<decltype(tiles)>(problem, gradients, stream); });
}

}  // namespace fusedformer::cuda
