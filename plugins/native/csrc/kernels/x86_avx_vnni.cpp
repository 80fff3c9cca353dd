// AVX-VNNI: 32 products per instruction, straight into int32.
#if defined(__x86_64__)

#include <immintrin.h>

#include "../half.h"
#include "../isa.h"
#include "../kernels.h"

QHUB_ISA_BEGIN("avx2,fma,f16c,avxvnni")

namespace qhub {
namespace {

constexpr int kRows = 6;  // 12 of 16 registers are sums

inline __m256i half_line(const uint8_t* line, int half) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + 32 * half)); }
inline __m256i low_nibbles(__m256i codes) { return _mm256_and_si256(codes, _mm256_set1_epi8(0x0f)); }
inline __m256i high_nibbles(__m256i codes) { return low_nibbles(_mm256_srli_epi16(codes, 4)); }

template <int M>
inline void add_products(const int8_t* const* q, size_t k, __m256i a, __m256i b, __m256i (&sums)[M][2]) {
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    int32_t word;
    __builtin_memcpy(&word, q[m] + k, sizeof word);
    const __m256i inputs = _mm256_set1_epi32(word);
    sums[m][0] = _mm256_dpbusd_avx_epi32(sums[m][0], a, inputs);
    sums[m][1] = _mm256_dpbusd_avx_epi32(sums[m][1], b, inputs);
  }
}

// Two sets of sums, so that a single row has four chains to hide the latency; for more rows one set does.
template <int Bits, int M>
inline void group_sums(const uint8_t* line, size_t group, const int8_t* const* q, __m256i (&sums)[M][2]) {
  constexpr int kSets = M <= 2 ? 2 : 1;
  constexpr size_t kInputs = Bits == 4 ? 8 : 4;
  __m256i part[kSets][M][2] = {};
  for (size_t k = 0; k < group; k += 2 * kInputs)
#pragma GCC unroll 2
    for (size_t i = 0; i < 2; ++i, line += kLine) {
      if (M == 1) _mm_prefetch(reinterpret_cast<const char*>(line + 4096), _MM_HINT_T0);
      const __m256i a = half_line(line, 0), b = half_line(line, 1);
      if constexpr (Bits == 4) {
        add_products<M>(q, k + 8 * i, low_nibbles(a), low_nibbles(b), part[0]);
        add_products<M>(q, k + 8 * i + 4, high_nibbles(a), high_nibbles(b), part[kSets - 1]);
      } else {
        add_products<M>(q, k + 4 * i, a, b, part[i % kSets]);
      }
    }
  for (int m = 0; m < M; ++m)
    for (int half = 0; half < 2; ++half) {
      sums[m][half] = part[0][m][half];
      if (kSets == 2) sums[m][half] = _mm256_add_epi32(sums[m][half], part[kSets - 1][m][half]);
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
      sum = _mm256_dpbusd_avx_epi32(sum, codes, codes);
      __asm__ volatile("" : "+x"(sum));
    }
  return steps * kChains * kOperations;
}

bool runs(const Cpu& cpu) { return cpu.avx_vnni; }

}  // namespace

const Kernel x86_avx_vnni{"avx_vnni", runs, quantize, multiply, multiply_exact, panel_bytes, spin};

}  // namespace qhub

QHUB_ISA_END

#endif
