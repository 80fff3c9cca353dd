// NEON without extensions (Cortex-A72: Raspberry Pi 4): `smlal` multiplies bytes into int16, `sadalp` adds pairs into int32.
//
// In int16 there is room for sixteen products of 4-bit codes (16 · 15 · 127 = 30480) and for two of 8-bit codes (2 · 128 · 127 = 32512).
#if defined(__aarch64__)

#include <arm_neon.h>

#include "../half.h"
#include "../kernels.h"

namespace qhub {
namespace {

constexpr int kRows = 2;

inline int8x16_t four_inputs(const int8_t* q) {
  int32_t word;
  __builtin_memcpy(&word, q, sizeof word);
  return vreinterpretq_s8_s32(vdupq_n_s32(word));
}

// Products of four outputs: two outputs each.
struct Products {
  int16x8_t low, high;
};

inline Products add_products(Products so_far, int8x16_t codes, int8x16_t inputs) {
  return {vmlal_s8(so_far.low, vget_low_s8(codes), vget_low_s8(inputs)), vmlal_high_s8(so_far.high, codes, inputs)};
}

// Each output's four products, added up pairwise and once more.
inline int32x4_t add_up(int32x4_t sum, Products p) { return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(p.low), vpaddlq_s16(p.high))); }

// Register r of the weights of eight inputs, signed: of a line of 4-bit codes its two nibbles, else of two lines.
template <int Bits>
inline void eight_inputs(const uint8_t* line, int r, int8x16_t (&codes)[2]) {
  const uint8x16_t first = vld1q_u8(line + 16 * r);
  if constexpr (Bits == 4) {
    codes[0] = vreinterpretq_s8_u8(vandq_u8(first, vdupq_n_u8(0x0f)));
    codes[1] = vreinterpretq_s8_u8(vshrq_n_u8(first, 4));
  } else {
    codes[0] = vreinterpretq_s8_u8(veorq_u8(first, vdupq_n_u8(0x80)));
    codes[1] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(line + kLine + 16 * r), vdupq_n_u8(0x80)));
  }
}

template <int Bits, int M>
inline void group_sums(const uint8_t* line, size_t group, const int8_t* const* q, int32x4_t (&sums)[M][4]) {
  constexpr size_t kInputs = Bits == 4 ? 32 : 8;  // as many as int16 takes
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < 4; ++r) sums[m][r] = vdupq_n_s32(0);
  for (size_t begin = 0; begin < group; begin += kInputs, line += kInputs * kBlock * Bits / 8)
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      Products products[M] = {};
#pragma GCC unroll 4
      for (size_t i = 0; i < kInputs; i += 8) {
        int8x16_t codes[2];
        eight_inputs<Bits>(line + i * kBlock * Bits / 8, r, codes);
        for (int m = 0; m < M; ++m) {
          products[m] = add_products(products[m], codes[0], four_inputs(q[m] + begin + i));
          products[m] = add_products(products[m], codes[1], four_inputs(q[m] + begin + i + 4));
        }
      }
      for (int m = 0; m < M; ++m) sums[m][r] = add_up(sums[m][r], products[m]);
    }
}

#include "arm_neon.inc"

bool runs(const Cpu& cpu) { return cpu.neon; }

}  // namespace

const Kernel arm_neon{"neon", runs, quantize, multiply, multiply_exact, panel_bytes};

}  // namespace qhub

#endif
