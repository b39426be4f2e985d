// Decoding as torch sees it: appends to the cache, then runs the chosen level's kernel. The checks are those of its
// only caller, kernels/attention/kvcache_op.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "decode_problem.h"
#include "decode_tensors.h"
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

int64_t size_of(Type type) { return type == Type::float32 ? 4 : 2; }

void append(const DecodeProblem& p, const Rows& cache, const Rows& added, int64_t features) {
    const int64_t item = size_of(p.type);
    for (int64_t b = 0; b < p.batch; b++)
        for (int64_t head = 0; head < p.heads_kv; head++)
            for (int64_t i = 0; i < p.appended; i++) {
                const auto* from =
                    static_cast<const char*>(added.data) + (b * added.batch + head * added.head + i * added.row) * item;
                std::memcpy(slot(p, cache, b, head, p.lengths[b] + i, item), from, features * item);
            }
}

void* at(void* data, Type type, int64_t elements) { return static_cast<char*>(data) + elements * size_of(type); }

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

void attend(const DecodeProblem& p, const Rows& out, float* lse) {
    if (p.block_table || is_decode(p)) return decode(p, out, lse, nullptr);
    std::vector<float> lse_residual(p.heads * p.len_q);
    for (int64_t b = 0; b < p.batch; b++) {
        const Problem one = sequence(p, b);
        Rows one_out = out;
        one_out.data = at(one_out.data, p.type, b * one_out.batch);
        chosen_kernels().forward(one, {one_out, lse + b * p.heads * p.len_q, lse_residual.data()}, runtime());
    }
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
    auto* const lse_data = static_cast<float*>(lse.data_ptr());
    if (!key || !value) return attend(p, rows(out), lse_data);
    p.appended = key->size(2);
    append_and_attend(p, rows(*key), rows(*value), rows(out), lse_data);
}

Sizes sizes(const Tensor& x) { return {x.size(0), x.size(1), x.size(2), x.size(3)}; }

// Each slot at a place of its own.
bool is_written(const Tensor& x, Type type) {
    if (!is_read(x, type)) return false;
    for (int64_t dim = 0; dim < 4; dim++)
        if (x.size(dim) > 1 && x.stride(dim) == 0) return false;
    return true;
}

// The lengths, if there are so many and each leaves room for what is appended.
std::optional<std::vector<int64_t>> plain_lengths(const Tensor& x, int64_t batch, int64_t most) {
    using torch::headeronly::ScalarType;
    const bool is_narrow = x.scalar_type() == ScalarType::Int;
    if (x.dim() != 1 || x.size(0) != batch || !(is_narrow || x.scalar_type() == ScalarType::Long)) return std::nullopt;
    std::vector<int64_t> lengths(batch);
    for (int64_t b = 0; b < batch; b++) {
        const int64_t at = b * x.stride(0);
        lengths[b] = is_narrow ? static_cast<int32_t*>(x.data_ptr())[at] : static_cast<int64_t*>(x.data_ptr())[at];
        if (lengths[b] < 0 || lengths[b] > most) return std::nullopt;
    }
    return lengths;
}

bool are_blocks(const DecodeProblem& p, int64_t blocks) {
    for (int64_t b = 0; b < p.batch; b++)
        for (int64_t i = 0; i * p.page < p.lengths[b] + p.appended; i++) {
            const int32_t block = p.block_table[b * p.table_row + i * p.table_column];
            if (block < 0 || block >= blocks) return false;
        }
    return true;
}

