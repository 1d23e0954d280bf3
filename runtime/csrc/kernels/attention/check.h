// What a call must satisfy before anything is read or written through its pointers.
#pragma once

#include "problem.h"

namespace bdq::attention {

// Throws std::invalid_argument, in one line.
void check_arguments(const Problem& problem);

}  // namespace bdq::attention
