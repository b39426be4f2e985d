// Attention of a few queries over a long cache, for sm_80 and later: its keys split into pieces, a block of four warps
// each (Flash-Decoding, Dao et al., 2023).
//
// The work. Every key and value is read once for the 16 rows of a block: the queries of all heads that share a key
// head, row r being query r / group of the head that stands r % group after the first. That is 16 operations for each
// byte read, a tenth or less of what the tensor cores could do meanwhile: time is memory's alone, and the schedule has
// one aim, that loads are always in flight, enough of them, on every processor.
//
// How many. Bytes in flight = latency x bandwidth: an H100 moves 3.35 TB/s, 25 bytes a nanosecond for each of its 132
// processors, after 600 to 800 ns under load: 20 KB; an H200 29 KB, an A100 15 KB. A block keeps 64 KB in flight
// (four warps with STAGES - 1 stages of 4 KB, or 2 of 8 KB), and two blocks share a processor of sm_90, or of sm_80 up
// to a head dim of 128: enough with a wide margin for whatever else delays a load.
//
// Warps do not wait for each other. A warp takes every fourth tile of the piece's keys (16 of them, or 32 where they
// are short), with a ring of stages, a running maximum and sums of its own:
//
//     tile      | wait, start K(t + 2)   S = Q K(t)'   P = exp(S - m)   | wait, start V(t + 2)   O = O + P V(t)
//     ring      | K(t)  V(t)  K(t+1)  V(t+1)  K(t+2) -> the stage that V(t - 1) left
//
// Keys and values take turns in one ring, so that even the widest fit 99 KB, what sm_86 and sm_89 have. The only
// barriers within the loop are the warp's own: they show the lanes each other's copies. The alternative, warps that
// split the features, would share P through shared memory, with two barriers of the block for each tile.
//
// Fragments. Q is in registers as the A operand. K is stored key by key, which is what the B operand of S = Q K' wants
// of ldmatrix; V wants it transposed. The scores' accumulators, rounded, are the A operand of P V as they are. Rows of
// a stage are a multiple of 128 bytes; their 16-byte chunks are permuted by XOR with the row's number, so that neither
// the copies nor ldmatrix meet a bank twice.
//
// Slots. Lane l looks up where slot l of a tile lies: one load of the block table a tile, whatever the size of a page,
// a tile ahead of its use; the lanes that copy a row learn its address by a shuffle. A slot of the appended keys is
// read where the caller has it, so that the blocks that store it in the cache, each its share, meet no reader there:
// the append needs no kernel of its own. Copies fill with zeros what lies beyond the keys in use or beyond a head dim:
// nothing else is read.
//
// Joining. The four warps' results, then the pieces', each with its maximum m and its sum l of exp(score - m), join by
//     m = max(m1, m2)      O = exp(m1 - m) O1 + exp(m2 - m) O2      l likewise
// in an order that shapes alone decide: the same bits in every run. Where one piece is all, the block writes the output
// itself; else a second kernel reads the pieces. How many there are is decided by shapes and the number of processors,
// as the host never waits for the lengths; a block whose piece is empty ends at once.
#include <algorithm>
#include <cmath>

#include "attention_decode_cache.h"
#include "device.h"
#include "launch.h"
#include "problem.h"

namespace fusedformer::cuda {
namespace decode {
namespace {

constexpr float LOG2E = 1.4426950408889634f, MINUS_INF = -INFINITY;

// 2^(x log2 e) for x <= 0. The difference of two scores is taken before: it is 0 where they are equal.
DEVICE float exponential(float x) { return exp2_approx(x * LOG2E); }
DEVICE float finite(float max) { return max == MINUS_INF ? 0.0f : max; }  // -inf - -inf would be NaN

// Four features of a row's sum of exp(score - max) values, and the sum of exp(score - max).
struct Sums {
    float max = MINUS_INF, sum = 0.0f;
    float values[4] = {};

