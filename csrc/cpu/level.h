// Which instruction set the kernels use: the best that this processor and operating system allow, or one asked for.
#pragma once

#include <string>
#include <vector>

#include "problem.h"

namespace fusedformer {

struct Level {
    const Kernels* kernels;
    std::string refusal;  // why this machine cannot run it; empty where it can
};

const std::vector<Level>& levels();          // best first; "portable", the last, always runs
const Kernels& chosen_kernels();             // the level asked for, or the first without a refusal
void choose_level(const std::string& name);  // "" chooses the best again; throws where refused or unknown

}  // namespace fusedformer
