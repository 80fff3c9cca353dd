// AMX int8: a product of 16 rows × 64 inputs by 64 inputs × 16 outputs per instruction.
//
// What keeps it from its peak is memory and the step from int32 to float after each group. Hence: a pair of blocks is unpacked for
// kChunk inputs at a time and stays in L1 while all rows pass; zero points are taken off while unpacking, so that nothing
// remains to be corrected (except 8 bits with zero points, where code − zero does not fit); two groups are under way at once,
// so that the tiles multiply one while the vector units scale the other.
//
// With QHUB_EMULATE_TILES this file is a kernel of the tests, for processors without tiles.
#if defined(__x86_64__)

#include <immintrin.h>

#include "../isa.h"
#include "../kernels.h"
#include "tiles.h"

#if defined(QHUB_EMULATE_TILES)
#define QHUB_AMX_KERNEL x86_amx_int8_emulated
#define QHUB_AMX_NAME "amx_int8_emulated"
QHUB_ISA_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#else
#define QHUB_AMX_KERNEL x86_amx_int8
#define QHUB_AMX_NAME "amx_int8"
QHUB_ISA_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,amx-tile,amx-int8")
#endif

namespace qhub {
namespace {

constexpr size_t kFewRows = 8;      // up to here the vector units are faster
constexpr size_t kTileRows = 16;
constexpr size_t kChunk = 512;      // inputs of two blocks: 16 KB
constexpr size_t kPassRows = 512;   // rows for which the unpacked chunk is used

constexpr TileConfig config_of(int step) {
  TileConfig config{};
  config.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = static_cast<uint16_t>(tile == 4 || tile == 5 ? step : 64);
    config.rows[tile] = static_cast<uint8_t>(tile < 6 ? 16 : step / 4);
  }
  return config;
}

// Tiles 0 … 3 are sums (rows 0:16 and 16:32 × two blocks), 4 and 5 activations, 6 and 7 weights.
constexpr TileConfig kStep64 = config_of(64), kStep32 = config_of(32);

inline size_t step_of(const Weights& w) { return w.group < 64 ? 32 : 64; }

// A thread's scratch, for a pair of blocks.
struct Panel {
  alignas(64) int8_t weights[2][kChunk / 4][kLine];       // code − zero, as vpdpbusd and tiles want it
  alignas(64) int32_t sums[2][2 * kTileRows][2][kBlock];  // of an even and an odd group
  alignas(64) float totals[kPassRows][2][kBlock];
  alignas(64) int8_t last_rows[2][kTileRows][kChunk];     // of a tile that is not full, with zeros
};

// The rows of one call that meet a pair of blocks.
struct Pass {
  const Weights& w;
  const Quantized& x;
  Panel& panel;
  size_t block[2];
  size_t row, rows, groups;
};

// 16 rows of activations as a tile is loaded from them.
struct Band {
  const int8_t* q;
  size_t stride;
};

// What one block does with a group on its way to float.
struct Scaling {
  __m512 scale[2];
  __m512 zero[2];  // 8 bits with zero points: what unpacking left over
};

inline __m512i zero_bytes(const Weights& w, size_t block, size_t g) {
  if (w.bits == 8 || !w.zero) return _mm512_set1_epi8(static_cast<char>(1 << (w.bits - 1)));
  const uint8_t* from = w.zero + (block * groups(w) + g) * kBlock;
  const __m512i zeros = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm512_mullo_epi32(zeros, _mm512_set1_epi32(0x01010101));
}

void unpack_group(const Weights& w, size_t block, size_t g, int8_t (*to)[kLine]) {
  const size_t bytes = w.group * kBlock * static_cast<size_t>(w.bits) / 8;
  const uint8_t* from = w.codes + block * block_bytes(w) + g * bytes;
  const __m512i zeros = zero_bytes(w, block, g), low_nibbles = _mm512_set1_epi8(0x0f);
  for (const uint8_t* end = from + bytes; from < end; from += kLine) {
    const __m512i codes = _mm512_loadu_si512(from);
    if (w.bits == 8) {
      _mm512_store_si512(*to++, _mm512_sub_epi8(codes, zeros));
      continue;
    }
    _mm512_store_si512(*to++, _mm512_sub_epi8(_mm512_and_si512(codes, low_nibbles), zeros));
    _mm512_store_si512(*to++, _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(codes, 4), low_nibbles), zeros));
  }
}

