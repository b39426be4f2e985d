// sum = residual + dropout(input); out = (sum - mean) * rstd * weight + bias, or without mean and bias; and backward.
// A task is a chunk of rows, of which each stays in cache from its first to its last use.
#pragma once

#include "arena.h"
#include "norm_problem.h"
#include "simd/philox.h"

namespace fusedformer::FF_LEVEL {

// A vector of a row: a whole one, or the row's end.
struct WholeVector {
    FF_INLINE static Floats keep(Floats x) { return x; }
    template <class T>
    FF_INLINE static Floats load(const T* p) {
        return FF_LEVEL::load(p);
    }
    template <class T>
    FF_INLINE static void store(T* p, Floats x) {
        FF_LEVEL::store(p, x);
    }
};

struct LastVector {
    int64_t count;

    FF_INLINE Floats keep(Floats x) const { return FF_LEVEL::keep(lane_numbers() < static_cast<int32_t>(count), x); }
    template <class T>
    FF_INLINE Floats load(const T* p) const {
        return load_some(p, count);
    }
    template <class T>
    FF_INLINE void store(T* p, Floats x) const {
        store_some(p, x, count);
    }
};

constexpr int SUMS = 4;  // side by side, so that no addition waits for the one before

// `body(i, vector, n)` for the elements from i on of a row; n says which of SUMS sums they join.
template <class Body>
FF_INLINE void each_vector(int64_t features, const Body& body) {
    int64_t i = 0;
    for (; i + SUMS * WIDTH <= features; i += SUMS * WIDTH)
#pragma GCC unroll 4
        for (int n = 0; n < SUMS; n++) body(i + n * WIDTH, WholeVector{}, n);
    for (; i + WIDTH <= features; i += WIDTH) body(i, WholeVector{}, 0);
    if (i < features) body(i, LastVector{features - i}, 0);
}

FF_INLINE float sum_of(const Floats (&sums)[SUMS]) { return sum((sums[0] + sums[1]) + (sums[2] + sums[3])); }

// What is stored as T.
template <class T>
FF_INLINE Floats rounded(Floats x) {
    return widen(T{}, narrow(T{}, x));
}
template <>
FF_INLINE Floats rounded<float>(Floats x) {
    return x;
}

template <class T>
FF_INLINE const T* row_of(const NormRowsAt& x, int64_t row) {
    return static_cast<const T*>(x.data) + row * x.stride;
}

// What forward and backward share. Input: of `input` and its gradient; Sum: of everything else that is as large.
template <class Input, class Sum>
class NormRows {
  protected:
    const NormProblem& p_;
    const int64_t chunk_ = norm_chunk_rows(p_.rows);

    explicit NormRows(const NormProblem& p) : p_(p) {}

    // Weight or bias in float32, converted where they are not.
    const float* parameter(const NormVector& x, float* copy) const {
        switch (x.type) {
            case Type::none:
                return nullptr;
            case Type::float32:
                return static_cast<const float*>(x.data);
            default:
                each_vector(p_.features, [&](int64_t i, auto vector, int) {
                    vector.store(copy + i, vector.load(static_cast<const Sum*>(x.data) + i));
                });
                return copy;
        }
    }

    void draw(uint16_t* lanes, int64_t row) const {
        philox_lanes(lanes, p_.seed, 0, p_.features, static_cast<uint32_t>(row), 0, 2);
    }

    // 0 where the element is dropped, whatever it was.
    FF_INLINE Floats dropped(Floats x, const uint16_t* lanes) const {
        return keep(kept(lanes, p_.dropout_threshold), x * p_.keep_scale);
    }
};

template <class Input, class Sum>
class NormForward : NormRows<Input, Sum> {
    using Rows = NormRows<Input, Sum>;
    using Rows::p_, Rows::chunk_;

  public:
    static void run(const NormProblem& p, const NormResults& results, const Runtime& runtime) {
        const NormForward forward(p, results, runtime);
        auto body = [](int64_t task, void* self) { static_cast<const NormForward*>(self)->chunk(task); };
        runtime.parallel((p.rows + forward.chunk_ - 1) / forward.chunk_, body, const_cast<NormForward*>(&forward));
    }

