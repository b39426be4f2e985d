// Attention forward for Hopper: O = softmax(Q Kᵀ scale) V, the scores in registers alone.
//
// A block takes 64 queries for each of its consumer warpgroups, of one head, and visits the tiles of keys that any of
// them sees, from the last to the first. One more warpgroup, the producer, gives up its registers to the others; one of
// its threads has TMA load Q once and K and V tile by tile into two rings of stages. Each stage has two barriers: `full`,
// which counts the bytes, and `empty`, at which every consumer warp arrives when its products have read the stage.
//
//     producer     Q K0   K1 V0   K2 V1   ...            waits at `empty`, runs ahead by the stages of the rings
//     consumer     S0 = Q K0ᵀ, P0 = softmax(S0)
//                  for j = 1, 2, ...
//                      start S = Q Kjᵀ                    the tensor cores work on both products ...
//                      start O += P V(j-1)
//                      wait for S, free Kj
//                      S, m, l = softmax(S)               ... while the exponentials are taken under the second
//                      wait for O, free V(j-1)
//                      O *= α, P = 16 bits of S
//                  O += P V(last); out = O / l
//
// So a warpgroup's softmax hides behind its own PV product. Between warpgroups named barriers pass a token round: who
// holds it starts both products and passes it on, so that one's softmax falls in the time of another's products instead
// of all taking exponentials at once ("ping-pong"). All warpgroups make the same number of steps, those of the block.
//
// S stays in the fragments in which WGMMA leaves it: a thread has a quarter of two rows, a row's maximum takes two
// shuffles, and four neighbouring pairs, rounded, are the A operand of the next product as they stand. The running sum
// l stays a partial one in each thread until the end. m is the maximum of scores in units of log 2, so that a weight is one
// fused multiply-add and one exp2. (For that the scale must be positive; if not, scores are multiplied by it first.)
//
// The band. Query i sees the keys [i + first, i + last], cut to [0, len_k): causality, windows and offsets are these two
// numbers, an open side a far one. Only the tiles it touches are visited, and only tiles that cross an edge of it for some
// row of the warpgroup are masked. TMA fills with zeros beyond the features, so E and Ev may be anything up to HEAD_DIM.
//
// Order. Where the band makes queries unequal, the blocks with most keys go first and short ones fill the gaps at the end,
// within groups of heads whose keys and values stay in the L2 cache; otherwise head by head.
//
// Registers of a consumer thread at HEAD_DIM = 128: S 64, O 64, P 32, of 240, with 128 keys; S 88, P 44 with 176. At
// HEAD_DIM = 64, with three consumers: S 64, O 32, P 32, of 160.

#include "device.h"
#include "launch.h"
#include "problem.h"

namespace fusedformer::cuda {
namespace {

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

    static constexpr int Q_BYTES = kRows * HEAD_DIM * 2;  // of one warpgroup; O takes its place
    static constexpr int KV_BYTES = KEYS * HEAD_DIM * 2;
    static constexpr int K_OFFSET = CONSUMERS * Q_BYTES;
    static constexpr int V_OFFSET = K_OFFSET + STAGES * KV_BYTES;
    static constexpr int BARRIERS_OFFSET = V_OFFSET + STAGES * KV_BYTES;
    static constexpr int SHARED_BYTES = BARRIERS_OFFSET + (1 + 4 * STAGES) * 8;
};

struct Params {
    TensorMap q, k, v, out;
    float *lse, *lse_residual;
    int heads, group;  // query heads for each key head
    int len_q, len_k;
    int first, last;  // query i sees keys i + first .. i + last
    int query_blocks, matrices, matrices_at_once;
    float premultiply;                // 1, or a scale that is not positive
    float unit;                       // scores times this are in units of log 2, and these
    float natural, natural_residual;  // times this, in two floats, in natural ones
};

// The part of a block in a ring of stages.
template <int STAGES>
struct Turn {
    int stage = 0, parity = 0;

    DEVICE void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// The tiles of keys, from `begin` to before `end`, that the block's queries see.
struct Work {
    int start;  // query
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

template <typename T>
struct Shared {
    char* base;