inline Scaling scaling_of(const Pass& p, size_t g) {
  Scaling found;
  for (int side = 0; side < 2; ++side) {
    const size_t at = (p.block[side] * p.groups + g) * kBlock;
    found.scale[side] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p.w.scale + at)));
    if (p.w.bits == 8 && p.w.zero) {
      const __m512i zero = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p.w.zero + at)));
      found.zero[side] = _mm512_cvtepi32_ps(_mm512_sub_epi32(zero, _mm512_set1_epi32(128)));
    }
  }
  return found;
}

// totals += scale · sums, for rows [begin, end) of a pair of row tiles that starts at row `first` of the pass.
template <bool Left>
inline void scale_rows(const Pass& p, const Scaling& scaling, size_t g, size_t first, size_t begin, size_t end) {
  const size_t count = p.groups;
  size_t at = (p.row + first + begin) * count + g;
  for (size_t m = begin; m < end; ++m, at += count) {
    const __m512 row_scale = _mm512_set1_ps(p.x.scale[at]);
    const __m512 row_sum = Left ? _mm512_set1_ps(static_cast<float>(p.x.sum[at])) : row_scale;
#pragma GCC unroll 2
    for (int side = 0; side < 2; ++side) {
      __m512 dot = _mm512_cvtepi32_ps(_mm512_load_si512(p.panel.sums[g % 2][m][side]));
      if (Left) dot = _mm512_fnmadd_ps(scaling.zero[side], row_sum, dot);
      float* total = p.panel.totals[first + m][side];
      _mm512_store_ps(total, _mm512_fmadd_ps(_mm512_mul_ps(scaling.scale[side], row_scale), dot, _mm512_load_ps(total)));
    }
  }
}

template <int Tiles>
inline void multiply_step(const Band (&rows)[2], size_t k, const int8_t (*left)[kLine], const int8_t (*right)[kLine]) {
  TILE_LOAD(6, left, kLine);
  TILE_LOAD(4, rows[0].q + k, rows[0].stride);
  TILE_DOT(0, 4, 6);
  TILE_LOAD(7, right, kLine);
  TILE_DOT(1, 4, 7);
  if (Tiles == 2) {
    TILE_LOAD(5, rows[1].q + k, rows[1].stride);
    TILE_DOT(2, 5, 6);
    TILE_DOT(3, 5, 7);
  }
}

template <int Tiles>
inline void store_sums(int32_t (&to)[2 * kTileRows][2][kBlock]) {
  TILE_STORE(0, to[0][0], 2 * kLine);
  TILE_STORE(1, to[0][1], 2 * kLine);
  if (Tiles == 2) {
    TILE_STORE(2, to[kTileRows][0], 2 * kLine);
    TILE_STORE(3, to[kTileRows][1], 2 * kLine);
  }
}

// Groups [begin, end), unpacked, times 16 or 32 rows from row `first` of the pass. The group before is scaled between the steps.
template <int Tiles, bool Left>
void multiply_chunk(const Pass& p, const Band (&rows)[2], size_t first, size_t begin, size_t end) {
  const size_t left = p.rows - first, count = left < Tiles * kTileRows ? left : Tiles * kTileRows;
  const size_t group = p.w.group, step = step_of(p.w), steps = group / step, share = (count + steps - 1) / steps;
  Scaling before{};
  for (size_t g = begin; g < end; ++g) {
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (size_t i = 0; i < steps; ++i) {
      const size_t k = (g - begin) * group + i * step;
      multiply_step<Tiles>(rows, k, p.panel.weights[0] + k / 4, p.panel.weights[1] + k / 4);
      const size_t from = i * share, to = from + share < count ? from + share : count;
      if (g > begin) scale_rows<Left>(p, before, g - 1, first, from, to);
    }
    store_sums<Tiles>(p.panel.sums[g % 2]);
    before = scaling_of(p, g);
  }
  scale_rows<Left>(p, before, end - 1, first, 0, count);
}

