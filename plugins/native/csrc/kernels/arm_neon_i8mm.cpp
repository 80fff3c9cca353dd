// NEON with `smmla` (Apple M2, Graviton 3): two rows × eight inputs times eight inputs × two outputs per instruction.
#if defined(__aarch64__)

#include <arm_neon.h>

#include "../half.h"
#include "../isa.h"
#include "../kernels.h"

QHUB_ISA_BEGIN("arch=armv8.2-a+dotprod+i8mm")

namespace qhub {
namespace {

constexpr int kRows = 4;

#include "arm_dot.inc"

// Four outputs × inputs 0 … 3 and 4 … 7 of eight: as two outputs × eight inputs each.
struct OutputPairs {
  int8x16_t low, high;
};

inline OutputPairs pairs_of(uint8x16_t first, uint8x16_t second) {
  const uint32x4_t a = vreinterpretq_u32_u8(first), b = vreinterpretq_u32_u8(second);
  return {vreinterpretq_s8_u32(vzip1q_u32(a, b)), vreinterpretq_s8_u32(vzip2q_u32(a, b))};
}

template <int Bits>
inline OutputPairs eight_inputs(const uint8_t* line, int r) {
  const uint8x16_t first = vld1q_u8(line + 16 * r);
  if constexpr (Bits == 4) return pairs_of(vandq_u8(first, vdupq_n_u8(0x0f)), vshrq_n_u8(first, 4));
  else return pairs_of(veorq_u8(first, vdupq_n_u8(0x80)), veorq_u8(vld1q_u8(line + kLine + 16 * r), vdupq_n_u8(0x80)));
}

// Rows in pairs; the last row of an odd number is paired with itself. One row alone is left to sdot.
template <int Bits, int M>
inline void pair_sums(const uint8_t* line, size_t group, const int8_t* const* q, int32x4_t (&sums)[M][4]) {
  constexpr int kPairs = (M + 1) / 2;
  int32x4_t part[kPairs][4][2] = {};  // [outputs 4·r][their first two, last two] = output 0 × both rows, output 1 × both rows
  for (size_t k = 0; k < group; k += 8, line += 8 * kBlock * Bits / 8) {
    int8x16_t rows[kPairs];
    for (int p = 0; p < kPairs; ++p) rows[p] = vcombine_s8(vld1_s8(q[2 * p] + k), vld1_s8(q[2 * p + 1 < M ? 2 * p + 1 : 2 * p] + k));
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const OutputPairs codes = eight_inputs<Bits>(line, r);
      for (int p = 0; p < kPairs; ++p) {
        part[p][r][0] = vmmlaq_s32(part[p][r][0], codes.low, rows[p]);
        part[p][r][1] = vmmlaq_s32(part[p][r][1], codes.high, rows[p]);
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < 4; ++r) {
      const int32x4_t low = part[m / 2][r][0], high = part[m / 2][r][1];
      sums[m][r] = m % 2 ? vuzp2q_s32(low, high) : vuzp1q_s32(low, high);
    }
}

template <int Bits, int M>
inline void group_sums(const uint8_t* line, size_t group, const int8_t* const* q, int32x4_t (&sums)[M][4]) {
  if constexpr (M == 1) dot_sums<Bits, M>(line, group, q, sums);
  else pair_sums<Bits, M>(line, group, q, sums);
}

#include "arm_neon.inc"

bool runs(const Cpu& cpu) { return cpu.i8mm && cpu.dotprod; }

}  // namespace

const Kernel arm_neon_i8mm{"neon_i8mm", runs, quantize, multiply, multiply_exact, panel_bytes};

}  // namespace qhub

QHUB_ISA_END

#endif
