// What happens to a tile of products Q Kᵀ before the softmax: scale, softcap, ALiBi, masks, exclusions.
#pragma once

#include "problem.h"
#include "simd/exponential.h"
#include "simd/philox.h"

namespace fusedformer::FF_LEVEL {

// The log-sum-exp is float32 for every type, and its error that of the weights.
template <class Scalar>
constexpr int EXP2_DEGREE = sizeof(Scalar) == 4 ? 6 : 5;

struct Range {
    int64_t begin, end;
    bool empty() const { return begin >= end; }
};

// The keys that the band (causality, window) lets some query of [first, last] see.
inline Range visible_keys(const Problem& p, int64_t first, int64_t last) {
    const int64_t begin = p.window_left < 0 ? 0 : first + p.position_offset - p.window_left;
    const int64_t end = p.window_right < 0 ? p.len_k : last + p.position_offset + p.window_right + 1;
    return {larger<int64_t>(begin, 0), smaller(end, p.len_k)};
}

// The queries that the band lets see some key of [first, last].
inline Range visible_queries(const Problem& p, int64_t first, int64_t last) {
    const int64_t begin = p.window_right < 0 ? 0 : first - p.position_offset - p.window_right;
    const int64_t end = p.window_left < 0 ? p.len_q : last - p.position_offset + p.window_left + 1;
    return {larger<int64_t>(begin, 0), smaller(end, p.len_q)};
}

// Mask entries j, j + 1, ... of a row as terms to add: 0 or -infinity for bool. Lanes from `count` on are 0.
template <class T>
FF_INLINE Floats strided_terms(const T* row, int64_t stride, int64_t j, int64_t count) {
    if (stride == 1) return load_some(row + j, count);
    Floats terms = {};
    for (int64_t lane = 0; lane < smaller<int64_t>(count, WIDTH); lane++)
        terms[lane] = load_one(row + (j + lane) * stride);
    return terms;
}

inline Floats mask_terms(Type type, const void* row, int64_t stride, int64_t j, int64_t count) {
    switch (type) {
        case Type::float32:
            return strided_terms(static_cast<const float*>(row), stride, j, count);
        case Type::float16:
            return strided_terms(static_cast<const Float16*>(row), stride, j, count);
        case Type::bfloat16:
            return strided_terms(static_cast<const BFloat16*>(row), stride, j, count);
        default:
            break;
    }
    Floats terms = {};
    for (int64_t lane = 0; lane < smaller<int64_t>(count, WIDTH); lane++) {
        const int64_t at = (j + lane) * stride;
        if (type == Type::boolean)
            terms[lane] = static_cast<const uint8_t*>(row)[at] ? 0.0f : -INFINITE;
        else
            terms[lane] = static_cast<float>(static_cast<const double*>(row)[at]);
    }
    return terms;
}

inline int64_t size_of(Type type) {
    switch (type) {
        case Type::boolean:
            return 1;
        case Type::float16:
        case Type::bfloat16:
            return 2;
        case Type::float64:
            return 8;
        default:
            return 4;
    }
}

inline const void* mask_row(const Mask& mask, int64_t b, int64_t h, int64_t i) {
    return static_cast<const char*>(mask.data) + (b * mask.batch + h * mask.head + i * mask.query) * size_of(mask.type);
}

inline float mask_term(const Mask& mask, int64_t b, int64_t h) {
    return mask_terms(mask.type, mask_row(mask, b, h, 0), 1, 0, 1)[0];
}

FF_INLINE Floats add_terms(Floats scores, Floats terms) {  // an excluded score is -infinity even where it overflowed
    return select(terms == -INFINITE, terms, scores + terms);
}

// One head's rules. Where scores need nothing but a positive scale they stay products, and the scale goes into the
// powers that make weights of them; references and log-sum-exps are in the same units as the scores.
struct ScoreRules {
    const Problem& p;
    int64_t b, h;

    static bool plain(const Problem& p) {
        auto additive = [](const Mask& mask) { return mask.type != Type::none && mask.type != Type::boolean; };
        return p.softcap == 0.0 && !p.alibi_slopes && p.scale > 1e-20 && !additive(p.attn_mask) &&
               !additive(p.key_mask);
    }

    // -infinity or the float to add for keys [first, first + count), -infinity from there to `room`; false if all are
    // excluded.
    bool key_bias(float* bias, int64_t first, int64_t count, int64_t room) const {
        const void* row = mask_row(p.key_mask, b, h, 0);
        bool any_key = false;
        for (int64_t j = 0; j < room; j += WIDTH) {
            const Floats inside = mask_terms(p.key_mask.type, row, p.key_mask.key, first + j, count - j);
            const Floats terms = select(lane_numbers() < static_cast<int32_t>(count - j), inside, broadcast(-INFINITE));
            any_key |= any(terms != -INFINITE);
            store(bias + j, terms);
        }
        return any_key;
    }

    // Whether a tile of products, its width rounded up, needs `apply` although the rules are plain.
    bool touches(int64_t i, int64_t m, int64_t j, int64_t n, const float* bias) const {
        if (bias || p.attn_mask.data) return true;
        const Range first = visible_keys(p, i, i), last = visible_keys(p, i + m - 1, i + m - 1);
        return j < last.begin || first.end < j + n;
    }

    // Products of queries [i, i + m) and keys [j, j + n) become scores in place; n is a multiple of WIDTH.
    template <bool PLAIN>
    void apply(float* scores, int64_t stride, int64_t i, int64_t m, int64_t j, int64_t n, const float* bias) const {
        const float scale = static_cast<float>(p.scale), cap = static_cast<float>(p.softcap);
        const float slope = p.alibi_slopes ? p.alibi_slopes[b * p.alibi_batch + h * p.alibi_head] : 0.0f;
        const Mask& mask = p.attn_mask;
        for (int64_t row = i; row < i + m; row++, scores += stride) {
            const Range seen = visible_keys(p, row, row);
            const int64_t begin = smaller(larger<int64_t>(seen.begin - j, 0), n),
                          end = larger<int64_t>(seen.end - j, begin);
            const void* terms = mask.data ? mask_row(mask, b, h, row) : nullptr;
            const float distance = static_cast<float>(j - row - p.position_offset);
            for (int64_t k = 0; k < n; k += WIDTH) {
                Floats x = load(scores + k);
                if constexpr (!PLAIN) {
                    x = x * scale;
                    if (cap > 0.0f) x = cap * tanh(x / cap);
                    if (slope != 0.0f) {
                        const Floats away =
                            __builtin_convertvector(lane_numbers(), Floats) + (distance + static_cast<float>(k));
                        x = x - slope * from_bits(bits_of(away) & INT32_MAX);
                    }
                }
                if (terms) x = add_terms(x, mask_terms(mask.type, terms, mask.key, j + k, p.len_k - j - k));
                if (bias) x = add_terms(x, load(bias + k));
                if (k < begin || k + WIDTH > end) {
                    const Ints lane = lane_numbers() + static_cast<int32_t>(k);
                    const Ints inside =
                        (lane >= static_cast<int32_t>(begin)) & (lane < static_cast<int32_t>(smaller(end, n)));
                    x = select(inside, x, broadcast(-INFINITE));
                }
                store(scores + k, x);
            }
        }
    }

    // 2 to the power that a difference of scores stands for.
    static Powers powers(const Problem& p) {
        return Powers(plain(p) ? p.scale * 1.4426950408889634 : 1.4426950408889634);
    }

    uint32_t matrix() const { return static_cast<uint32_t>(b * p.heads + h); }
};

}  // namespace fusedformer::FF_LEVEL
