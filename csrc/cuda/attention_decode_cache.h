// The cache of the decode kernel: which of its keys a block of rows sees, where their slots lie, the append, the loads.
#pragma once

#include "device.h"
#include "problem.h"

namespace fusedformer::cuda::decode {

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int ROWS = 16;            // of a block: the height of a product
constexpr int UNBOUNDED = 1 << 30;  // keys: more than a cache holds

struct DecodeParams {
    DecodeProblem problem;
    int group, rows, row_blocks;  // query heads for each key head; rows that share its keys
    int left, right;              // the window, UNBOUNDED where it is
    int pieces;
    float *partial, *partial_max, *partial_sum;  // (B, Hkv, pieces, rows, Ev), and without Ev
};

template <int WIDTH>  // features of a row in shared memory: E and Ev, padded
struct Tile {
    static constexpr int KEYS = WIDTH > 64 ? 16 : 32;
    static constexpr int STEP = WARPS * KEYS;  // from one tile of a warp to its next
    static constexpr int PITCH = 2 * WIDTH, STAGE = KEYS * PITCH;
    static constexpr int STAGES = WIDTH > 128 ? 3 : 5;  // odd: the loads STAGES - 1 ahead are of the same kind
    static constexpr int AHEAD = (STAGES - 1) / 2;      // tiles
    static constexpr int RING = STAGES * STAGE;
    static constexpr int SHARED = WARPS * RING + 2 * WARPS * ROWS * static_cast<int>(sizeof(float));
    static_assert(SHARED <= 99 * 1024, "the least that an architecture has for a block");
    static_assert(ROWS * WIDTH * static_cast<int>(sizeof(float)) <= RING, "a warp leaves its sums where its ring was");

    DEVICE static int after(int stage) { return stage + 1 == STAGES ? 0 : stage + 1; }
    DEVICE static int before(int stage) { return stage == 0 ? STAGES - 1 : stage - 1; }
    // Where a 16-byte chunk of a row is. If row and i have no bit in common, nor chunk and j,
    // at(row + i, chunk + j) = i * PITCH + (at(row, chunk) ^ 16 * (j ^ i % 8)).
    DEVICE static int at(int row, int chunk) { return row * PITCH + 16 * (chunk ^ (row & 7)); }
};

DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }
DEVICE int smaller(int a, int b) { return a < b ? a : b; }
DEVICE int larger(int a, int b) { return a > b ? a : b; }

// The keys [low, high) that a block of rows sees; piece i has those from low + i * piece_keys on.
struct Seen {
    int length, position_offset, low, high, piece_keys;
};

template <int WIDTH>
DEVICE Seen seen_keys(const DecodeParams& params, int b, int first_row) {
    using T = Tile<WIDTH>;
    const DecodeProblem& p = params.problem;
    Seen s;
    s.length = static_cast<int>(p.cache_seqlens[b]) + p.appended;
    s.position_offset = s.length - p.len_q;
    const int first = first_row / params.group, last = (smaller(first_row + ROWS, params.rows) - 1) / params.group;
    s.low = larger(first + s.position_offset - params.left, 0);
    s.high = larger(smaller(s.length, last + s.position_offset + params.right + 1), 0);
    const int tiles = ceil_div(larger(s.high - s.low, 1), T::KEYS);
    s.piece_keys = larger(ceil_div(tiles, params.pieces) * T::KEYS, T::STEP);  // each warp has a tile at least
    return s;
}

// Where a slot lies in the block of the cache that has it, and that block: of sequence b, or by the table.
DEVICE int64_t slot_offset(const DecodeProblem& p, const Tensor4& cache, int block, int slot, int h_kv) {
    const int within = p.block_table ? slot % p.page : slot;
    return block * cache.batch_stride + h_kv * cache.head_stride + within * cache.row_stride;
}
DEVICE int block_of(const DecodeProblem& p, int b, int slot) {
    return p.block_table ? p.block_table[b * p.table_stride + slot / p.page] : b;
}