  private:
    const NormResults& results_;
    const Runtime& runtime_;

    NormForward(const NormProblem& p, const NormResults& results, const Runtime& runtime)
        : Rows(p), results_(results), runtime_(runtime) {}

    struct Scratch {
        float *sum, *weight, *bias;
        uint16_t* lanes;
    };

    Scratch lay_out(Arena& arena) const {
        const int64_t features = round_up(p_.features, WIDTH);
        Scratch s;
        s.sum = arena.take<float>(features);
        s.weight = arena.take<float>(features), s.bias = arena.take<float>(features);
        s.lanes = arena.take<uint16_t>(round_up(p_.features, 64));
        return s;
    }

    void chunk(int64_t task) const {
        Arena measure;
        lay_out(measure);
        Arena arena(runtime_.scratch(measure.used()));
        const Scratch s = lay_out(arena);
        const float *weight = Rows::parameter(p_.weight, s.weight), *bias = Rows::parameter(p_.bias, s.bias);
        const int64_t end = smaller((task + 1) * chunk_, p_.rows);
        for (int64_t row = task * chunk_; row < end; row++) {
            if (p_.subtract_mean)
                layer_norm(row, s, weight, bias);
            else
                rms_norm(row, s, weight);
        }
    }

    // The row's sum, as it is rounded: backward has no other. `use(x, n)` is told each vector.
    template <class Use>
    FF_INLINE void add(int64_t row, const Scratch& s, const Use& use) const {
        if (p_.has_dropout()) {
            Rows::draw(s.lanes, row);
            p_.residual.data ? add_as<true, true>(row, s, use) : add_as<true, false>(row, s, use);
        } else {
            p_.residual.data ? add_as<false, true>(row, s, use) : add_as<false, false>(row, s, use);
        }
    }

    template <bool DROPOUT, bool RESIDUAL, class Use>
    FF_INLINE void add_as(int64_t row, const Scratch& s, const Use& use) const {
        const Input* input = row_of<Input>(p_.input, row);
        const Sum* residual = row_of<Sum>(p_.residual, row);
        Sum* kept = results_.sum ? static_cast<Sum*>(results_.sum) + row * p_.features : nullptr;
        each_vector(p_.features, [&](int64_t i, auto vector, int n) {
            Floats x = vector.load(input + i);
            if constexpr (DROPOUT) x = Rows::dropped(x, s.lanes + i);
            if constexpr (RESIDUAL) x += vector.load(residual + i);
            if (kept) vector.store(kept + i, x);
            x = vector.keep(rounded<Sum>(x));
            store(s.sum + i, x);
            use(x, n);
        });
    }

    void layer_norm(int64_t row, const Scratch& s, const float* weight, const float* bias) const {
        const float share = 1.0f / static_cast<float>(p_.features);
        Floats sums[SUMS] = {};
        add(row, s, [&](Floats x, int n) { sums[n] += x; });
        const float guess = sum_of(sums) * share;
        // The mean of what remains is the rounding of the first one: large means cancel twice.
        Floats rest[SUMS] = {}, squares[SUMS] = {};
        each_vector(p_.features, [&](int64_t i, auto vector, int n) {
            const Floats x = vector.keep(load(s.sum + i) - guess);
            rest[n] += x, squares[n] += x * x;
        });
        const float correction = sum_of(rest) * share;
        const float variance = larger(sum_of(squares) * share - correction * correction, 0.0f);
        const float rstd = 1.0f / __builtin_sqrtf(variance + p_.eps);
        if (results_.rstd) results_.mean[row] = guess + correction, results_.rstd[row] = rstd;
        Sum* out = static_cast<Sum*>(results_.out) + row * p_.features;
        each_vector(p_.features, [&](int64_t i, auto vector, int) {
            Floats x = (load(s.sum + i) - guess - correction) * rstd;
            if (weight) x *= vector.load(weight + i);
            if (bias) x += vector.load(bias + i);
            vector.store(out + i, x);
        });
    }

