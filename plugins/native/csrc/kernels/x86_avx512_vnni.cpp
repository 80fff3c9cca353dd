// AVX512-VNNI: 64 products per instruction, int32 sums per group of inputs.
#if defined(__x86_64__)

#include <immintrin.h>

#include "../half.h"
#include "../isa.h"
#include "../kernels.h"

QHUB_ISA_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

namespace qhub {
namespace {

constexpr size_t kRows = 12;  // rows of activations that a pair of blocks meets at once: 24 of 32 registers are sums

inline __m512i line_at(const uint8_t* address) { return _mm512_loadu_si512(address); }

inline __m512 scales(const Weights& w, size_t block, size_t g) {
  const uint16_t* from = w.scale + (block * groups(w) + g) * kBlock;
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

inline __m512i zeros(const Weights& w, size_t block, size_t g) {
  if (!w.zero) return _mm512_set1_epi32(1 << (w.bits - 1));
  const uint8_t* from = w.zero + (block * groups(w) + g) * kBlock;
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

inline __mmask16 valid(const Weights& w, size_t block) {
  const size_t left = w.rows - block * kBlock;
  return left >= kBlock ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
}

inline __m512i four_inputs(const int8_t* q) {
  int32_t word;
  __builtin_memcpy(&word, q, sizeof word);
  return _mm512_set1_epi32(word);
}

// One row times one block. Four chains of sums hide the latency; the line after next is asked for early.
template <int Bits>
void multiply_row(const Weights& w, const Quantized& x, size_t m, size_t block, float* y) {
  const uint8_t* line = w.codes + block * block_bytes(w);
  const int8_t* q = x.q + m * w.padded;
  const __m512i low_nibbles = _mm512_set1_epi8(0x0f);
  constexpr size_t kInputs = Bits == 4 ? 8 : 4;  // per line
  const size_t lines = w.group / kInputs;
  __m512 total = _mm512_setzero_ps();
  for (size_t g = 0; g < groups(w); ++g) {
    __m512i sums[4] = {};
    for (size_t i = 0; i < lines; i += 4) {
      for (size_t part = 0; part < 4; ++part, line += kLine, q += kInputs) {
        const __m512i codes = line_at(line);
        _mm_prefetch(reinterpret_cast<const char*>(line + 4096), _MM_HINT_T0);
        if (Bits == 4) {
          sums[part] = _mm512_dpbusd_epi32(sums[part], _mm512_and_si512(codes, low_nibbles), four_inputs(q));
          sums[part] = _mm512_dpbusd_epi32(sums[part], _mm512_and_si512(_mm512_srli_epi16(codes, 4), low_nibbles), four_inputs(q + 4));
        } else {
          sums[part] = _mm512_dpbusd_epi32(sums[part], codes, four_inputs(q));
        }
      }
    }
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(sums[0], sums[1]), _mm512_add_epi32(sums[2], sums[3]));
    const size_t at = m * groups(w) + g;
    const __m512i less = _mm512_mullo_epi32(zeros(w, block, g), _mm512_set1_epi32(x.sum[at]));
    const __m512 dot = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, less));
    total = _mm512_fmadd_ps(_mm512_mul_ps(scales(w, block, g), _mm512_set1_ps(x.scale[at])), dot, total);
  }
  _mm512_mask_storeu_ps(y + block * kBlock, valid(w, block), total);
}

// The sums of one group, scaled, are added to total (16 floats).
inline void add_group(__m512i sum, __m512 zero, __m512 scale, __m512 row_sum, __m512 row_scale, float* total) {
  const __m512 dot = _mm512_fnmadd_ps(zero, row_sum, _mm512_cvtepi32_ps(sum));
  _mm512_store_ps(total, _mm512_fmadd_ps(_mm512_mul_ps(scale, row_scale), dot, _mm512_load_ps(total)));
}

// M rows times two blocks (the second may be the first again, at the right edge). The sums are two arrays whose every index is
// known when the loops are unrolled: otherwise gcc keeps them in memory, and stores each of them for every line.
template <int Bits, int M>
void multiply_pair(const Weights& w, const Quantized& x, const Tile& tile, size_t first, size_t block, size_t next) {
  const uint8_t* left = w.codes + block * block_bytes(w);
  const uint8_t* right = w.codes + next * block_bytes(w);
  const __m512i low_nibbles = _mm512_set1_epi8(0x0f);
  constexpr size_t kInputs = Bits == 4 ? 8 : 4;
  const size_t lines = w.group / kInputs, count = groups(w), padded = w.padded;
  const int8_t* q = x.q + first * padded;
  alignas(64) float total[M][2][kBlock] = {};
  for (size_t g = 0; g < count; ++g) {
    __m512i a_sums[M], b_sums[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) a_sums[m] = b_sums[m] = _mm512_setzero_si512();
    for (size_t i = 0; i < lines; ++i, left += kLine, right += kLine, q += kInputs) {
      const __m512i a = line_at(left), b = line_at(right);
      const __m512i a_low = Bits == 4 ? _mm512_and_si512(a, low_nibbles) : a, b_low = Bits == 4 ? _mm512_and_si512(b, low_nibbles) : b;
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const __m512i inputs = four_inputs(q + m * padded);
        a_sums[m] = _mm512_dpbusd_epi32(a_sums[m], a_low, inputs);
        b_sums[m] = _mm512_dpbusd_epi32(b_sums[m], b_low, inputs);
      }
      if (Bits == 8) continue;
      const __m512i a_high = _mm512_and_si512(_mm512_srli_epi16(a, 4), low_nibbles);
      const __m512i b_high = _mm512_and_si512(_mm512_srli_epi16(b, 4), low_nibbles);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const __m512i inputs = four_inputs(q + m * padded + 4);
        a_sums[m] = _mm512_dpbusd_epi32(a_sums[m], a_high, inputs);
        b_sums[m] = _mm512_dpbusd_epi32(b_sums[m], b_high, inputs);
      }
    }
    const __m512 a_scale = scales(w, block, g), b_scale = scales(w, next, g);
    const __m512 a_zero = _mm512_cvtepi32_ps(zeros(w, block, g)), b_zero = _mm512_cvtepi32_ps(zeros(w, next, g));
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const size_t at = (first + m) * count + g;
      const __m512 row_sum = _mm512_set1_ps(static_cast<float>(x.sum[at])), row_scale = _mm512_set1_ps(x.scale[at]);
      add_group(a_sums[m], a_zero, a_scale, row_sum, row_scale, total[m][0]);
      add_group(b_sums[m], b_zero, b_scale, row_sum, row_scale, total[m][1]);
    }
  }
  for (int m = 0; m < M; ++m) {
    float* y = tile.y + (first + m) * tile.stride;
    _mm512_mask_storeu_ps(y + block * kBlock, valid(w, block), _mm512_load_ps(total[m][0]));
    _mm512_mask_storeu_ps(y + next * kBlock, valid(w, next), _mm512_load_ps(total[m][1]));
  }
}

