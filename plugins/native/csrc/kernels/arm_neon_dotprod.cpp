// NEON with `sdot` (Raspberry Pi 5, Jetson Orin, Apple M1): 16 products per instruction, straight into int32.
#if defined(__aarch64__)

#include <arm_neon.h>

#include "../half.h"
#include "../isa.h"
#include "../kernels.h"

QHUB_ISA_BEGIN("arch=armv8.2-a+dotprod")

namespace qhub {
namespace {

constexpr int kRows = 4;  // 16 of 32 registers are sums

#include "arm_dot.inc"

template <int Bits, int M>
inline void group_sums(const uint8_t* line, size_t group, const int8_t* const* q, int32x4_t (&sums)[M][4]) {
  dot_sums<Bits, M>(line, group, q, sums);
}

#include "arm_neon.inc"

bool runs(const Cpu& cpu) { return cpu.dotprod; }

}  // namespace

const Kernel arm_neon_dotprod{"neon_dotprod", runs, quantize, multiply, multiply_exact, panel_bytes};

}  // namespace qhub

QHUB_ISA_END

#endif