    void rms_norm(int64_t row, const Scratch& s, const float* weight) const {
        Floats squares[SUMS] = {};
        add(row, s, [&](Floats x, int n) { squares[n] += x * x; });
        const float rstd = 1.0f / __builtin_sqrtf(sum_of(squares) / static_cast<float>(p_.features) + p_.eps);
        if (results_.rstd) results_.rstd[row] = rstd;
        Sum* out = static_cast<Sum*>(results_.out) + row * p_.features;
        each_vector(p_.features, [&](int64_t i, auto vector, int) {
            Floats x = load(s.sum + i) * rstd;
            if (weight) x *= vector.load(weight + i);
            vector.store(out + i, x);
        });
    }
};

// With x̂ = (sum - mean) * rstd and g = grad_out * weight:
//     dsum = (g - mean(g) - x̂ * mean(g x̂)) * rstd + grad_sum, dweight = Σ grad_out x̂, dbias = Σ grad_out over rows.
template <class Input, class Sum>
class NormBackward : NormRows<Input, Sum> {
    using Rows = NormRows<Input, Sum>;
    using Rows::p_, Rows::chunk_;

  public:
    static void run(const NormProblem& p, const NormGradients& grads, const Runtime& runtime) {
        const NormBackward backward(p, grads, runtime);
        auto chunk = [](int64_t task, void* self) { static_cast<const NormBackward*>(self)->chunk(task); };
        runtime.parallel(backward.chunks_, chunk, const_cast<NormBackward*>(&backward));
        if (!grads.weight.data && !grads.bias.data) return;
        auto columns = [](int64_t task, void* self) { static_cast<const NormBackward*>(self)->columns(task); };
        runtime.parallel((p.features + COLUMNS - 1) / COLUMNS, columns, const_cast<NormBackward*>(&backward));
    }

  private:
    static constexpr int64_t COLUMNS = 1024;  // of the second stage of the sums, a task

    const NormGradients& grads_;
    const Runtime& runtime_;
    const int64_t chunks_ = (p_.rows + chunk_ - 1) / chunk_;

    NormBackward(const NormProblem& p, const NormGradients& grads, const Runtime& runtime)
        : Rows(p), grads_(grads), runtime_(runtime) {}

    struct Scratch {
        float *g, *weight;
        uint16_t* lanes;
    };

    Scratch lay_out(Arena& arena) const {
        Scratch s;
        s.g = arena.take<float>(round_up(p_.features, WIDTH));
        s.weight = arena.take<float>(round_up(p_.features, WIDTH));
        s.lanes = arena.take<uint16_t>(round_up(p_.features, 64));
        return s;
    }

    // The chunk's part of the sums over rows; null where that gradient is not wanted.
    float* partial_weight(int64_t task) const {
        return grads_.weight.data ? grads_.partial + task * p_.features : nullptr;
    }
    float* partial_bias(int64_t task) const {
        const int64_t before = grads_.weight.data ? chunks_ : 0;
        return grads_.bias.data ? grads_.partial + (before + task) * p_.features : nullptr;
    }

    void chunk(int64_t task) const {
        Arena measure;
        lay_out(measure);
        Arena arena(runtime_.scratch(measure.used()));
        const Scratch s = lay_out(arena);
        const float* weight = Rows::parameter(p_.weight, s.weight);
        float *of_weight = partial_weight(task), *of_bias = partial_bias(task);
        if (of_weight) __builtin_memset(of_weight, 0, p_.features * sizeof(float));
        if (of_bias) __builtin_memset(of_bias, 0, p_.features * sizeof(float));
        const int64_t end = smaller((task + 1) * chunk_, p_.rows);
        for (int64_t row = task * chunk_; row < end; row++) one_row(row, s, weight, of_weight, of_bias);
    }