    DEVICE void join(const Sums& other) {
        const float new_max = fmaxf(max, other.max);
        const float mine = exponential(max - finite(new_max)), others = exponential(other.max - finite(new_max));
        max = new_max;
        sum = sum * mine + other.sum * others;
#pragma unroll
        for (int i = 0; i < 4; i++) values[i] = values[i] * mine + other.values[i] * others;
    }
};

struct alignas(16) Floats {
    float x[4];
};
struct alignas(8) Pairs {
    uint32_t x[2];
};

// A row's results: four features of the output from `feature` on, the first of them with the log-sum-exp.
template <bool BF16>
DEVICE void store_results(const DecodeParams& params, int matrix, int row, int feature, const Sums& s) {
    const DecodeProblem& p = params.problem;
    const int b = matrix / p.heads_kv, head = matrix % p.heads_kv * params.group + row % params.group;
    const int query = row / params.group;
    const float share = s.sum == 0.0f ? 0.0f : 1.0f / s.sum;
    uint16_t* out = static_cast<uint16_t*>(p.out.data) + b * p.out.batch_stride + head * p.out.head_stride +
                    query * p.out.row_stride + feature;
    *reinterpret_cast<Pairs*>(out) = {pack<BF16>(s.values[0] * share, s.values[1] * share),
                                      pack<BF16>(s.values[2] * share, s.values[3] * share)};
    if (feature == 0 && p.lse)
        p.lse[(static_cast<int64_t>(b) * p.heads + head) * p.len_q + query] =
            s.sum == 0.0f ? MINUS_INF : s.max + logf(s.sum);
}

// 1 - 2 / (e^2x + 1) is wrong by one part in 2^24 of 1: near 0, where the cap is far, too much of the score. There a
// quotient of polynomials (Lambert's continued fraction) takes from x what tanh is short of it.
DEVICE float tanh(float x) {
    const float square = x * x;
    const float near = x - x * square * (315.0f + 14.0f * square) / (945.0f + square * (420.0f + 15.0f * square));
    const float far = 1.0f - 2.0f / (exp2_approx(x * (2.0f * LOG2E)) + 1.0f);
    return square < 0.25f ? near : far;
}

template <bool BF16, int WIDTH>
__global__ void __launch_bounds__(THREADS, 2) attention_decode_kernel(const __grid_constant__ DecodeParams params) {
    using T = Tile<WIDTH>;
    const DecodeProblem& p = params.problem;
    // Blocks of rows that read the same keys are neighbours: all but the first find them in the second-level cache.
    const int row_block = block_index().x % params.row_blocks, matrix = block_index().x / params.row_blocks;
    const int piece = block_index().y;
    const int b = matrix / p.heads_kv, h_kv = matrix % p.heads_kv;
    const int warp = warp_index(), lane = lane_index(), first_row = row_block * ROWS;

    const Seen seen = seen_keys<WIDTH>(params, b, first_row);
    const int cached = seen.length - p.appended;
    const int start = seen.low + piece * seen.piece_keys;
    const int end = params.rows > 0 ? smaller(start + seen.piece_keys, seen.high) : start;
    char* const ring = shared_memory() + warp * T::RING;
    const int first_key = start + warp * T::KEYS;
    Loads<WIDTH> loads(p, b, h_kv, cached, end, ring);
    loads.look_up(first_key);
#pragma unroll
    for (int i = 0; i < T::AHEAD; i++) {
        loads.keys(first_key + i * T::STEP, 2 * i);
        loads.values(first_key + i * T::STEP, 2 * i + 1);
        loads.look_up(first_key + (i + 1) * T::STEP);
    }

    append(p, b, h_kv, cached, piece * params.row_blocks + row_block, params.pieces * params.row_blocks);
    // The first piece always says something: of rows without keys, or of their sinks.
    if (start >= end && (piece > 0 || params.rows == 0)) return;

    // This lane's rows of the tile, lane / 4 and 8 further on: the queries are the A operand. Rows past the last are it
    // again.
    uint32_t q[WIDTH / 16][4];
    float acc[WIDTH / 8][4] = {};                                  // (16, WIDTH)
    float max[2] = {MINUS_INF, MINUS_INF}, sum[2] = {0.0f, 0.0f};  // the sum of this lane's columns
    float slopes[2] = {0.0f, 0.0f};
    int positions[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = smaller(first_row + lane / 4 + 8 * r, params.rows - 1);
        const int query = row / params.group, head = h_kv * params.group + row % params.group;
        const uint16_t* from = static_cast<const uint16_t*>(p.q.data) + b * p.q.batch_stride + head * p.q.head_stride +
                               query * p.q.row_stride + 2 * (lane % 4);
#pragma unroll
        for (int i = 0; i < WIDTH / 8; i++)
            q[i / 2][i % 2 * 2 + r] = 8 * i < p.head_dim ? *reinterpret_cast<const uint32_t*>(from + 8 * i) : 0u;
        positions[r] = query + seen.position_offset;
        if (p.alibi_slopes) slopes[r] = p.alibi_slopes[b * p.slopes_batch_stride + head * p.slopes_head_stride];
        if (!p.sinks || piece > 0 || warp > 0) continue;
        max[r] = p.sinks[head * p.sinks_head_stride];  // a sink is a key seen before all others, without a value
        sum[r] = lane % 4 == 0 && max[r] != MINUS_INF ? 1.0f : 0.0f;
    }

    // Lane l points ldmatrix at row l % 8 of matrix l / 8. Four matrices are 16 keys by 16 features: of K in the order
    // that two B operands of 8 keys want, of V transposed, of 8 features.
    const int key_at = T::at(lane / 16 * 8 + lane % 8, lane / 8 % 2), value_at = T::at(lane % 16, lane / 16);
    int stage = 0;
    for (int key = first_key; key < end; key += T::STEP) {
        copy_wait<T::STAGES - 2>();
        warp_barrier();
        loads.keys(key + T::AHEAD * T::STEP, T::before(stage));
        float scores[T::KEYS / 8][4] = {};  // (16, KEYS)
#pragma unroll
        for (int i = 0; i < WIDTH / 16; i++)
#pragma unroll
            for (int n = 0; n < T::KEYS / 16; n++) {
                uint32_t k[4];
                load_matrix(k, ring + 16 * n * T::PITCH + ((stage * T::STAGE + key_at) ^ 32 * i));
                mma<BF16>(scores[2 * n], q[i], k[0], k[1]);
                mma<BF16>(scores[2 * n + 1], q[i], k[2], k[3]);
            }
        stage = T::after(stage);

        const auto each_score = [&](auto&& change) {  // of row r with a key: x = change(x, r, key)
#pragma unroll
            for (int i = 0; i < T::KEYS / 2; i++) {
                float& x = scores[i / 4][i % 4];
                x = change(x, i % 4 / 2, key + i / 4 * 8 + lane % 4 * 2 + i % 2);
            }
        };
        each_score([&](float x, int, int) { return x * p.scale; });
        if (p.softcap > 0.0f) each_score([&](float x, int, int) { return p.softcap * tanh(x / p.softcap); });
        if (p.alibi_slopes)
            each_score(
                [&](float x, int r, int k) { return x - slopes[r] * fabsf(static_cast<float>(k - positions[r])); });
        each_score([&](float x, int r, int k) {
            const int distance = k - positions[r];
            return distance >= -params.left && distance <= params.right && k < end ? x : MINUS_INF;
        });

        float alpha[2], reference[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float new_max = max[r];
#pragma unroll
            for (int n = 0; n < T::KEYS / 8; n++)
                new_max = fmaxf(new_max, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
            new_max = fmaxf(new_max, shuffle_xor(new_max, 1));
            new_max = fmaxf(new_max, shuffle_xor(new_max, 2));
            reference[r] = finite(new_max);
            alpha[r] = exponential(max[r] - reference[r]);
            max[r] = new_max;
            sum[r] *= alpha[r];
        }
        uint32_t weights[T::KEYS / 8][2];  // (16, KEYS)
#pragma unroll
        for (int i = 0; i < T::KEYS / 4; i++) {
            const int n = i / 2, r = i % 2;
            const float first = exponential(scores[n][2 * r] - reference[r]);
            const float second = exponential(scores[n][2 * r + 1] - reference[r]);
            sum[r] += first + second;
            weights[n][r] = pack<BF16>(first, second);
        }
#pragma unroll
        for (int i = 0; i < WIDTH / 2; i++) acc[i / 4][i % 4] *= alpha[i % 4 / 2];

        copy_wait<T::STAGES - 2>();
        warp_barrier();
        loads.values(key + T::AHEAD * T::STEP, T::before(stage));
        loads.look_up(key + (T::AHEAD + 1) * T::STEP);
#pragma unroll
        for (int n = 0; n < T::KEYS / 16; n++) {
            const uint32_t a[4] = {weights[2 * n][0], weights[2 * n][1], weights[2 * n + 1][0], weights[2 * n + 1][1]};
#pragma unroll
            for (int i = 0; i < WIDTH / 16; i++) {
                uint32_t v[4];
                load_matrix_transposed(v, ring + 16 * n * T::PITCH + ((stage * T::STAGE + value_at) ^ 32 * i));
                mma<BF16>(acc[2 * i], a, v[0], v[1]);
                mma<BF16>(acc[2 * i + 1], a, v[2], v[3]);
            }
        }
        stage = T::after(stage);
    }

    // Joins the warps: each leaves its (16, WIDTH) where its ring was, columns permuted so that no bank is met twice.
    const auto at = [](int row, int feature) { return row * WIDTH + (feature ^ 8 * (row & 3)); };
    const auto sums_of = [](int warp) { return reinterpret_cast<float*>(shared_memory() + warp * T::RING); };
    float* const maxima = reinterpret_cast<float*>(shared_memory() + WARPS * T::RING);  // (WARPS, 16)
    float* const totals = maxima + WARPS * ROWS;
    copy_wait<0>();
    warp_barrier();
#pragma unroll
    for (int r = 0; r < 2; r++) {
        sum[r] += shuffle_xor(sum[r], 1);
        sum[r] += shuffle_xor(sum[r], 2);
        const int row = lane / 4 + 8 * r;
        if (lane % 4 == 0) maxima[warp * ROWS + row] = max[r], totals[warp * ROWS + row] = sum[r];
#pragma unroll
        for (int i = 0; i < WIDTH / 8; i++)
#pragma unroll
            for (int j = 0; j < 2; j++) sums_of(warp)[at(row, 8 * i + 2 * (lane % 4)) + j] = acc[i][2 * r + j];
    }
    block_barrier();
    for (int i = thread_index(); i < ROWS * WIDTH / 4; i += THREADS) {
        const int in_tile = i / (WIDTH / 4), row = first_row + in_tile, feature = i % (WIDTH / 4) * 4;
        if (row >= params.rows || feature >= p.value_dim) continue;
        Sums all;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const Floats found = *reinterpret_cast<const Floats*>(sums_of(w) + at(in_tile, feature));
            all.join({maxima[w * ROWS + in_tile], totals[w * ROWS + in_tile], found.x[0], found.x[1], found.x[2],
                      found.x[3]});
        }
        if (params.pieces == 1) {
            store_results<BF16>(params, matrix, row, feature, all);
        } else {
            const int64_t to = (static_cast<int64_t>(matrix) * params.pieces + piece) * params.rows + row;
            *reinterpret_cast<Floats*>(params.partial + to * p.value_dim + feature) = {all.values[0], all.values[1],
                                                                                       all.values[2], all.values[3]};
            if (feature == 0) params.partial_max[to] = all.max, params.partial_sum[to] = all.sum;
        }
    }
}

// A block for each row: joins the pieces that saw keys. Each thread has four features of every PARTS-th piece.
template <bool BF16, int WIDTH>
__global__ void __launch_bounds__(THREADS) attention_combine_kernel(const __grid_constant__ DecodeParams params) {
    constexpr int QUADS = WIDTH / 4, PARTS = THREADS / QUADS;
    const DecodeProblem& p = params.problem;
    const int row = block_index().x % params.rows, matrix = block_index().x / params.rows;
    const Seen seen = seen_keys<WIDTH>(params, matrix / p.heads_kv, row / ROWS * ROWS);
    const int pieces = ceil_div(larger(seen.high - seen.low, 1), seen.piece_keys);
    const int quad = thread_index() % QUADS, part = thread_index() / QUADS, feature = 4 * quad;
    Sums* const sums = reinterpret_cast<Sums*>(shared_memory());  // (PARTS, QUADS)
    Sums mine;
    if (feature < p.value_dim) {
#pragma unroll 4
        for (int piece = part; piece < pieces; piece += PARTS) {
            const int64_t from = (static_cast<int64_t>(matrix) * params.pieces + piece) * params.rows + row;
            const Floats found = *reinterpret_cast<const Floats*>(params.partial + from * p.value_dim + feature);
            mine.join(
                {params.partial_max[from], params.partial_sum[from], found.x[0], found.x[1], found.x[2], found.x[3]});
        }
    }
    sums[thread_index()] = mine;
    block_barrier();
    if (part > 0 || feature >= p.value_dim) return;
    for (int other = 1; other < PARTS; other++) mine.join(sums[other * QUADS + quad]);
    store_results<BF16>(params, matrix, row, feature, mine);
}

int width_of(const DecodeProblem& p) {
    const int most = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
    return most <= 64 ? 64 : most <= 128 ? 128 : 256;
}

// The number of pieces that takes the least time on so many processors, two blocks to each, in waves. Time is counted
// in tiles of a warp; a block takes WARPS more to fill its rings and to join its warps, and pieces, read again by
// another launch, JOIN. The candidates are, for each number of waves, the most pieces that fit them; of those that
// leave a block as many tiles, the fewest.
int pieces_of(int64_t blocks, int64_t tiles, int processors) {
    constexpr int64_t MOST_WAVES = 8, MOST_PIECES = 256, JOIN = 4 * WARPS;
    const auto ceil = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    const int64_t together = 2 * static_cast<int64_t>(processors);
    const int64_t most = std::min(ceil(tiles, WARPS), MOST_PIECES);
    int64_t best = 1, least = ceil(blocks, together) * (tiles + WARPS);
    for (int64_t waves = 1; waves <= MOST_WAVES; waves++) {
        const int64_t fitting = std::min(waves * together / blocks, most);
        if (fitting < 2) continue;
        const int64_t each = ceil(tiles, fitting), pieces = ceil(tiles, each);
        const int64_t time = ceil(blocks * pieces, together) * (each + WARPS) + JOIN;
        if (time < least) least = time, best = pieces;
    }
    return static_cast<int>(best);
}

DecodeParams plan(const DecodeProblem& p, int processors) {
    DecodeParams params = {};
    params.problem = p;
    params.group = p.heads / p.heads_kv;
    params.rows = params.group * p.len_q;
    params.row_blocks = params.rows > ROWS ? (params.rows + ROWS - 1) / ROWS : 1;  // one appends without queries too
    const auto side = [](int64_t keys) { return static_cast<int>(keys < 0 || keys > UNBOUNDED ? UNBOUNDED : keys); };
    params.left = side(p.window_left), params.right = side(p.window_right);
    const int64_t matrices = static_cast<int64_t>(p.batch) * p.heads_kv, keys = static_cast<int64_t>(p.pages) * p.page;
    const int tile = width_of(p) > 64 ? Tile<128>::KEYS : Tile<64>::KEYS;
    static_assert(Tile<128>::KEYS == Tile<256>::KEYS);
    const bool is_empty = matrices == 0 || params.rows == 0;
    params.pieces = is_empty ? 1 : pieces_of(matrices * params.row_blocks, (keys + tile - 1) / tile, processors);
    const int64_t partials = matrices * params.pieces * params.rows;
    params.partial = static_cast<float*>(p.workspace);
    params.partial_max = params.partial + partials * p.value_dim;
    params.partial_sum = params.partial_max + partials;
    return params;
}

template <bool BF16, int WIDTH>
const char* run(const DecodeParams& params, void* stream) {
    const DecodeProblem& p = params.problem;
    const int64_t matrices = static_cast<int64_t>(p.batch) * p.heads_kv;
    const int64_t blocks = matrices * params.row_blocks, rows = matrices * params.rows;
    if (blocks == 0) return nullptr;
    if (static_cast<int64_t>(p.pages) * p.page >= UNBOUNDED) return "a cache of 2^30 slots or more";
    if (blocks > INT32_MAX || rows > INT32_MAX) return "more blocks than a grid has";
    const char* error = launch<attention_decode_kernel<BF16, WIDTH>>({static_cast<int>(blocks), params.pieces}, THREADS,
                                                                     Tile<WIDTH>::SHARED, stream, params);
    if (error || params.pieces == 1) return error;
    return launch<attention_combine_kernel<BF16, WIDTH>>({static_cast<int>(rows)}, THREADS, THREADS * sizeof(Sums),
                                                         stream, params);
}

template <bool BF16>
const char* run(const DecodeParams& params, void* stream) {
    switch (width_of(params.problem)) {
        case 64:
            return run<BF16, 64>(params, stream);
        case 128:
            return run<BF16, 128>(params, stream);
        default:
            return run<BF16, 256>(params, stream);
    }
}

}  // namespace
}  // namespace decode

size_t attention_decode_workspace(const DecodeProblem& problem, int processors) {
    const decode::DecodeParams params = decode::plan(problem, processors);
    if (params.pieces == 1) return 0;
    const size_t partials = static_cast<size_t>(problem.batch) * problem.heads_kv * params.pieces * params.rows;
    return partials * (problem.value_dim + 2) * sizeof(float);
}

const char* attention_decode(const DecodeProblem& problem, int processors, void* stream) {
    const decode::DecodeParams params = decode::plan(problem, processors);
    return problem.bf16 ? decode::run<true>(params, stream) : decode::run<false>(params, stream);
}

}  // namespace fusedformer::cuda