using Pair = void (*)(const Weights&, const Quantized&, const Tile&, size_t, size_t, size_t);
template <int Bits>
constexpr Pair kPairs[kRows] = {
    multiply_pair<Bits, 1>, multiply_pair<Bits, 2>, multiply_pair<Bits, 3>, multiply_pair<Bits, 4>,  multiply_pair<Bits, 5>,  multiply_pair<Bits, 6>,
    multiply_pair<Bits, 7>, multiply_pair<Bits, 8>, multiply_pair<Bits, 9>, multiply_pair<Bits, 10>, multiply_pair<Bits, 11>, multiply_pair<Bits, 12>,
};

template <int Bits>
void multiply_bits(const Weights& w, const Quantized& x, const Tile& tile) {
  if (tile.row_end - tile.row == 1) {
    for (size_t block = tile.block; block < tile.block_end; ++block)
      multiply_row<Bits>(w, x, tile.row, block, tile.y + tile.row * tile.stride);
    return;
  }
  for (size_t block = tile.block; block < tile.block_end; block += 2) {
    const size_t next = block + 1 < tile.block_end ? block + 1 : block;
    for (size_t row = tile.row; row < tile.row_end; row += kRows) {
      const size_t count = tile.row_end - row < kRows ? tile.row_end - row : kRows;
      kPairs<Bits>[count - 1](w, x, tile, row, block, next);
    }
  }
}

void multiply(const Weights& w, const Quantized& x, const Tile& tile, uint8_t*) {
  if (w.bits == 4) multiply_bits<4>(w, x, tile);
  else multiply_bits<8>(w, x, tile);
}