    void one_row(int64_t row, const Scratch& s, const float* weight, float* of_weight, float* of_bias) const {
        const Sum *total = row_of<Sum>(grads_.sum, row), *sent = row_of<Sum>(grads_.grad_out, row);
        const float mean = grads_.mean ? grads_.mean[row] : 0.0f, rstd = grads_.rstd[row];
        Floats gs[SUMS] = {}, products[SUMS] = {};
        each_vector(p_.features, [&](int64_t i, auto vector, int n) {
            const Floats x = vector.keep((vector.load(total + i) - mean) * rstd);
            Floats g = vector.load(sent + i);
            if (of_weight) vector.store(of_weight + i, vector.load(of_weight + i) + g * x);
            if (of_bias) vector.store(of_bias + i, vector.load(of_bias + i) + g);
            if (weight) g *= vector.load(weight + i);
            store(s.g + i, g);  // rounded, as its mean is: what cancels leaves no remainder
            gs[n] += g, products[n] += g * x;
        });
        if (!grads_.input && !grads_.residual) return;
        const float share = 1.0f / static_cast<float>(p_.features);
        const float of_mean = grads_.mean ? sum_of(gs) * share : 0.0f, of_rstd = sum_of(products) * share;
        const Sum* beside = grads_.grad_sum.data ? row_of<Sum>(grads_.grad_sum, row) : nullptr;
        Input* input = grads_.input ? static_cast<Input*>(grads_.input) + row * p_.features : nullptr;
        Sum* residual = grads_.residual ? static_cast<Sum*>(grads_.residual) + row * p_.features : nullptr;
        const bool dropout = input && p_.has_dropout();
        if (dropout) Rows::draw(s.lanes, row);
        each_vector(p_.features, [&](int64_t i, auto vector, int) {
            const Floats x = (vector.load(total + i) - mean) * rstd;
            Floats g = (load(s.g + i) - of_mean - x * of_rstd) * rstd;
            if (beside) g += vector.load(beside + i);
            if (residual) vector.store(residual + i, g);
            if (dropout) g = Rows::dropped(g, s.lanes + i);
            if (input) vector.store(input + i, g);
        });
    }

    void columns(int64_t task) const {
        const int64_t begin = task * COLUMNS, end = smaller(begin + COLUMNS, p_.features);
        if (grads_.weight.data) add_chunks(grads_.weight, partial_weight(0), begin, end);
        if (grads_.bias.data) add_chunks(grads_.bias, partial_bias(0), begin, end);
    }

    void add_chunks(const NormVector& to, float* partial, int64_t begin, int64_t end) const {
        for (int64_t chunk = 1; chunk < chunks_; chunk++) {
            const float* next = partial + chunk * p_.features;
            each_vector(end - begin, [&](int64_t i, auto vector, int) {
                const int64_t at = begin + i;
                vector.store(partial + at, vector.load(partial + at) + vector.load(next + at));
            });
        }
        each_vector(end - begin, [&](int64_t i, auto vector, int) {
            const Floats x = vector.load(partial + begin + i);
            if (to.type == Type::float32)
                vector.store(static_cast<float*>(to.data) + begin + i, x);
            else
                vector.store(static_cast<Sum*>(to.data) + begin + i, x);
        });
    }
};

template <template <class, class> class Kernel, class... Arguments>
void run_norm(const NormProblem& p, const Arguments&... arguments) {
    if (p.type == Type::float16) return Kernel<Float16, Float16>::run(p, arguments...);
    if (p.type == Type::bfloat16) return Kernel<BFloat16, BFloat16>::run(p, arguments...);
    if (p.input_type == Type::float16) return Kernel<Float16, float>::run(p, arguments...);
    if (p.input_type == Type::bfloat16) return Kernel<BFloat16, float>::run(p, arguments...);
    return Kernel<float, float>::run(p, arguments...);
}

inline void norm_forward(const NormProblem& p, const NormResults& results, const Runtime& runtime) {
    run_norm<NormForward>(p, results, runtime);
}

inline void norm_backward(const NormProblem& p, const NormGradients& grads, const Runtime& runtime) {
    run_norm<NormBackward>(p, grads, runtime);
}

}  // namespace fusedformer::FF_LEVEL
