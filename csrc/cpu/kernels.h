// The kernels of one level, from the templates: included once by each file of levels/, which names the level.
#pragma once

#include "attention_backward.h"
#include "attention_forward.h"
#include "attention_weights.h"
#include "ceilings.h"
#include "fma_engine.h"
#include "problem.h"

namespace fusedformer::FF_LEVEL {

template <class S>
using Engine = FmaEngine<S>;

template <template <class> class Kernel, class... Arguments>
void by_type(const Problem& p, const Arguments&... arguments) {
    switch (p.type) {
        case Type::float16: return Kernel<Engine<Float16>>::run(p, arguments...);
        case Type::bfloat16: return Kernel<Engine<BFloat16>>::run(p, arguments...);
        default: return Kernel<Engine<float>>::run(p, arguments...);
    }
}

#define FF_STRING(name) #name
#define FF_NAME(level) FF_STRING(level)

extern const Kernels kernels;
const Kernels kernels = {
    FF_NAME(FF_LEVEL),
    by_type<AttentionForward, ForwardResults, Runtime>,
    by_type<AttentionBackward, BackwardInputs, BackwardResults, Runtime>,
    by_type<AttentionWeights, WeightsResults, Runtime>,
    measure_ceiling,
};

}  // namespace fusedformer::FF_LEVEL
