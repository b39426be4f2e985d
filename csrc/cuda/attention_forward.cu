// Attention forward for Hopper: O = softmax(Q Kᵀ scale) V, the scores in registers alone.
//
// A block takes 64 queries for each of its consumer warpgroups, of one head, and visits the tiles of keys that any of
// them sees, from the last to the first. One more warpgroup, the producer, gives up its registers to the others; one
// of its threads has TMA load Q once and K and V tile by tile into two rings of stages. Each stage has two barriers:
// `full`, which counts the bytes, and `empty`, where every consumer warp arrives when its products have read the stage.
//
//     producer     K0 Q   K1 V0   K2 V1   ...            waits at `empty`, runs ahead by the stages of the rings
//     consumer     S = Q K0ᵀ; m, l = softmax(S)
//                  for j = 1, 2, ...
//                      wait for O, free V(j-2); O *= α, P = 16 bits of S
//                      start S = Q Kjᵀ                   the tensor cores work on both products ...
//                      start O += P V(j-1)
//                      wait for S, free Kj
//                      S, m, l, α = softmax(S)           ... while the exponentials are taken under the second
//                  wait for O; O *= α, P = 16 bits of S; O += P V(last); out = O / l
//
// So a warpgroup's softmax hides behind its own PV product. Between warpgroups named barriers pass a token round: who
// holds it starts both products and passes it on, so that one's softmax falls in the time of another's products instead
// of all taking exponentials at once ("ping-pong"). All warpgroups make the same number of steps, those of the block.
//
// S stays in the fragments in which WGMMA leaves it: a thread has a quarter of two rows, a row's maximum takes two
// shuffles, and four neighbouring pairs, rounded, are the A operand of the next product as they stand. The running
// sum l stays a partial one in each thread until the end. m is the maximum of scores in units of log 2: a weight is one
// fused multiply-add and one exp2. (For that the scale must be positive; if not, scores are multiplied by it before.)
//
// The band. Query i sees the keys [i + first, i + last], cut to [0, len_k): causality, windows and offsets are these
// two numbers, an open side a far one. Only the tiles it touches are visited, and only those that cross an edge of it
// for some row of the warpgroup are masked. TMA fills with zeros beyond the features: E and Ev are any up to HEAD_DIM.
//
// Order. Where all blocks have as many keys, there are as many as multiprocessors, and each goes from one piece of work
// to the next: while the consumers finish one, the producer loads Q and keys of the other (so O goes to memory straight
// from the registers, as Q's place is taken). Where causality makes them unequal there is a block for each piece, those
// with most keys first, and short ones fill the gaps at the end; in groups of heads whose keys and values L2 holds.
//
// Registers of a consumer thread at HEAD_DIM = 128: S 64, O 64, P 32, of 240, with 128 keys; S 88, P 44 with 176. At
// HEAD_DIM = 64, with three consumers: S 64, O 32, P 32, of 160.

#include "attention_forward_plan.h"
#include "device.h"
#include "launch.h"
#include "problem.h"

