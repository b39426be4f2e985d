// The kernels of one level, from the templates: included once by each file of levels/, which names the level.
#pragma once

#include "attention_backward.h"
#include "attention_decode.h"
#include "attention_forward.h"
#include "attention_weights.h"
#include "ceilings.h"
#include "fma_engine.h"
#include "gemm_kernels.h"
#include "norm.h"
#include "problem.h"
#include "rotary.h"
#if defined(FF_AMX)
#include "amx_engine.h"
#include "range.h"
#elif defined(FF_AVX512_BF16)
#include "dot_engine.h"
#endif

namespace fusedformer::FF_LEVEL {

#ifdef FF_AMX

template <class S>
using Engine = AmxEngine<S>;

// Whether the engine computes what is in these tensors; else float32 is multiplied as such.
inline bool takes(const Problem& p, const Rows* grad_out, const Runtime& runtime) {
    if (p.type != Type::float32) return true;
    auto exact = [&](const Rows& x, int64_t heads, int64_t rows, int64_t columns, bool masked) {
        return PartsAreExact::of(p, x, heads, rows, columns, masked, runtime);
    };
    return exact(p.query, p.heads, p.len_q, p.head_dim, false) && exact(p.key, p.heads_kv, p.len_k, p.head_dim, true) &&
           exact(p.value, p.heads_kv, p.len_k, p.head_dim_v, true) &&
           (!grad_out || exact(*grad_out, p.heads, p.len_q, p.head_dim_v, false));
}

#else

template <class S>
struct EngineFor {
    using Type = FmaEngine<S>;
};
#ifdef FF_AVX512_BF16
template <>
struct EngineFor<BFloat16> {
    using Type = DotEngine;
};
#endif
template <class S>
using Engine = typename EngineFor<S>::Type;

inline bool takes(const Problem&, const Rows*, const Runtime&) { return true; }

#endif

template <template <class> class Kernel, class... Arguments>
void run(const Problem& p, bool taken, const Arguments&... arguments) {
    switch (p.type) {
        case Type::float16:
            return Kernel<Engine<Float16>>::run(p, arguments...);
        case Type::bfloat16:
            return Kernel<Engine<BFloat16>>::run(p, arguments...);
        default:
            return taken ? Kernel<Engine<float>>::run(p, arguments...) : Kernel<FmaEngine<float>>::run(p, arguments...);
    }
}

inline void forward(const Problem& p, const ForwardResults& results, const Runtime& runtime) {
    run<AttentionForward>(p, takes(p, nullptr, runtime), results, runtime);
}

inline void backward(const Problem& p, const BackwardInputs& inputs, const BackwardResults& results,
                     const Runtime& runtime) {
    run<AttentionBackward>(p, takes(p, &inputs.grad_out, runtime), inputs, results, runtime);
}

inline void weights(const Problem& p, const WeightsResults& results, const Runtime& runtime) {
    run<AttentionWeights>(p, takes(p, nullptr, runtime), results, runtime);
}

inline int64_t memory(const Problem& p, int64_t backward_groups, const Runtime& runtime) {
    auto of = [&]<class E>(E) {
        const int64_t forward = AttentionForward<E>::memory(p, runtime);
        return backward_groups == 0 ? forward
                                    : larger(forward, AttentionBackward<E>::memory(p, backward_groups, runtime));
    };
    switch (p.type) {
        case Type::float16:
            return of(Engine<Float16>{});
        case Type::bfloat16:
            return of(Engine<BFloat16>{});
        default:
            return larger(of(Engine<float>{}), of(FmaEngine<float>{}));  // which of them depends on the numbers
    }
}

#define FF_STRING(name) #name
#define FF_NAME(level) FF_STRING(level)

extern const Kernels kernels;
const Kernels kernels = {
    .level = FF_NAME(FF_LEVEL),
    .forward = forward,
    .backward = backward,
    .memory = memory,
    .weights = weights,
    .ceiling = measure_ceiling,
    .decode = decode_attention,
    .linear_forward = linear_forward,
    .linear_backward = linear_backward,
    .linear_memory = linear_memory,
    .packed_bytes = packed_bytes,
    .pack_weight = pack_weight,
    .feed_forward_forward = feed_forward_forward,
    .feed_forward_backward = feed_forward_backward,
    .feed_forward_memory = feed_forward_memory,
    .norm_forward = norm_forward,
    .norm_backward = norm_backward,
    .rotate = rotate,
};

}  // namespace fusedformer::FF_LEVEL
