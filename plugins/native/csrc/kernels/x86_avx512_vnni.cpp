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

// What comes kAhead bytes later is asked for now.
constexpr size_t kAhead = 4096;
constexpr size_t kFewRows = 6;
constexpr int kWaitingRows = 8;  // so many or fewer wait for memory more than they compute
inline void ask_for(const uint8_t* line) { _mm_prefetch(reinterpret_cast<const char*>(line + kAhead), _MM_HINT_T0); }

// The sums of one group, scaled, are added to total (16 floats).
__attribute__((always_inline)) inline void add_group(__m512i sum, __m512 zero, __m512 scale, __m512 row_sum, __m512 row_scale, float* total) {
  const __m512 dot = _mm512_fnmadd_ps(zero, row_sum, _mm512_cvtepi32_ps(sum));
  _mm512_store_ps(total, _mm512_fmadd_ps(_mm512_mul_ps(scale, row_scale), dot, _mm512_load_ps(total)));
}

// sum += codes · inputs, four products a lane. Not by the intrinsic: gcc 12 then copies sums about and keeps some in memory, storing
// them anew for every line (measured: 485 against 790 GOP/s in the first cache).
__attribute__((always_inline)) inline void add_products(__m512i& sum, __m512i codes, __m512i inputs) { __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(inputs)); }

// The twelve rows one by one: their sums have names, for what is in an array gcc keeps in memory.
#define QHUB_EACH_ROW(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)

#define QHUB_START(m) __m512i a##m = _mm512_setzero_si512(), b##m = a##m;

