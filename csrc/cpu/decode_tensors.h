// A cache as torch's tensors, checked in a hurry: what does not fit here is another way's to name.
#pragma once

#include <vector>

#include "decode_problem.h"
#include "tensors.h"

namespace fusedformer {

// Whether it is (B, H, rows, columns), none of them 0, of this type, with unit stride in the columns.
bool is_read(const Tensor& x, Type type);

// The lengths, if the cache fits `p`, each leaves room for what is appended, and every block is there: then its keys,
// values and pages are those of `p`, whose `lengths` are to be set to these. `p` knows its type, batch, heads, head_dim
// and `appended`.
std::optional<std::vector<int64_t>> use_cache(DecodeProblem& p, const Tensor& key_cache, const Tensor& value_cache,
                                              const Tensor& cache_seqlens, const MaybeTensor& block_table);

// Keys and values (B, Hkv, appended, columns) are written behind the lengths, then attended to as well.
void append_and_attend(const DecodeProblem& p, const Rows& key, const Rows& value, const Rows& out, float* lse);

}  // namespace fusedformer
