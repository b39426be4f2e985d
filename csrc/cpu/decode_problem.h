// A few queries over many keys: an attention problem whose keys and values may be a cache, with a length for each
// sequence, in one piece or in pages.
#pragma once

#include "problem.h"

namespace fusedformer {

constexpr int64_t MOST_PIECES = 64;  // bounds the memory of the pieces' results

struct DecodeProblem : Problem {
    const int64_t* lengths = nullptr;  // (B,), the keys in use; the queries stand at their end. Null: len_k of Problem
    int64_t appended = 0;              // to be added to each length

    // Where given, slot j of sequence b is slot j % page of block block_table[b * table_row + j / page * table_column];
    // the batch strides of key and value are then those of a block.
    const int32_t* block_table = nullptr;
    int64_t table_row = 0, table_column = 0, page = 0;

    // The keys are split into as many pieces, each of piece_keys, so that all threads work on one sequence. A function
    // of the number of keys alone: neither the threads nor the batch change a result's bits.
    int64_t pieces = 1, piece_keys = 0;  // at most MOST_PIECES
};

struct DecodeResults {
    Rows out;
    float *lse, *lse_residual;  // (B, H, L), contiguous; may be null
    float* partial;             // (B, H, pieces, L) rows of partial_width floats
    int64_t partial_width;
    int32_t* finished;  // (B * H * L), zeros: for rows that are computed together, how many pieces are there
};

// Whether reading keys and values bounds the problem, which the decode kernel does as they lie. Measured on AVX2: it is
// ahead up to 16 rows that share keys, less where these are few.
inline bool is_decode(const Problem& p) {
    return p.len_q <= 8 && p.heads_kv > 0 && p.len_q * p.group() <= 16 && !p.has_dropout();
}

// Runs the chosen level's kernel: plans the pieces and keeps their memory. Every rule of Problem holds but dropout.
void decode(DecodeProblem problem, Rows out, float* lse, float* lse_residual);

// Attention forward by the kernel that suits the number of queries: the level's `forward`, or `decode`. Not the latter
// where the log-sum-exp will be used: backward and `attention_weights` compute the scores again, and those of the
// decode kernel round otherwise.
void attend(const Problem& problem, const ForwardResults& results, bool return_lse);

}  // namespace fusedformer