    DEVICE char* q(int warpgroup) const { return base + warpgroup * T::Q_BYTES; }
    DEVICE char* k(int stage) const { return base + T::K_OFFSET + stage * T::KV_BYTES; }
    DEVICE char* v(int stage) const { return base + T::V_OFFSET + stage * T::KV_BYTES; }
    DEVICE uint64_t* barriers() const { return reinterpret_cast<uint64_t*>(base + T::BARRIERS_OFFSET); }
    DEVICE uint64_t* q_full() const { return barriers(); }
    DEVICE uint64_t* k_full(int stage) const { return barriers() + 1 + stage; }
    DEVICE uint64_t* k_empty(int stage) const { return barriers() + 1 + T::STAGES + stage; }
    DEVICE uint64_t* v_full(int stage) const { return barriers() + 1 + 2 * T::STAGES + stage; }
    DEVICE uint64_t* v_empty(int stage) const { return barriers() + 1 + 3 * T::STAGES + stage; }
};

// ---- producer: one thread

template <typename T>
DEVICE void load_tile(char* tile, const TensorMap& map, uint64_t* full, int rows, int row, int head, int batch) {
#pragma unroll
    for (int panel = 0; panel < T::PANELS; ++panel)
        tma_load(tile + panel * rows * kPanelRowBytes, map, full, panel * kPanelFeatures, row, head, batch);
}

template <typename T>
DEVICE void produce(const Params& p, const Shared<T>& shared, const Work& work) {
    if (work.begin == work.end) return;
    barrier_expect_bytes(shared.q_full(), T::CONSUMERS * T::Q_BYTES);
    for (int warpgroup = 0; warpgroup < T::CONSUMERS; ++warpgroup)
        load_tile<T>(shared.q(warpgroup), p.q, shared.q_full(), kRows, work.start + warpgroup * kRows, work.head,
                     work.batch);
    const int head = work.head / p.group;
    Turn<T::STAGES> k, v;
    const auto load = [&](const TensorMap& map, char* stage, uint64_t* full, uint64_t* empty, int parity, int tile) {
        barrier_wait(empty, parity ^ 1);
        barrier_expect_bytes(full, T::KV_BYTES);
        load_tile<T>(stage, map, full, T::KEYS, tile * T::KEYS, head, work.batch);
    };
    for (int tile = work.end - 1; tile >= work.begin - 1; --tile) {
        if (tile >= work.begin) {
            load(p.k, shared.k(k.stage), shared.k_full(k.stage), shared.k_empty(k.stage), k.parity, tile);
            k.next();
        }
        if (tile < work.end - 1) {  // the values of the keys before
            load(p.v, shared.v(v.stage), shared.v_full(v.stage), shared.v_empty(v.stage), v.parity, tile + 1);
            v.next();
        }
    }
}

// ---- consumer: a warpgroup

// The two rows of a thread: row 0 is that of lanes / 4, row 1 the one 8 further on.
struct Rows {
    int begin[2], end[2];  // the keys they see
    float max[2], sum[2];  // of scores in units of log 2; of the thread's part of exp2(score - max)
};

DEVICE float maximum_of_row(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
}
DEVICE float sum_of_row(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

// Scores of keys that the row does not see become -inf; `key` is the first of the tile.
template <int SCORES>
DEVICE void mask(float (&s)[SCORES], const Rows& rows, int key) {
    const int mine = key + lane_index() % 4 * 2;
#pragma unroll
    for (int i = 0; i < SCORES; ++i) {
        const int column = mine + i / 4 * 8 + i % 2, row = i / 2 % 2;
        if (column < rows.begin[row] || column >= rows.end[row]) s[i] = kMinusInfinity;
    }
}

// Scores to exp2(unit score - maximum), and the factor for what was summed up before: 1 where the maximum is the same, not
// nearly 1 as a fused product minus the rounded maximum would make it, tile after tile.
template <int SCORES>
DEVICE void softmax(float (&s)[SCORES], Rows& rows, float (&alpha)[2], float unit) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        float largest = kMinusInfinity;
#pragma unroll
        for (int i = 2 * row; i < SCORES; i += 4) largest = fmaxf(largest, fmaxf(s[i], s[i + 1]));
        const float before = rows.max[row];
        rows.max[row] = fmaxf(before, maximum_of_row(largest) * unit);
        // A row without any visible key so far: exp2(-inf - 0) is 0 where -inf - -inf would be NaN.
        const float reference = rows.max[row] == kMinusInfinity ? 0.0f : rows.max[row];
        alpha[row] = exp2_approx(before - reference);
        float sum = rows.sum[row] * alpha[row];
#pragma unroll
        for (int i = 2 * row; i < SCORES; i += 4) {
            s[i] = exp2_approx(fmaf(s[i], unit, -reference));
            s[i + 1] = exp2_approx(fmaf(s[i + 1], unit, -reference));
            sum += s[i] + s[i + 1];
        }
        rows.sum[row] = sum;
    }
}

template <bool BF16, int NUMBERS>
DEVICE void round(uint32_t (&fragments)[NUMBERS / 8][4], const float (&x)[NUMBERS]) {
#pragma unroll
    for (int i = 0; i < NUMBERS / 2; ++i) fragments[i / 4][i % 4] = pack<BF16>(x[2 * i], x[2 * i + 1]);
}

template <typename T, bool BF16>
DEVICE void consume(const Params& p, const Shared<T>& shared, const Work& work, int warpgroup) {
    const int lane = lane_index(), warp = warp_index() % 4;
    const int first_row = work.start + warpgroup * kRows;
    const int row = first_row + warp * 16 + lane / 4;
    Rows rows;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        rows.begin[i] = row + 8 * i + p.first;
        rows.end[i] = min(row + 8 * i + p.last + 1, p.len_k);
        rows.max[i] = kMinusInfinity;
        rows.sum[i] = 0.0f;
    }
    // Tiles that begin and end in here are seen whole by all the warpgroup's rows.
    const int whole_begin = first_row + kRows - 1 + p.first, whole_end = min(first_row + p.last + 1, p.len_k);

