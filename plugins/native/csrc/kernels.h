// The kernels that this binary holds.
#pragma once

#include "cpu.h"
#include "gemm.h"

namespace qhub {

#define KERNEL(variable) extern const Kernel variable;
#include "kernels.def"
#undef KERNEL

// All kernels, best first; null ends the list.
extern const Kernel* const kKernels[];

}  // namespace qhub