// Up to six rows times one block: memory is read in one stream.
template <int Bits, int M>
void multiply_few(const Weights& w, const Quantized& x, const Tile& tile, size_t first, size_t block) {
  const uint8_t* line = w.codes + block * block_bytes(w);
  const __m512i low_nibbles = _mm512_set1_epi8(0x0f);
  constexpr size_t kInputs = Bits == 4 ? 8 : 4;
  const size_t lines = w.group / kInputs, count = groups(w), padded = w.padded;
  const int8_t* q = x.q + first * padded;
  alignas(64) float total[M][kBlock] = {};
  for (size_t g = 0; g < count; ++g) {
    QHUB_EACH_ROW(QHUB_START)
    for (size_t i = 0; i < lines; ++i, line += kLine, q += kInputs) {
      const __m512i codes = line_at(line);
      ask_for(line);
      if constexpr (Bits == 4) {
        const __m512i low = _mm512_and_si512(codes, low_nibbles), high = _mm512_and_si512(_mm512_srli_epi16(codes, 4), low_nibbles);
#define QHUB_ADD_FEW(m)                                            \
  if constexpr (M > m) {                                           \
    add_products(a##m, low, four_inputs(q + m * padded));          \
    add_products(b##m, high, four_inputs(q + m * padded + 4));     \
  }
        QHUB_EACH_ROW(QHUB_ADD_FEW)
      } else {
#define QHUB_ADD_BYTES(m) \
  if constexpr (M > m) add_products(a##m, codes, four_inputs(q + m * padded));
        QHUB_EACH_ROW(QHUB_ADD_BYTES)
      }
    }
    const __m512 scale = scales(w, block, g), zero = _mm512_cvtepi32_ps(zeros(w, block, g));
#define QHUB_SCALE_FEW(m)                                                                                               \
  if constexpr (M > m) {                                                                                                \
    const size_t at = (first + m) * count + g;                                                                          \
    add_group(_mm512_add_epi32(a##m, b##m), zero, scale, _mm512_set1_ps(static_cast<float>(x.sum[at])),                 \
              _mm512_set1_ps(x.scale[at]), total[m]);                                                                   \
  }
    QHUB_EACH_ROW(QHUB_SCALE_FEW)
  }
  for (int m = 0; m < M; ++m)
    _mm512_mask_storeu_ps(tile.y + (first + m) * tile.stride + block * kBlock, valid(w, block), _mm512_load_ps(total[m]));
}

// Σ code · q of one group: M rows × two blocks. A function of its own that leaves its sums in memory: with what comes next in the
// same function gcc 12 runs out of registers and writes every sum with every line.
template <int Bits, int M>
__attribute__((noinline)) void group_sums(const uint8_t* left, const uint8_t* right, size_t lines, const int8_t* q, size_t stride, int32_t (*to)[2][kBlock]) {
  const __m512i low_nibbles = _mm512_set1_epi8(0x0f);
  __m512i sums[M][2] = {};
  for (size_t i = 0; i < lines; ++i, left += kLine, right += kLine, q += Bits == 4 ? 8 : 4) {
    const __m512i a = line_at(left), b = line_at(right);
    const __m512i a_low = Bits == 4 ? _mm512_and_si512(a, low_nibbles) : a, b_low = Bits == 4 ? _mm512_and_si512(b, low_nibbles) : b;
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const __m512i inputs = four_inputs(q + m * stride);
      sums[m][0] = _mm512_dpbusd_epi32(sums[m][0], a_low, inputs);
      sums[m][1] = _mm512_dpbusd_epi32(sums[m][1], b_low, inputs);
    }
    if (Bits == 8) continue;
    const __m512i a_high = _mm512_and_si512(_mm512_srli_epi16(a, 4), low_nibbles), b_high = _mm512_and_si512(_mm512_srli_epi16(b, 4), low_nibbles);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const __m512i inputs = four_inputs(q + m * stride + 4);
      sums[m][0] = _mm512_dpbusd_epi32(sums[m][0], a_high, inputs);
      sums[m][1] = _mm512_dpbusd_epi32(sums[m][1], b_high, inputs);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    _mm512_store_si512(to[m][0], sums[m][0]);
    _mm512_store_si512(to[m][1], sums[m][1]);
  }
}

// M rows times two blocks (the second may be the first again, at the right edge).
template <int Bits, int M>
void multiply_pair(const Weights& w, const Quantized& x, const Tile& tile, size_t first, size_t block, size_t next) {
  const uint8_t* left = w.codes + block * block_bytes(w);
  const uint8_t* right = w.codes + next * block_bytes(w);
  const size_t count = groups(w), group_bytes = w.group * kBlock * Bits / 8;
  const int8_t* q = x.q + first * w.padded;
  alignas(64) float totals[M][2][kBlock] = {};
  alignas(64) int32_t sums[M][2][kBlock];
  for (size_t g = 0; g < count; ++g, left += group_bytes, right += group_bytes, q += w.group) {
    group_sums<Bits, M>(left, right, group_bytes / kLine, q, w.padded, sums);
    const __m512 scale[2] = {scales(w, block, g), scales(w, next, g)};
    const __m512 zero[2] = {_mm512_cvtepi32_ps(zeros(w, block, g)), _mm512_cvtepi32_ps(zeros(w, next, g))};
    for (int m = 0; m < M; ++m) {
      const size_t at = (first + m) * count + g;
      const __m512 row_sum = _mm512_set1_ps(static_cast<float>(x.sum[at])), row_scale = _mm512_set1_ps(x.scale[at]);
      for (int side = 0; side < 2; ++side) {
        const __m512 dot = _mm512_fnmadd_ps(zero[side], row_sum, _mm512_cvtepi32_ps(_mm512_load_si512(sums[m][side])));
        const __m512 so_far = _mm512_load_ps(totals[m][side]);
        _mm512_store_ps(totals[m][side], _mm512_fmadd_ps(_mm512_mul_ps(scale[side], row_scale), dot, so_far));
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    float* y = tile.y + (first + m) * tile.stride;
    _mm512_mask_storeu_ps(y + block * kBlock, valid(w, block), _mm512_load_ps(totals[m][0]));
    _mm512_mask_storeu_ps(y + next * kBlock, valid(w, next), _mm512_load_ps(totals[m][1]));
  }
}

using Pair = void (*)(const Weights&, const Quantized&, const Tile&, size_t, size_t, size_t);
template <int Bits>
constexpr Pair kPairs[kRows] = {
    multiply_pair<Bits, 1>, multiply_pair<Bits, 2>, multiply_pair<Bits, 3>, multiply_pair<Bits, 4>,  multiply_pair<Bits, 5>,  multiply_pair<Bits, 6>,
    multiply_pair<Bits, 7>, multiply_pair<Bits, 8>, multiply_pair<Bits, 9>, multiply_pair<Bits, 10>, multiply_pair<Bits, 11>, multiply_pair<Bits, 12>,
};

using Few = void (*)(const Weights&, const Quantized&, const Tile&, size_t, size_t);
template <int Bits>
constexpr Few kFew[kFewRows] = {multiply_few<Bits, 1>, multiply_few<Bits, 2>, multiply_few<Bits, 3>, multiply_few<Bits, 4>,
                                multiply_few<Bits, 5>, multiply_few<Bits, 6>};

template <int Bits>
void multiply_bits(const Weights& w, const Quantized& x, const Tile& tile) {
  const size_t rows = tile.row_end - tile.row;
  if (rows <= kFewRows) {
    for (size_t block = tile.block; block < tile.block_end; ++block) kFew<Bits>[rows - 1](w, x, tile, tile.row, block);
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