    float o[T::HEAD_DIM / 2];      // (64, HEAD_DIM)
    float s[T::KEYS / 2];          // (64, KEYS)
    uint32_t p16[T::KEYS / 16][4];  // (64, KEYS)
    float alpha[2];
#pragma unroll
    for (float& x : o) x = 0.0f;

    const char* q_tile = shared.q(warpgroup);
    Turn<T::STAGES> k, v;
    const auto start_scores = [&] {  // S = Q Kᵀ
        const char* k_tile = shared.k(k.stage);
        wgmma_fence(s);
#pragma unroll
        for (int e = 0; e < T::HEAD_DIM; e += kContracted)
            wgmma<BF16, false, false>(s, contract_features(q_tile, kRows, e), contract_features(k_tile, T::KEYS, e),
                                      e > 0);
        wgmma_commit();
    };
    const auto start_output = [&] {  // O += P V
        const char* v_tile = shared.v(v.stage);
        wgmma_fence(o, p16);
#pragma unroll
        for (int key = 0; key < T::KEYS; key += kContracted)
            wgmma<BF16, true>(o, p16[key / kContracted], contract_rows(v_tile, T::KEYS, key), true);
        wgmma_commit();
    };
    const auto free_stage = [&](uint64_t* empty) {
        if (lane == 0) barrier_arrive(empty);
    };
    const auto wait_for_output = [&](bool under_way) {
        wgmma_wait<0>(o, p16);
        if (under_way) {
            free_stage(shared.v_empty(v.stage));
            v.next();
        }
    };
    const auto scores_to_weights = [&](int tile) {
        if (p.premultiply != 1.0f)
#pragma unroll
            for (float& x : s) x *= p.premultiply;
        const int key = tile * T::KEYS;
        if (key < whole_begin || key + T::KEYS > whole_end) mask(s, rows, key);
        softmax(s, rows, alpha, p.unit);
    };

    const auto scale_output = [&] {  // by what the softmax found; and P = 16 bits of S
#pragma unroll
        for (int i = 0; i < T::HEAD_DIM / 2; ++i) o[i] *= alpha[i / 2 % 2];
        round<BF16>(p16, s);
    };