// Band of a full tile are read where they are; of others a copy with zeros, so that nothing beyond them is read.
Band rows_at(const Pass& p, size_t first, size_t k, size_t inputs, int tile) {
  const int8_t* from = p.x.q + (p.row + first) * p.w.padded + k;
  if (first + kTileRows <= p.rows) return {from, p.w.padded};
  int8_t(&copy)[kTileRows][kChunk] = p.panel.last_rows[tile];
  for (size_t m = 0; m < kTileRows; ++m) {
    if (first + m < p.rows) __builtin_memcpy(copy[m], from + m * p.w.padded, inputs);
    else __builtin_memset(copy[m], 0, inputs);
  }
  return {copy[0], kChunk};
}

void multiply_groups(const Pass& p, size_t begin, size_t end) {
  const size_t k = begin * p.w.group, inputs = (end - begin) * p.w.group;
  const bool left = p.w.bits == 8 && p.w.zero;
  for (size_t first = 0; first < p.rows; first += 2 * kTileRows) {
    Band rows[2] = {rows_at(p, first, k, inputs, 0), {}};
    if (first + kTileRows >= p.rows) {
      (left ? multiply_chunk<1, true> : multiply_chunk<1, false>)(p, rows, first, begin, end);
      continue;
    }
    rows[1] = rows_at(p, first + kTileRows, k, inputs, 1);
    (left ? multiply_chunk<2, true> : multiply_chunk<2, false>)(p, rows, first, begin, end);
  }
}

inline __mmask16 valid(const Weights& w, size_t block) {
  const size_t left = w.rows - block * kBlock;
  return left >= kBlock ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
}

void multiply_pass(const Pass& p, const Tile& tile) {
  const size_t chunk = kChunk / p.w.group, count = p.groups;
  __builtin_memset(p.panel.totals, 0, p.rows * sizeof p.panel.totals[0]);
  for (size_t begin = 0; begin < count; begin += chunk) {
    const size_t end = begin + chunk < count ? begin + chunk : count;
    for (int side = 0; side < 2; ++side)
      for (size_t g = begin; g < end; ++g) unpack_group(p.w, p.block[side], g, p.panel.weights[side] + (g - begin) * p.w.group / 4);
    multiply_groups(p, begin, end);
  }
  for (size_t m = 0; m < p.rows; ++m)
    for (int side = 0; side < 2; ++side) {
      float* y = tile.y + (p.row + m) * tile.stride + p.block[side] * kBlock;
      _mm512_mask_storeu_ps(y, valid(p.w, p.block[side]), _mm512_load_ps(p.panel.totals[m][side]));
    }
}

void multiply(const Weights& w, const Quantized& x, const Tile& tile, uint8_t* panel) {
  if (tile.row_end - tile.row <= kFewRows) return x86_avx512_vnni.multiply(w, x, tile, panel);
  if (w.group < 64) TILE_CONFIGURE(kStep32);
  else TILE_CONFIGURE(kStep64);
  for (size_t row = tile.row; row < tile.row_end; row += kPassRows) {
    const size_t left = tile.row_end - row, rows = left < kPassRows ? left : kPassRows;
    for (size_t block = tile.block; block < tile.block_end; block += 2) {
      const size_t next = block + 1 < tile.block_end ? block + 1 : block;  // the right edge: the same block twice
      multiply_pass({w, x, *reinterpret_cast<Panel*>(panel), {block, next}, row, rows, groups(w)}, tile);
    }
  }
  TILE_RELEASE();
}

void quantize(const float* x, const Weights& w, float factor, int8_t* q, float* scale, int32_t* sum) {
  x86_avx512_vnni.quantize(x, w, factor, q, scale, sum);
}

void multiply_exact(const Weights& w, const float* x, const Tile& tile) { x86_avx512_vnni.multiply_exact(w, x, tile); }

size_t panel_bytes(const Weights&) { return sizeof(Panel); }

bool runs(const Cpu& cpu) {
#if defined(QHUB_EMULATE_TILES)
  return cpu.avx512_vnni;
#else
  return cpu.amx_int8;
#endif
}

}  // namespace

extern const Kernel QHUB_AMX_KERNEL;
const Kernel QHUB_AMX_KERNEL{QHUB_AMX_NAME, runs, quantize, multiply, multiply_exact, panel_bytes};

}  // namespace qhub

QHUB_ISA_END

#endif