void quantize(const float* x, const Weights& w, float factor, int8_t* q, float* scale, int32_t* sum) {
  for (size_t g = 0; g < groups(w); ++g) {
    const size_t begin = g * w.group;
    __m512 values[8];  // the largest group: 128
    const size_t parts = w.group / 16;
    __m512i largest = _mm512_setzero_si512();  // magnitudes as integers: infinities and NaNs are the largest
    for (size_t i = 0; i < parts; ++i) {
      const size_t k = begin + 16 * i, left = w.inputs > k ? w.inputs - k : 0;
      values[i] = _mm512_maskz_loadu_ps(left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1), x + k);
      largest = _mm512_max_epu32(largest, _mm512_castps_si512(_mm512_abs_ps(values[i])));
    }
    const float top = float_from_bits(_mm512_reduce_max_epu32(largest)), factor_in = inverse_step(top);
    const __m512 inverse = _mm512_set1_ps(factor_in);
    const __mmask16 usable = factor_in > 0 ? 0xffff : 0;
    __m512i total = _mm512_setzero_si512();
    for (size_t i = 0; i < parts; ++i) {
      const __m512i rounded = _mm512_maskz_cvtps_epi32(usable, _mm512_mul_ps(values[i], inverse));
      total = _mm512_add_epi32(total, rounded);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + begin + 16 * i), _mm512_cvtepi32_epi8(rounded));
    }
    scale[g] = top / 127.0f * factor;
    sum[g] = _mm512_reduce_add_epi32(total);
  }
}

// M rows times one block in float32: codes less zero are small integers, exact; the scale comes last.
template <int M>
void exact_rows(const Weights& w, const float* x, const Tile& tile, size_t first, size_t block, float factor) {
  const uint8_t* line = w.codes + block * block_bytes(w);
  const size_t per_line = w.bits == 4 ? 8 : 4, lines = w.group / per_line;
  const __m512i mask = _mm512_set1_epi32(w.bits == 4 ? 0x0f : 0xff);
  const float* row[M];
  for (int m = 0; m < M; ++m) row[m] = x + (first + m) * w.padded;
  __m512 total[M] = {};
  for (size_t g = 0; g < groups(w); ++g) {
    const __m512i zero = zeros(w, block, g);
    __m512 sums[M] = {};
    for (size_t i = 0; i < lines; ++i, line += kLine) {
      const __m512i codes = line_at(line);
      for (size_t j = 0; j < per_line; ++j) {
        const __m512i code = _mm512_and_si512(_mm512_srl_epi32(codes, _mm_cvtsi32_si128(static_cast<int>(8 * (j % 4) + 4 * (j / 4)))), mask);
        const __m512 weight = _mm512_cvtepi32_ps(_mm512_sub_epi32(code, zero));
        const size_t k = g * w.group + i * per_line + j;
        for (int m = 0; m < M; ++m) sums[m] = _mm512_fmadd_ps(_mm512_set1_ps(row[m][k]), weight, sums[m]);
      }
    }
    const __m512 scale = scales(w, block, g);
    for (int m = 0; m < M; ++m) total[m] = _mm512_fmadd_ps(scale, sums[m], total[m]);
  }
  for (int m = 0; m < M; ++m)
    _mm512_mask_storeu_ps(tile.y + (first + m) * tile.stride + block * kBlock, valid(w, block), _mm512_mul_ps(total[m], _mm512_set1_ps(factor)));
}

void multiply_exact(const Weights& w, const float* x, const Tile& tile) {
  const float factor = __builtin_ldexpf(1.0f, w.exponent);
  for (size_t block = tile.block; block < tile.block_end; ++block) {
    size_t row = tile.row;
    for (; row + 8 <= tile.row_end; row += 8) exact_rows<8>(w, x, tile, row, block, factor);
    for (; row < tile.row_end; ++row) exact_rows<1>(w, x, tile, row, block, factor);
  }
}

size_t panel_bytes(const Weights&) { return 0; }
bool runs(const Cpu& cpu) { return cpu.avx512_vnni; }

}  // namespace

const Kernel x86_avx512_vnni{"avx512_vnni", runs, quantize, multiply, multiply_exact, panel_bytes};

}  // namespace qhub

QHUB_ISA_END

#endif