    if (work.begin < work.end) {
        barrier_wait(shared.q_full(), 0);
        barrier_wait(shared.k_full(k.stage), k.parity);
        start_scores();
        wgmma_wait<0>(s);
        free_stage(shared.k_empty(k.stage));
        k.next();
        scores_to_weights(work.end - 1);

        const int token = 1 + warpgroup, next_token = 1 + (warpgroup + 1) % T::CONSUMERS;
        const bool last_in_round = warpgroup == T::CONSUMERS - 1;
        if (last_in_round && work.end - work.begin > 1) named_barrier_arrive(next_token, 256);
        for (int tile = work.end - 2; tile >= work.begin; --tile) {
            // Not at the end of the step before: a wait in one basic block with the exponentials is moved before them.
            wait_for_output(tile < work.end - 2);
            scale_output();
            barrier_wait(shared.k_full(k.stage), k.parity);
            named_barrier_sync(token, 256);
            start_scores();
            barrier_wait(shared.v_full(v.stage), v.parity);
            start_output();
            if (!last_in_round || tile > work.begin) named_barrier_arrive(next_token, 256);
            wgmma_wait<1>(s);
            free_stage(shared.k_empty(k.stage));
            k.next();
            scores_to_weights(tile);
        }
        wait_for_output(work.end - work.begin > 1);
        scale_output();
        barrier_wait(shared.v_full(v.stage), v.parity);
        start_output();
        wgmma_wait<0>(o, p16);
    }

#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float sum = sum_of_row(rows.sum[i]);
        const bool empty = sum == 0.0f;
        const float total = empty ? 1.0f : sum, max = empty ? 0.0f : rows.max[i];
        const float largest = max * p.natural;  // and what rounding takes from it goes to the other summand
        const float rest = natural_log(total) + fmaf(max, p.natural_residual, fmaf(max, p.natural, -largest));
        const float lse = largest + rest;
        const int query = row + 8 * i;
        if (lane % 4 == 0 && query < p.len_q) {
            const int64_t at = static_cast<int64_t>(work.matrix) * p.len_q + query;
            p.lse[at] = empty ? kMinusInfinity : lse;
            p.lse_residual[at] = (largest - lse) + rest;
        }
        const float factor = empty ? 0.0f : 1.0f / total;
#pragma unroll
        for (int j = 2 * i; j < T::HEAD_DIM / 2; j += 4) o[j] *= factor, o[j + 1] *= factor;
    }

    // Through the place of Q, which the warpgroup's four warps have all read.
    uint32_t o16[T::HEAD_DIM / 16][4];
    round<BF16>(o16, o);
    char* o_tile = shared.q(warpgroup);
    const int own_barrier = 1 + T::CONSUMERS + warpgroup;
    named_barrier_sync(own_barrier, 128);
#pragma unroll
    for (int chunk = 0; chunk < T::HEAD_DIM / 16; ++chunk) {
        // Lane l points at row l % 8 of the fragment's matrix l / 8: 8 rows further in odd ones, 8 features in the last two.
        const int matrix = lane / 8;
        store_matrix(o_tile + swizzled(warp * 16 + lane % 8 + matrix % 2 * 8, chunk * 16 + matrix / 2 * 8, kRows),
                     o16[chunk]);
    }
    async_proxy_fence();
    named_barrier_sync(own_barrier, 128);
    if (thread_index() % 128 == 0) {
#pragma unroll
        for (int panel = 0; panel < T::PANELS; ++panel)
            tma_store(p.out, o_tile + panel * kRows * kPanelRowBytes, panel * kPanelFeatures, first_row, work.head,
                      work.batch);
        tma_store_commit();
        tma_store_wait<0>();
    }
}

template <typename T, bool BF16>
__global__ void __launch_bounds__(T::THREADS, 1) attention_forward_kernel(const __grid_constant__ Params p) {
    const Shared<T> shared{shared_memory()};
    const Work work = work_of<T>(p, block_index().x);
    const int warpgroup = warpgroup_index();
    if (thread_index() == 0) {
        barrier_init(shared.q_full(), 1);
        for (int stage = 0; stage < T::STAGES; ++stage) {
            barrier_init(shared.k_full(stage), 1);
            barrier_init(shared.v_full(stage), 1);
            barrier_init(shared.k_empty(stage), T::CONSUMERS * 4);
            barrier_init(shared.v_empty(stage), T::CONSUMERS * 4);
        }
        barrier_init_fence();
    }
    block_barrier();
    if (warpgroup == 0) {
        registers_decrease<T::PRODUCER_REGISTERS>();
        if (thread_index() == 0) produce<T>(p, shared, work);
    } else {
        registers_increase<T::CONSUMER_REGISTERS>();
        consume<T, BF16>(p, shared, work, warpgroup - 1);
    }
}

