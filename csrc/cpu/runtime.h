#pragma once

#include "problem.h"

namespace fusedformer {

Runtime runtime();  // torch's threads, as many as torch.get_num_threads() says now

}  // namespace fusedformer