namespace fusedformer::cuda {
namespace {

using namespace forward;

// ---- producer: one thread

template <typename T>
DEVICE void load_tile(char* tile, const TensorMap& map, uint64_t* full, int rows, int row, int head, int batch) {
#pragma unroll
    for (int panel = 0; panel < T::PANELS; ++panel)
        tma_load(tile + panel * rows * kPanelRowBytes, map, full, panel * kPanelFeatures, row, head, batch);
}

template <typename T>
DEVICE void produce(const Params& p, const Shared<T>& shared) {
    Turn<1> q;
    Turn<T::STAGES> k, v;
    for (int index = block_index().x; index < p.works; index += grid_size().x) {
        const Work work = work_of<T>(p, index);
        const auto load_keys = [&](int tile) {
            barrier_wait(shared.k_empty(k.stage), k.parity ^ 1);
            barrier_expect_bytes(shared.k_full(k.stage), T::KV_BYTES);
            load_tile<T>(shared.k(k.stage), p.k, shared.k_full(k.stage), T::KEYS, tile * T::KEYS, work.head / p.group,
                         work.batch);
            k.next();
        };
        const auto load_values = [&](int tile) {
            barrier_wait(shared.v_empty(v.stage), v.parity ^ 1);
            barrier_expect_bytes(shared.v_full(v.stage), T::KV_BYTES);
            load_tile<T>(shared.v(v.stage), p.v, shared.v_full(v.stage), T::KEYS, tile * T::KEYS, work.head / p.group,
                         work.batch);
            v.next();
        };
        if (work.begin == work.end) continue;
        load_keys(work.end - 1);
        barrier_wait(shared.q_empty(), q.parity ^ 1);
        barrier_expect_bytes(shared.q_full(), T::CONSUMERS * T::Q_BYTES);
        for (int warpgroup = 0; warpgroup < T::CONSUMERS; ++warpgroup)
            load_tile<T>(shared.q(warpgroup), p.q, shared.q_full(), kRows, work.start + warpgroup * kRows, work.head,
                         work.batch);
        q.next();
        for (int tile = work.end - 2; tile >= work.begin; --tile) {
            load_keys(tile);
            load_values(tile + 1);
        }
        load_values(work.begin);
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

// Scores to exp2(unit score - maximum), and the factor for what was summed up before: 1 where the maximum is the same,
// not nearly 1 as a fused product minus the rounded maximum would make it, tile after tile.
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

// Of four neighbouring lanes: word i of lane j goes to word j of lane i.
DEVICE void transpose_quad(uint32_t (&words)[4]) {
#pragma unroll
    for (int step = 1; step <= 2; ++step) {
        const bool upper = lane_index() & step;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & step) continue;
            const uint32_t theirs = shuffle_xor(upper ? words[i] : words[i + step], step);
            upper ? words[i] = theirs : words[i + step] = theirs;
        }
    }
}

// A row of O: of every eight features a lane has two, of every 32 it stores eight at once.
template <typename T, bool BF16>
DEVICE void store_row(const Params& p, const Work& work, int query, int row, const float (&o)[T::HEAD_DIM / 2]) {
    const Tensor4& out = p.out;
    const int64_t offset = work.batch * out.batch_stride + work.head * out.head_stride + query * out.row_stride;
    auto* to = static_cast<uint16_t*>(out.data) + offset;
#pragma unroll
    for (int feature = 0; feature < T::HEAD_DIM; feature += 32) {
        Chunk chunk;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int pair = feature / 2 + i * 4 + row * 2;
            chunk.words[i] = pack<BF16>(o[pair], o[pair + 1]);
        }
        transpose_quad(chunk.words);
        const int mine = feature + lane_index() % 4 * 8;
        if (query < p.len_q && mine < p.value_dim) *reinterpret_cast<Chunk*>(to + mine) = chunk;
    }
}

// What of a warpgroup's walk outlasts one piece of work.
template <typename T>
struct Walk {
    Turn<1> q;
    Turn<T::STAGES> k, v;
};

template <typename T, bool BF16>
DEVICE void attend(const Params& p, const Shared<T>& shared, const Work& work, int warpgroup, Walk<T>& walk) {
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

    float o[T::HEAD_DIM / 2];       // (64, HEAD_DIM)
    float s[T::KEYS / 2];           // (64, KEYS)
    uint32_t p16[T::KEYS / 16][4];  // (64, KEYS)
    float alpha[2];
#pragma unroll
    for (float& x : o) x = 0.0f;

    const char* q_tile = shared.q(warpgroup);
    Turn<T::STAGES>&k = walk.k, &v = walk.v;
    const auto arrive = [&](uint64_t* bar) {  // one thread for each warp
        if (lane == 0) barrier_arrive(bar);
    };
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
    const auto wait_for_output = [&](bool under_way) {
        wgmma_wait<0>(o, p16);
        if (under_way) {
            arrive(shared.v_empty(v.stage));
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
        barrier_wait(shared.q_full(), walk.q.parity);
        walk.q.next();
        barrier_wait(shared.k_full(k.stage), k.parity);
        start_scores();
        wgmma_wait<0>(s);
        arrive(shared.k_empty(k.stage));
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
            arrive(shared.k_empty(k.stage));
            k.next();
            scores_to_weights(tile);
        }
        arrive(shared.q_empty());
        wait_for_output(work.end - work.begin > 1);
        scale_output();
        barrier_wait(shared.v_full(v.stage), v.parity);
        start_output();
        wait_for_output(true);
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
        store_row<T, BF16>(p, work, query, i, o);
    }
}

template <typename T, bool BF16>
__global__ void __launch_bounds__(T::THREADS, 1) attention_forward_kernel(const __grid_constant__ Params p) {
    const Shared<T> shared{shared_memory()};
    const int warpgroup = warpgroup_index();
    if (thread_index() == 0) {
        barrier_init(shared.q_full(), 1);
        barrier_init(shared.q_empty(), T::CONSUMERS * 4);
        for (int stage = 0; stage < T::STAGES; ++stage) {
            barrier_init(shared.k_full(stage), 1);
            barrier_init(shared.v_full(stage), 1);
            barrier_init(shared.k_empty(stage), T::CONSUMERS * 4);
            barrier_init(shared.v_empty(stage), T::CONSUMERS * 4);
        }
        barrier_init_fence();
        tma_prefetch(p.q), tma_prefetch(p.k), tma_prefetch(p.v);
    }
    block_barrier();
    if (warpgroup == 0) {
        registers_decrease<T::PRODUCER_REGISTERS>();
        if (thread_index() == 0) produce<T>(p, shared);
    } else {
        registers_increase<T::CONSUMER_REGISTERS>();
        Walk<T> walk;
        for (int index = block_index().x; index < p.works; index += grid_size().x)
            attend<T, BF16>(p, shared, work_of<T>(p, index), warpgroup - 1, walk);
    }
}

// ---- host

template <typename T, bool BF16>
const char* run(const AttentionProblem& problem, void* stream) {
    const AttentionProblem& x = problem;
    Params p{};
    const char* error = make_tensor_map(p.q, x.q, x.batch, x.heads, x.len_q, x.head_dim, BF16, kRows);
    if (error == nullptr) error = make_tensor_map(p.k, x.k, x.batch, x.heads_kv, x.len_k, x.head_dim, BF16, T::KEYS);
    if (error == nullptr) error = make_tensor_map(p.v, x.v, x.batch, x.heads_kv, x.len_k, x.value_dim, BF16, T::KEYS);
    if (error != nullptr) return error;
    const auto clamp = [](int64_t far) { return static_cast<int>(far < -kFar ? -kFar : far > kFar ? kFar : far); };
    p.out = x.out, p.lse = x.lse, p.lse_residual = x.lse_residual;
    p.heads = x.heads, p.group = x.heads / x.heads_kv;
    p.len_q = x.len_q, p.len_k = x.len_k, p.value_dim = x.value_dim;
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
    const int64_t works = static_cast<int64_t>(p.matrices) * p.query_blocks;
    if (works > INT32_MAX / 2) return "more blocks than a grid has";
    p.works = static_cast<int>(works);
    const int blocks = unequal ? p.works : min(p.works, processors());
    return launch<attention_forward_kernel<T, BF16>>({blocks}, T::THREADS, T::SHARED_BYTES, stream, p);
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