// ---- host

template <typename T, bool BF16>
const char* run(const AttentionProblem& problem, void* stream) {
    const AttentionProblem& x = problem;
    Params p{};
    const char* error = make_tensor_map(p.q, x.q, x.batch, x.heads, x.len_q, x.head_dim, BF16, kRows);
    if (error == nullptr)
        error = make_tensor_map(p.k, x.k, x.batch, x.heads_kv, x.len_k, x.head_dim, BF16, T::KEYS);
    if (error == nullptr)
        error = make_tensor_map(p.v, x.v, x.batch, x.heads_kv, x.len_k, x.value_dim, BF16, T::KEYS);
    if (error == nullptr)
        error = make_tensor_map(p.out, x.out, x.batch, x.heads, x.len_q, x.value_dim, BF16, kRows);
    if (error != nullptr) return error;
    const auto clamp = [](int64_t far) { return static_cast<int>(far < -kFar ? -kFar : far > kFar ? kFar : far); };
    p.lse = x.lse, p.lse_residual = x.lse_residual;
    p.heads = x.heads, p.group = x.heads / x.heads_kv;
    p.len_q = x.len_q, p.len_k = x.len_k;
    p.first = x.window_left < 0 ? -kFar : clamp(x.position_offset - x.window_left);
    p.last = x.window_right < 0 ? kFar : clamp(x.position_offset + x.window_right);
    p.query_blocks = (x.len_q + T::QUERIES - 1) / T::QUERIES;
    p.matrices = x.batch * x.heads;
    // Only where one side of the band is open do blocks differ much in their keys.
    const bool unequal = (x.window_left < 0) != (x.window_right < 0);
    const int64_t bytes = static_cast<int64_t>(x.len_k) * (x.head_dim + x.value_dim) * 2;
    const int64_t at_once = (kCached / bytes + 1) * p.group;
    p.matrices_at_once = unequal ? static_cast<int>(at_once < p.matrices ? at_once : p.matrices) : 1;
    const double scale = x.scale > 0.0f ? x.scale : 1.0;
    p.premultiply = x.scale > 0.0f ? 1.0f : x.scale;
    p.unit = static_cast<float>(scale * kLog2E);
    p.natural = static_cast<float>(scale / p.unit);
    p.natural_residual = static_cast<float>(scale / p.unit - p.natural);
    const int64_t blocks = static_cast<int64_t>(p.matrices) * p.query_blocks;
    if (blocks > INT32_MAX) return "more blocks than a grid has";
    return launch<attention_forward_kernel<T, BF16>>({static_cast<int>(blocks)}, T::THREADS, T::SHARED_BYTES, stream, p);
}

template <typename T>
const char* run_in_type(const AttentionProblem& problem, void* stream) {
    return problem.bf16 ? run<T, true>(problem, stream) : run<T, false>(problem, stream);
}

}  // namespace

const char* attention_forward(const AttentionProblem& problem, void* stream) {
    if (problem.len_q >= kFar || problem.len_k >= kFar) return "sequences of 2^29 or more";
    if (problem.head_dim <= 64 && problem.value_dim <= 64) return run_in_type<Tiles<64, 128>>(problem, stream);
    // Wide tiles cost less for each key; where a band or the keys' end cuts them, more keys.
    const auto visited = [&](int keys) { return static_cast<int64_t>(divide_up(problem.len_k, keys)) * keys; };
    const bool wide = problem.window_left < 0 && problem.window_right < 0 && visited(176) * 20 <= visited(128) * 21;
    return wide ? run_in_type<Tiles<128, 176>>(problem, stream) : run_in_type<Tiles<128, 128>>(problem, stream);
}

}  // namespace fusedformer::cuda
