// AVX512-VNNI: 64 products per instruction, int32 sums per group of inputs.
#if defined(__x86_64__)

#include <immintrin.h>

#include "../half.h"
#include "../isa.h"
#include "../kernels.h"

QHUB_ISA_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

namespace qhub {
namespace {

constexpr int kRows = 12;        // rows of activations that a pair of blocks meets at once: 24 of 32 registers are sums
constexpr int kFewRows = 3;      // up to here memory decides: one block at a time is one stream to read
constexpr size_t kAhead = 8192;  // bytes between the codes that are multiplied and those that memory is asked for
constexpr size_t kScalesAhead = 32 * kBlock;  // the same for scales and zeros, in numbers: 32 groups

inline __m512i line_at(const uint8_t* address) { return _mm512_loadu_si512(address); }
inline void ask_for(const void* line) { _mm_prefetch(static_cast<const char*>(line), _MM_HINT_T0); }

inline __m512 scales(const Weights& w, size_t block, size_t g) {
  const uint16_t* from = w.scale + (block * groups(w) + g) * kBlock;
  ask_for(from + kScalesAhead);
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

inline __m512i zeros(const Weights& w, size_t block, size_t g) {
  if (!w.zero) return _mm512_set1_epi32(1 << (w.bits - 1));
  const uint8_t* from = w.zero + (block * groups(w) + g) * kBlock;
  ask_for(from + kScalesAhead);
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

// One group of one block or two. `ahead`: how far from a line is the one to ask memory for.
template <int Blocks>
struct Group {
  const uint8_t* line[Blocks];
  size_t lines, ahead;
};

// Σ code · q of one group: M rows × one block or two. A function of its own that leaves its sums in memory: with what comes next in
// the same function gcc 12 runs out of registers and writes every sum with every line.
template <int Bits, int M, int Blocks>
__attribute__((noinline)) void group_sums(const Group<Blocks>& group, const int8_t* q, size_t stride, int32_t (*to)[Blocks][kBlock]) {
  constexpr int kInputs = Bits == 4 ? 8 : 4, kChains = Blocks == 1 && Bits == 4 ? 2 : 1;  // few sums: two chains hide the latency
  const __m512i low_nibbles = _mm512_set1_epi8(0x0f);
  __m512i sums[M][Blocks][kChains] = {};
  size_t at = 0;
  for (size_t i = 0; i < group.lines; ++i, at += kLine, q += kInputs) {
    __m512i codes[Blocks][2];
#pragma GCC unroll 2
    for (int b = 0; b < Blocks; ++b) {
      const __m512i line = line_at(group.line[b] + at);
      ask_for(group.line[b] + at + group.ahead);
      codes[b][0] = Bits == 4 ? _mm512_and_si512(line, low_nibbles) : line;
      if (Bits == 4) codes[b][1] = _mm512_and_si512(_mm512_srli_epi16(line, 4), low_nibbles);
    }
#pragma GCC unroll 2
    for (int nibble = 0; nibble < kInputs / 4; ++nibble)
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const __m512i inputs = four_inputs(q + m * stride + 4 * nibble);
#pragma GCC unroll 2
        for (int b = 0; b < Blocks; ++b) {
          __m512i& sum = sums[m][b][nibble % kChains];
          sum = _mm512_dpbusd_epi32(sum, codes[b][nibble], inputs);
        }
      }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int b = 0; b < Blocks; ++b) {
      const __m512i first = sums[m][b][0], second = sums[m][b][kChains - 1];
      _mm512_store_si512(to[m][b], kChains == 1 ? first : _mm512_add_epi32(first, second));
    }
}

// M rows from `first` times the given blocks, which may be the same at the right edge.
template <int Bits, int M, int Blocks>
void multiply_rows(const Weights& w, const Quantized& x, const Tile& tile, size_t first, const size_t* block) {
  const size_t count = groups(w), group_bytes = w.group * kBlock * Bits / 8, bytes = block_bytes(w);
  const int8_t* q = x.q + first * w.padded;
  alignas(64) float totals[M][Blocks][kBlock] = {};
  alignas(64) int32_t sums[M][Blocks][kBlock];
  for (size_t g = 0; g < count; ++g, q += w.group) {
    const size_t at = g * group_bytes, past = at + kAhead < bytes ? 0 : (Blocks - 1) * bytes;  // after the last line the next blocks follow
    Group<Blocks> group{{}, group_bytes / kLine, kAhead + past};
    __m512 scale[Blocks], zero[Blocks];
    for (int b = 0; b < Blocks; ++b) {
      group.line[b] = w.codes + block[b] * bytes + at;
      scale[b] = scales(w, block[b], g);
      zero[b] = _mm512_cvtepi32_ps(zeros(w, block[b], g));
    }
    group_sums<Bits, M, Blocks>(group, q, w.padded, sums);
    for (int m = 0; m < M; ++m) {
      const size_t of_row = (first + m) * count + g;
      const __m512 row_sum = _mm512_cvtepi32_ps(_mm512_set1_epi32(x.sum[of_row])), row_scale = _mm512_set1_ps(x.scale[of_row]);
      for (int b = 0; b < Blocks; ++b) {
        const __m512 dot = _mm512_fnmadd_ps(zero[b], row_sum, _mm512_cvtepi32_ps(_mm512_load_si512(sums[m][b])));
        _mm512_store_ps(totals[m][b], _mm512_fmadd_ps(_mm512_mul_ps(scale[b], row_scale), dot, _mm512_load_ps(totals[m][b])));
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int b = 0; b < Blocks; ++b)
      _mm512_mask_storeu_ps(tile.y + (first + m) * tile.stride + block[b] * kBlock, valid(w, block[b]), _mm512_load_ps(totals[m][b]));
}

using Rows = void (*)(const Weights&, const Quantized&, const Tile&, size_t, const size_t*);

template <int Bits, int M, int Blocks>
Rows rows_of(size_t count) {
  if constexpr (M == 1) return multiply_rows<Bits, 1, Blocks>;
  else return count == M ? multiply_rows<Bits, M, Blocks> : rows_of<Bits, M - 1, Blocks>(count);
}

template <int Bits>
void multiply_bits(const Weights& w, const Quantized& x, const Tile& tile) {
  const size_t rows = tile.row_end - tile.row;
  if (rows <= kFewRows) {
    const Rows few = rows_of<Bits, kFewRows, 1>(rows);
    for (size_t block = tile.block; block < tile.block_end; ++block) few(w, x, tile, tile.row, &block);
    return;
  }
  const size_t parts = (rows + kRows - 1) / kRows;  // of about the same size
  for (size_t block = tile.block; block < tile.block_end; block += 2) {
    const size_t pair[2] = {block, block + 1 < tile.block_end ? block + 1 : block};
    for (size_t part = 0; part < parts; ++part) {
      const size_t row = tile.row + rows * part / parts, row_end = tile.row + rows * (part + 1) / parts;
      rows_of<Bits, kRows, 2>(row_end - row)(w, x, tile, row, pair);
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
        const __m128i shift = _mm_cvtsi32_si128(static_cast<int>(8 * (j % 4) + 4 * (j / 4)));
        const __m512i code = _mm512_and_si512(_mm512_srl_epi32(codes, shift), mask);
        const __m512 weight = _mm512_cvtepi32_ps(_mm512_sub_epi32(code, zero));
        const size_t k = g * w.group + i * per_line + j;
        for (int m = 0; m < M; ++m) sums[m] = _mm512_fmadd_ps(_mm512_set1_ps(row[m][k]), weight, sums[m]);
      }
    }
    const __m512 scale = scales(w, block, g);
    for (int m = 0; m < M; ++m) total[m] = _mm512_fmadd_ps(scale, sums[m], total[m]);
  }
  for (int m = 0; m < M; ++m) {
    float* y = tile.y + (first + m) * tile.stride + block * kBlock;
    _mm512_mask_storeu_ps(y, valid(w, block), _mm512_mul_ps(total[m], _mm512_set1_ps(factor)));
  }
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
uint64_t spin(size_t steps) {
  constexpr size_t kChains = 12, kOperations = 128;
  const __m512i codes = _mm512_set1_epi8(1);
  __m512i sums[kChains] = {};
  for (size_t step = 0; step < steps; ++step)
#pragma GCC unroll 12
    for (__m512i& sum : sums) {
      sum = _mm512_dpbusd_epi32(sum, codes, codes);
      __asm__ volatile("" : "+v"(sum));
    }
  return steps * kChains * kOperations;
}

bool runs(const Cpu& cpu) { return cpu.avx512_vnni; }

}  // namespace

const Kernel x86_avx512_vnni{"avx512_vnni", runs, quantize, multiply, multiply_exact, panel_bytes, spin};

}  // namespace qhub

QHUB_ISA_END

#endif