// Stores the new keys and values of a sequence behind its `cached` ones: share `share` of so many.
DEVICE void append(const DecodeProblem& p, int b, int h_kv, int cached, int share, int shares) {
    const int key_chunks = p.head_dim / 8, chunks = key_chunks + p.value_dim / 8;
    for (int i = share * THREADS + thread_index(); i < p.appended * chunks; i += shares * THREADS) {
        const int slot = i / chunks, chunk = i % chunks;
        const bool is_key = chunk < key_chunks;
        const Tensor4 &from = is_key ? p.new_key : p.new_value, &to = is_key ? p.key_cache : p.value_cache;
        const int feature = 8 * (is_key ? chunk : chunk - key_chunks);
        const int64_t source = b * from.batch_stride + h_kv * from.head_stride + slot * from.row_stride;
        const int64_t target = slot_offset(p, to, block_of(p, b, cached + slot), cached + slot, h_kv);
        *reinterpret_cast<Chunk*>(static_cast<uint16_t*>(to.data) + target + feature) =
            *reinterpret_cast<const Chunk*>(static_cast<const uint16_t*>(from.data) + source + feature);
    }
}

// A warp's loads of its tiles, each into a stage of its ring.
template <int WIDTH>
class Loads {
  public:
    using T = Tile<WIDTH>;

    DEVICE Loads(const DecodeProblem& p, int b, int h_kv, int cached, int end, char* ring)
        : p_(p), b_(b), h_kv_(h_kv), cached_(cached), end_(end), ring_(ring) {}

    // Where this lane's slot of a tile is, before its keys and values are loaded: the tile begins with key `first`.
    DEVICE void look_up(int first) {
        const int slot = slot_of(first);
        block_ = slot < smaller(cached_, end_) ? block_of(p_, b_, slot) : 0;
    }
    DEVICE void keys(int first, int stage) {
        if (first < end_) copy(row(p_.key_cache, p_.new_key, slot_of(first)), p_.head_dim, first, stage);
        copy_commit();  // a group for every stage, also where nothing is left to load: the waits count groups
    }
    DEVICE void values(int first, int stage) {
        if (first < end_) copy(row(p_.value_cache, p_.new_value, slot_of(first)), p_.value_dim, first, stage);
        copy_commit();
    }

  private:
    DEVICE int slot_of(int first) const { return first + lane_index() % T::KEYS; }
    DEVICE const uint16_t* row(const Tensor4& cache, const Tensor4& added, int slot) const {
        if (slot < cached_)
            return static_cast<const uint16_t*>(cache.data) + slot_offset(p_, cache, block_, slot, h_kv_);
        return static_cast<const uint16_t*>(added.data) + b_ * added.batch_stride + h_kv_ * added.head_stride +
               (slot - cached_) * added.row_stride;
    }
    DEVICE void copy(const uint16_t* row_of_lane, int features, int first, int stage) const {
        constexpr int CHUNKS = WIDTH / 8, TOGETHER = 32 / CHUNKS;  // of a row; rows at a time
        const int chunk = lane_index() % CHUNKS, to = stage * T::STAGE + T::at(lane_index() / CHUNKS, chunk);
        const auto address = reinterpret_cast<uint64_t>(row_of_lane);
#pragma unroll
        for (int i = 0; i < T::KEYS / TOGETHER; i++) {
            const int row = i * TOGETHER + lane_index() / CHUNKS;
            const uint64_t from = static_cast<uint64_t>(shuffle(static_cast<uint32_t>(address >> 32), row)) << 32 |
                                  shuffle(static_cast<uint32_t>(address), row);
            copy_async(ring_ + i * TOGETHER * T::PITCH + (to ^ 16 * (i * TOGETHER % 8)),
                       reinterpret_cast<const uint16_t*>(from) + 8 * chunk, first + row < end_ && 8 * chunk < features);
        }
    }

    const DecodeProblem& p_;
    const int b_, h_kv_, cached_, end_;
    char* const ring_;
    int block_ = 0;  // of the cache, that this lane's slot of the next tile lies in
};

}  // namespace fusedformer::cuda::decode
