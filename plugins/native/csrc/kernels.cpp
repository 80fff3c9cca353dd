#include "kernels.h"

namespace qhub {

const Kernel* const kKernels[] = {
#define KERNEL(variable) &variable,
#include "kernels.def"
#undef KERNEL
    nullptr,
};

}  // namespace qhub
