// Decoding as torch sees it: appends to the cache, then runs the chosen level's kernel. The checks are those of its
// only caller, kernels/attention/kvcache_op.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "decode_problem.h"
#include "level.h"
#include "runtime.h"
#include "tensors.h"

namespace fusedformer {
namespace {

constexpr int64_t PIECE = 512;        // keys: fewer cost more to join than they give to another thread
constexpr int64_t WIDEST_CHUNK = 32;  // of any level, see attention_decode.h

int64_t most_keys(const DecodeProblem& p) {
    if (!p.lengths) return p.len_k;
    return p.appended + (p.batch == 0 ? 0 : *std::max_element(p.lengths, p.lengths + p.batch));
}

char* slot(const DecodeProblem& p, const Rows& cache, int64_t b, int64_t head, int64_t position, int64_t item) {
    int64_t block = b;
    if (p.block_table) {
        block = p.block_table[b * p.table_row + position / p.page * p.table_column];
        position %= p.page;
    }
    return static_cast<char*>(cache.data) + (block * cache.batch + head * cache.head + position * cache.row) * item;
}

void append(const DecodeProblem& p, const Rows& cache, const Tensor& added) {
    const int64_t item = added.element_size();
    for (int64_t b = 0; b < p.batch; b++)
        for (int64_t head = 0; head < p.heads_kv; head++)
            for (int64_t i = 0; i < p.appended; i++) {
                const auto* from = static_cast<const char*>(added.data_ptr()) +
                                   (b * added.stride(0) + head * added.stride(1) + i * added.stride(2)) * item;
                std::memcpy(slot(p, cache, b, head, p.lengths[b] + i, item), from, added.size(3) * item);
            }
}

void* at(void* data, Type type, int64_t elements) {
    return static_cast<char*>(data) + elements * (type == Type::float32 ? 4 : 2);
}

// One sequence of a cache in one piece, as a problem of its own.
Problem sequence(const DecodeProblem& p, int64_t b) {
    Problem one = p;
    one.batch = 1;
    one.len_k = p.lengths[b] + p.appended;
    one.position_offset = one.len_k - p.len_q;
    for (Rows* x : {&one.query, &one.key, &one.value}) x->data = at(x->data, p.type, b * x->batch);
    if (p.alibi_slopes) one.alibi_slopes += b * p.alibi_batch;
    return one;  // sinks are the same for every sequence
}

void attention_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_seqlens, MaybeTensor key,
                      MaybeTensor value, MaybeTensor block_table, MaybeTensor alibi_slopes, MaybeTensor sinks,
                      double scale, int64_t window_left, int64_t window_right, double softcap, Tensor out, Tensor lse) {
    DecodeProblem p;
    p.batch = query.size(0), p.heads = query.size(1), p.heads_kv = key_cache.size(1), p.len_q = query.size(2);
    p.head_dim = query.size(3), p.head_dim_v = value_cache.size(3);
    p.type = type_of(query);
    p.query = rows(query), p.key = rows(key_cache), p.value = rows(value_cache);
    p.sinks = per_head(sinks);
    if (alibi_slopes) {
        p.alibi_slopes = static_cast<const float*>(alibi_slopes->data_ptr());
        p.alibi_batch = stride(*alibi_slopes, 0), p.alibi_head = stride(*alibi_slopes, 1);
    }
    p.scale = scale, p.window_left = window_left, p.window_right = window_right, p.softcap = softcap;
    p.lengths = static_cast<const int64_t*>(cache_seqlens.data_ptr());
    if (block_table) {
        p.block_table = static_cast<const int32_t*>(block_table->data_ptr());
        p.table_row = block_table->stride(0), p.table_column = block_table->stride(1), p.page = key_cache.size(2);
    }
    if (key && value) {
        p.appended = key->size(2);
        append(p, p.key, *key);
        append(p, p.value, *value);
    }
    auto* lse_rows = static_cast<float*>(lse.data_ptr());
    if (block_table || is_decode(p)) return decode(p, rows(out), lse_rows, nullptr);
    std::vector<float> lse_residual(p.heads * p.len_q);
    for (int64_t b = 0; b < p.batch; b++) {
        const Problem one = sequence(p, b);
        Rows one_out = rows(out);
        one_out.data = at(one_out.data, p.type, b * one_out.batch);
        chosen_kernels().forward(one, {one_out, lse_rows + b * p.heads * p.len_q, lse_residual.data()}, runtime());
    }
}

}  // namespace

void decode(DecodeProblem p, Rows out, float* lse, float* lse_residual) {
    const int64_t rows = p.batch * p.heads * p.len_q, keys = most_keys(p);
    if (rows == 0) return;
    const int64_t fair = (keys + MOST_PIECES - 1) / MOST_PIECES;
    p.piece_keys = std::max(PIECE, (fair + PIECE - 1) / PIECE * PIECE);
    if (!is_decode(p)) p.piece_keys = std::max(keys, PIECE);  // its rows are tasks enough
    p.pieces = std::max<int64_t>(1, (keys + p.piece_keys - 1) / p.piece_keys);
    const int64_t width = (p.head_dim_v + WIDEST_CHUNK - 1) / WIDEST_CHUNK * WIDEST_CHUNK + 16;  // whole lines
    const Runtime threads = runtime();
    const size_t partial_bytes = rows * p.pieces * width * sizeof(float), finished_bytes = rows * sizeof(int32_t);
    auto* memory = static_cast<char*>(threads.workspace(partial_bytes + finished_bytes));
    auto* finished = reinterpret_cast<int32_t*>(memory + partial_bytes);
    std::memset(finished, 0, finished_bytes);
    auto* partial = reinterpret_cast<float*>(memory);
    chosen_kernels().decode(p, {out, lse, lse_residual, partial, width, finished}, threads);
}

}  // namespace fusedformer

STABLE_TORCH_LIBRARY_FRAGMENT(fusedformer_native, m) {
    m.def(
        "attention_decode_cpu(Tensor query, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor cache_seqlens, "
        "Tensor? key, Tensor? value, Tensor? block_table, Tensor? alibi_slopes, Tensor? sinks, float scale, "
        "int window_left, int window_right, float softcap, Tensor(c!) out, Tensor(d!) lse) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusedformer_native, CPU, m) {
    m.impl("attention_decode_cpu", TORCH_BOX(&fusedformer::attention_decode));
}