// A step of decoding by the shortest way, as attention_plain.cpp does it for attention: nothing has been appended where
// it returns nothing.
std::optional<Tensor> plain(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_seqlens, MaybeTensor key,
                            MaybeTensor value, MaybeTensor block_table, std::optional<double> scale, bool is_causal) {
    if (!is_computed(query) || key.has_value() != value.has_value()) return std::nullopt;
    DecodeProblem p;
    p.type = type_of(query);
    for (const Tensor* x : {&query, key ? &*key : nullptr, value ? &*value : nullptr})
        if (x && !is_read(*x, p.type)) return std::nullopt;
    const auto [batch, heads, len_q, head_dim] = sizes(query);
    p.batch = batch, p.heads = heads, p.len_q = len_q, p.head_dim = head_dim, p.appended = key ? key->size(2) : 0;
    const auto lengths = use_cache(p, key_cache, value_cache, cache_seqlens, block_table);
    if (!lengths || (key && sizes(*key) != Sizes{batch, p.heads_kv, p.appended, head_dim})) return std::nullopt;
    if (value && sizes(*value) != Sizes{batch, p.heads_kv, p.appended, p.head_dim_v}) return std::nullopt;
    p.lengths = lengths->data();
    p.query = rows(query);
    p.scale = scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim)));
    p.window_left = -1, p.window_right = is_causal ? 0 : -1, p.softcap = 0.0;

    const Sizes shape = {batch, heads, len_q, p.head_dim_v};
    const Sizes strides = dense_strides(shape, {query.stride(0), query.stride(1), query.stride(2), 1});
    Tensor out = new_tensor(query, 4, shape.data(), strides.data());
    const std::unique_ptr<float[]> lse(new float[batch * heads * len_q]);
    if (key)
        append_and_attend(p, rows(*key), rows(*value), rows(out), lse.get());
    else
        attend(p, rows(out), lse.get());
    return out;
}

}  // namespace

bool is_read(const Tensor& x, Type type) {
    if (x.dim() != 4 || !is_computed(x) || type_of(x) != type || x.stride(3) != 1) return false;
    return x.numel() > 0;
}

std::optional<std::vector<int64_t>> use_cache(DecodeProblem& p, const Tensor& key_cache, const Tensor& value_cache,
                                              const Tensor& cache_seqlens, const MaybeTensor& block_table) {
    if (!is_written(key_cache, p.type) || !is_written(value_cache, p.type)) return std::nullopt;
    const auto [blocks, heads_kv, slots, head_dim] = sizes(key_cache);
    p.heads_kv = heads_kv, p.head_dim_v = value_cache.size(3);
    if (head_dim != p.head_dim || p.heads % heads_kv != 0) return std::nullopt;
    if (sizes(value_cache) != Sizes{blocks, heads_kv, slots, p.head_dim_v}) return std::nullopt;
    int64_t capacity = slots;
    if (block_table) {
        const Tensor& table = *block_table;
        if (table.scalar_type() != torch::headeronly::ScalarType::Int || table.dim() != 2 || table.size(0) != p.batch)
            return std::nullopt;
        p.block_table = static_cast<const int32_t*>(table.data_ptr());
        p.table_row = table.stride(0), p.table_column = table.stride(1), p.page = slots;
        capacity = slots * table.size(1);
    } else if (blocks != p.batch) {
        return std::nullopt;
    }
    auto lengths = plain_lengths(cache_seqlens, p.batch, capacity - p.appended);
    if (!lengths) return std::nullopt;
    p.lengths = lengths->data();
    if (p.block_table && !are_blocks(p, blocks)) return std::nullopt;
    p.key = rows(key_cache), p.value = rows(value_cache);
    return lengths;
}

void append_and_attend(const DecodeProblem& p, const Rows& key, const Rows& value, const Rows& out, float* lse) {
    append(p, p.key, key, p.head_dim);
    append(p, p.value, value, p.head_dim_v);
    attend(p, out, lse);
}

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
    m.def(
        "attention_decode_plain_cpu(Tensor query, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor cache_seqlens, "
        "Tensor? key, Tensor? value, Tensor? block_table, float? scale, bool is_causal) -> Tensor?");
}

STABLE_TORCH_LIBRARY_IMPL(fusedformer_native, CPU, m) {
    m.impl("attention_decode_cpu", TORCH_BOX(&fusedformer::attention_decode));
    m.impl("attention_decode_plain_cpu", TORCH_BOX(&fusedformer::plain));
}
