// The CUDA kernels as torch sees them. Their only callers, kernels/attention/native_cuda.py, check the arguments.
//
// Compiled twice: for the GPU, and with FUSEDFORMER_EMULATED over the emulator, where tensors are on the CPU. On
// torch's stable ABI, which a torch without CUDA implements too: what only a torch with CUDA has is a weak symbol.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "problem.h"

#ifdef FUSEDFORMER_EMULATED
#define NAMESPACE fusedformer_emulated
#define DEVICE CPU
#else
#include <cuda_runtime_api.h>
#define NAMESPACE fusedformer_cuda
#define DEVICE CUDA
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace fusedformer::cuda {
namespace {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t ALIGNMENT = 16;

// The device of a tensor made current, and torch's stream there.
class Stream {
  public:
#ifdef FUSEDFORMER_EMULATED
    explicit Stream(const Tensor&) {}
#else
    explicit Stream(const Tensor& x) {
        const int device = x.get_device_index();
        check(cudaGetDevice(&before_));
        check(cudaSetDevice(device));
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream_));
    }
    ~Stream() { cudaSetDevice(before_); }
    Stream(const Stream&) = delete;
#endif
    operator void*() const { return stream_; }

  private:
#ifndef FUSEDFORMER_EMULATED
    static void check(cudaError_t error) {
        if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
    }
    int before_ = 0;
#endif
    void* stream_ = nullptr;
};

void check(const char* error) {
    if (error) throw std::runtime_error(error);
}

bool is_bf16(const Tensor& x) { return x.scalar_type() == torch::headeronly::ScalarType::BFloat16; }

// The stride of a dimension of size 1 may be any number; the hardware wants whole copies of it too.
Tensor4 rows(const Tensor& x) {
    if (reinterpret_cast<uintptr_t>(x.data_ptr()) % ALIGNMENT != 0)
        throw std::invalid_argument("a tensor's memory does not start at a multiple of 16 bytes");
    const auto stride = [&](int dim) { return x.size(dim) == 1 ? x.size(3) : x.stride(dim); };
    return {x.data_ptr(), stride(0), stride(1), stride(2)};
}

Tensor4 rows(const MaybeTensor& x) { return x ? rows(*x) : Tensor4{}; }

template <class Number>
Number* numbers(const Tensor& x) {
    return static_cast<Number*>(x.data_ptr());
}

AttentionProblem problem(const Tensor& query, const Tensor& key, const Tensor& value, double scale,
                         int64_t position_offset, int64_t window_left, int64_t window_right, const Tensor& out,
                         const Tensor& lse, const Tensor& lse_residual) {
    AttentionProblem p = {};
    p.q = rows(query), p.k = rows(key), p.v = rows(value), p.out = rows(out);
    p.lse = numbers<float>(lse), p.lse_residual = numbers<float>(lse_residual);
    p.batch = query.size(0), p.heads = query.size(1), p.len_q = query.size(2), p.head_dim = query.size(3);
    p.heads_kv = value.size(1), p.len_k = value.size(2), p.value_dim = value.size(3);
    p.bf16 = is_bf16(query);
    p.scale = scale, p.position_offset = position_offset;
    p.window_left = window_left, p.window_right = window_right;
    return p;
}

void forward(Tensor query, Tensor key, Tensor value, double scale, int64_t position_offset, int64_t window_left,
             int64_t window_right, Tensor out, Tensor lse, Tensor lse_residual) {
    check(attention_forward(
        problem(query, key, value, scale, position_offset, window_left, window_right, out, lse, lse_residual),
        Stream(query)));
}

void backward(Tensor grad_out, MaybeTensor grad_lse, Tensor out, Tensor query, Tensor key, Tensor value, Tensor lse,
              Tensor lse_residual, double scale, int64_t position_offset, int64_t window_left, int64_t window_right,
              Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor workspace) {
    AttentionGradients gradients = {};
    gradients.grad_out = rows(grad_out);
    gradients.grad_q = rows(grad_query), gradients.grad_k = rows(grad_key), gradients.grad_v = rows(grad_value);
    gradients.grad_lse = grad_lse ? numbers<float>(*grad_lse) : nullptr;
    gradients.workspace = workspace.data_ptr();
    check(attention_backward(
        problem(query, key, value, scale, position_offset, window_left, window_right, out, lse, lse_residual),
        gradients, Stream(query)));
}

