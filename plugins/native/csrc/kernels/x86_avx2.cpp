// AVX2: `vpmaddubsw` multiplies 4-bit numbers by int8 and adds pairs into int16, where eight such sums fit: 8 · 2 · 15 · 127 = 30480.
//
// Codes of 8 bits are therefore taken apart: their low nibbles and their high nibbles are summed up alone and joined as low + 16 · high.
#if defined(__x86_64__)

#include <immintrin.h>

#include "../half.h"
#include "../isa.h"
#include "../kernels.h"

QHUB_ISA_BEGIN("avx2,fma,f16c")

namespace qhub {
namespace {

constexpr int kRows = 4;
constexpr size_t kChunk = 32;  // inputs between int16 and int32

inline __m256i half_line(const uint8_t* line, int half) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + 32 * half)); }
inline __m256i low_nibbles(__m256i codes) { return _mm256_and_si256(codes, _mm256_set1_epi8(0x0f)); }
inline __m256i high_nibbles(__m256i codes) { return low_nibbles(_mm256_srli_epi16(codes, 4)); }

inline __m256i four_inputs(const int8_t* q) {
  int32_t word;
  __builtin_memcpy(&word, q, sizeof word);
  return _mm256_set1_epi32(word);
}

// The empty statement keeps gcc from regrouping the additions, for which it would keep every product, and not in registers.
inline void add_products(__m256i& sum, __m256i codes, __m256i inputs) {
  sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, inputs));
  __asm__("" : "+x"(sum));
}

// 4 lines of 4-bit codes: both nibbles into one sum, for different inputs.
template <int M>
inline void chunk4(const uint8_t* line, const int8_t* const* q, size_t k, __m256i (&sums)[M][2]) {
  __m256i products[M][2] = {};
#pragma GCC unroll 4
  for (size_t i = 0; i < 4; ++i, line += kLine, k += 8) {
    const __m256i a = half_line(line, 0), b = half_line(line, 1);
    const __m256i a_low = low_nibbles(a), b_low = low_nibbles(b);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const __m256i inputs = four_inputs(q[m] + k);
      add_products(products[m][0], a_low, inputs);
      add_products(products[m][1], b_low, inputs);
    }
    const __m256i a_high = high_nibbles(a), b_high = high_nibbles(b);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const __m256i inputs = four_inputs(q[m] + k + 4);
      add_products(products[m][0], a_high, inputs);
      add_products(products[m][1], b_high, inputs);
    }
  }
  const __m256i ones = _mm256_set1_epi16(1);
  for (int m = 0; m < M; ++m)
    for (int half = 0; half < 2; ++half) sums[m][half] = _mm256_add_epi32(sums[m][half], _mm256_madd_epi16(products[m][half], ones));
}

// 8 lines of 8-bit codes, half a line at a time: the nibbles into two sums, for the same inputs.
template <int M>
inline void chunk8(const uint8_t* lines, const int8_t* const* q, size_t first, __m256i (&sums)[M][2]) {
  const __m256i ones = _mm256_set1_epi16(1), sixteens = _mm256_set1_epi16(16);
  for (int half = 0; half < 2; ++half) {
    __m256i low[M] = {}, high[M] = {};
    const uint8_t* line = lines;
#pragma GCC unroll 4
    for (size_t i = 0; i < 8; ++i, line += kLine) {
      const __m256i codes = half_line(line, half), codes_low = low_nibbles(codes), codes_high = high_nibbles(codes);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const __m256i inputs = four_inputs(q[m] + first + 4 * i);
        add_products(low[m], codes_low, inputs);
        add_products(high[m], codes_high, inputs);
      }
    }
    for (int m = 0; m < M; ++m) {
      const __m256i both = _mm256_add_epi32(_mm256_madd_epi16(low[m], ones), _mm256_madd_epi16(high[m], sixteens));
      sums[m][half] = _mm256_add_epi32(sums[m][half], both);
    }
  }
}

template <int Bits, int M>
inline void group_sums(const uint8_t* line, size_t group, const int8_t* const* q, __m256i (&sums)[M][2]) {
  for (int m = 0; m < M; ++m) sums[m][0] = sums[m][1] = _mm256_setzero_si256();
  for (size_t k = 0; k < group; k += kChunk, line += kChunk * kBlock * Bits / 8) {
    if (M == 1) _mm_prefetch(reinterpret_cast<const char*>(line + 4096), _MM_HINT_T0);
    if constexpr (Bits == 4) chunk4<M>(line, q, k, sums);
    else chunk8<M>(line, q, k, sums);
  }
}

#include "x86_avx2.inc"

uint64_t spin(size_t steps) {
  constexpr size_t kChains = 12, kOperations = 64;
  const __m256i codes = _mm256_set1_epi8(1);
  __m256i sums[kChains] = {};
  for (size_t step = 0; step < steps; ++step)
#pragma GCC unroll 12
    for (__m256i& sum : sums) {
      sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, sum));
      __asm__ volatile("" : "+x"(sum));
    }
  return steps * kChains * kOperations;
}

bool runs(const Cpu& cpu) { return cpu.avx2; }

}  // namespace

const Kernel x86_avx2{"avx2", runs, quantize, multiply, multiply_exact, panel_bytes, spin};

}  // namespace qhub

QHUB_ISA_END

#endif
