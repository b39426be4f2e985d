// The linear and feed-forward kernels of one level: which of its engines multiplies a problem.
#pragma once

#include "feed_forward.h"
#include "gemm_fma.h"
#include "linear.h"
#if defined(FF_AMX)
#include "gemm_amx.h"
#elif defined(FF_AVX512_BF16)
#include "gemm_dot.h"
#endif

namespace fusedformer::FF_LEVEL {

#ifdef FF_AMX
template <class S>
using GemmEngine = GemmAmx<S>;
#else
template <class S>
struct GemmEngineFor {
    using Type = GemmFma<S>;
};
#ifdef FF_AVX512_BF16
template <>
struct GemmEngineFor<BFloat16> {
    using Type = GemmDot;
};
#endif
template <class S>
using GemmEngine = typename GemmEngineFor<S>::Type;
#endif

template <class Body>
auto with_first_engine(Type type, const Body& body) {
    switch (type) {
        case Type::float16:
            return body(GemmEngine<Float16>{});
        case Type::bfloat16:
            return body(GemmEngine<BFloat16>{});
        default:
            return body(GemmEngine<float>{});
    }
}

// `body` with the engine for numbers of this type; again with another where it finds that the first does not compute
// what is in the tensors.
template <class Body>
void with_engine(Type type, const Body& body) {
    if (!with_first_engine(type, body) && type == Type::float32) body(GemmFma<float>{});
}

inline void linear_forward(const LinearProblem& p, const Matrix& out, const Runtime& runtime) {
    with_engine(p.type, [&]<class E>(E) { return Linear<E>::forward(p, out, runtime); });
}

inline void linear_backward(const LinearProblem& p, const LinearGradients& g, const Runtime& runtime) {
    with_engine(p.type, [&]<class E>(E) { return Linear<E>::backward(p, g, runtime); });
}

inline int64_t packed_bytes(Type type, int64_t rows, int64_t columns) {
    return with_first_engine(
        type, [&]<class E>(E) -> int64_t { return E::KEEPS_WEIGHTS ? Gemm<E>::packed_bytes(rows, columns) : 0; });
}

inline bool pack_weight(Type type, const Matrix& weight, int64_t rows, int64_t columns, void* to,
                        const Runtime& runtime) {
    return with_first_engine(type, [&]<class E>(E) { return Gemm<E>::pack(to, weight, rows, columns, runtime); });
}

inline void feed_forward_forward(const FeedForwardProblem& p, const FeedForwardResults& results,
                                 const Runtime& runtime) {
    with_engine(p.type, [&]<class E>(E) { return FeedForward<E>::forward(p, results, runtime); });
}

inline void feed_forward_backward(const FeedForwardProblem& p, const FeedForwardGradients& g, const Runtime& runtime) {
    with_engine(p.type, [&]<class E>(E) { return FeedForward<E>::backward(p, g, runtime); });
}

inline int64_t linear_memory(const LinearProblem& p, bool backward, const Runtime& runtime) {
    int64_t most = 0;
    with_engine(p.type, [&]<class E>(E) {
        most = larger(most, Linear<E>::memory(p, backward, runtime));
        return false;
    });
    return most;
}

inline int64_t feed_forward_memory(const FeedForwardProblem& p, bool backward, bool recompute, const Runtime& runtime) {
    int64_t most = 0;
    with_engine(p.type, [&]<class E>(E) {
        most = larger(most, FeedForward<E>::memory(p, backward, recompute, runtime));
        return false;
    });
    return most;
}

}  // namespace fusedformer::FF_LEVEL