int64_t backward_workspace(int64_t batch, int64_t heads, int64_t len_q, int64_t heads_kv, int64_t len_k,
                           int64_t head_dim, int64_t value_dim) {
    AttentionProblem p = {};
    p.batch = batch, p.heads = heads, p.len_q = len_q, p.heads_kv = heads_kv, p.len_k = len_k;
    p.head_dim = head_dim, p.value_dim = value_dim;
    return attention_backward_workspace(p);
}

void decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_seqlens, MaybeTensor key,
            MaybeTensor value, MaybeTensor block_table, MaybeTensor alibi_slopes, MaybeTensor sinks, double scale,
            int64_t window_left, int64_t window_right, double softcap, int64_t processors, Tensor out, Tensor lse,
            Tensor workspace) {
    DecodeProblem p = {};
    p.q = rows(query), p.key_cache = rows(key_cache), p.value_cache = rows(value_cache), p.out = rows(out);
    p.new_key = rows(key), p.new_value = rows(value);
    p.lse = numbers<float>(lse), p.cache_seqlens = numbers<int64_t>(cache_seqlens);
    p.pages = 1, p.page = key_cache.size(2);
    if (block_table) {
        p.block_table = numbers<int32_t>(*block_table);
        p.pages = block_table->size(1), p.table_stride = block_table->stride(0);
    }
    if (alibi_slopes) {
        p.alibi_slopes = numbers<float>(*alibi_slopes);
        p.slopes_batch_stride = alibi_slopes->stride(0), p.slopes_head_stride = alibi_slopes->stride(1);
    }
    if (sinks) p.sinks = numbers<float>(*sinks), p.sinks_head_stride = sinks->stride(1);
    p.batch = query.size(0), p.heads = query.size(1), p.len_q = query.size(2), p.head_dim = query.size(3);
    p.heads_kv = value_cache.size(1), p.value_dim = value_cache.size(3);
    p.appended = key ? key->size(2) : 0;
    p.bf16 = is_bf16(query);
    p.scale = scale, p.softcap = softcap, p.window_left = window_left, p.window_right = window_right;
    p.workspace = workspace.data_ptr();
    check(attention_decode(p, processors, Stream(query)));
}

int64_t decode_workspace(int64_t batch, int64_t heads, int64_t len_q, int64_t head_dim, int64_t heads_kv,
                         int64_t value_dim, int64_t capacity, int64_t processors) {
    DecodeProblem p = {};
    p.batch = batch, p.heads = heads, p.len_q = len_q, p.head_dim = head_dim;
    p.heads_kv = heads_kv, p.value_dim = value_dim, p.pages = 1, p.page = capacity;
    return attention_decode_workspace(p, processors);
}

}  // namespace
}  // namespace fusedformer::cuda

#define SETTINGS "float scale, int position_offset, int window_left, int window_right"

STABLE_TORCH_LIBRARY(NAMESPACE, m) {
    m.def("attention_forward(Tensor query, Tensor key, Tensor value, " SETTINGS
          ", Tensor(a!) out, Tensor(b!) lse, Tensor(c!) lse_residual) -> ()");
    m.def(
        "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor query, Tensor key, Tensor value, "
        "Tensor lse, Tensor lse_residual, " SETTINGS
        ", Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value, Tensor(d!) workspace) -> ()");
    m.def(
        "attention_backward_workspace(int batch, int heads, int len_q, int heads_kv, int len_k, int head_dim, int "
        "value_dim) -> int");
    m.def(
        "attention_decode(Tensor query, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor cache_seqlens, Tensor? "
        "key, Tensor? value, Tensor? block_table, Tensor? alibi_slopes, Tensor? sinks, float scale, int window_left, "
        "int window_right, float softcap, int processors, Tensor(c!) out, Tensor(d!) lse, Tensor(e!) workspace) -> ()");
    m.def(
        "attention_decode_workspace(int batch, int heads, int len_q, int head_dim, int heads_kv, int value_dim, int "
        "capacity, int processors) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(NAMESPACE, DEVICE, m) {
    using namespace fusedformer::cuda;
    m.impl("attention_forward", TORCH_BOX(&forward));
    m.impl("attention_backward", TORCH_BOX(&backward));
    m.impl("attention_decode", TORCH_BOX(&decode));
}

STABLE_TORCH_LIBRARY_IMPL(NAMESPACE, CompositeExplicitAutograd, m) {
    using namespace fusedformer::cuda;
    m.impl("attention_backward_workspace", TORCH_BOX(&backward_workspace));
    m.impl("attention_decode_workspace", TORCH_BOX(&decode_workspace));
}
