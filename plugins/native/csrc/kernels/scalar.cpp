// The reference: plain loops that say what every other kernel computes.
#include <algorithm>
#include <cmath>

#include "../half.h"
#include "../kernels.h"

namespace qhub {
namespace {

// Code of output j of block b, input k.
int code_at(const Weights& w, size_t block, size_t j, size_t k) {
  const uint8_t* base = w.codes + block * block_bytes(w);
  if (w.bits == 8) return base[(k / 4) * kLine + 4 * j + k % 4];
  const uint8_t both = base[(k / 8) * kLine + 4 * j + k % 4];
  return k % 8 < 4 ? both & 0x0f : both >> 4;
}

int zero_at(const Weights& w, size_t block, size_t g, size_t j) {
  return w.zero ? w.zero[(block * groups(w) + g) * kBlock + j] : 1 << (w.bits - 1);
}

float scale_at(const Weights& w, size_t block, size_t g, size_t j) {
  return half_to_float(w.scale[(block * groups(w) + g) * kBlock + j]);
}

void quantize(const float* x, const Weights& w, float factor, int8_t* q, float* scale, int32_t* sum) {
  for (size_t g = 0; g < groups(w); ++g) {
    const size_t begin = g * w.group, end = begin + w.group;
    uint32_t top = 0;  // magnitudes as integers: infinities and NaNs are the largest
    for (size_t k = begin; k < end && k < w.inputs; ++k) top = std::max(top, bits_of_float(x[k]) & 0x7fffffff);
    const float largest = float_from_bits(top), inverse = inverse_step(largest);
    scale[g] = largest / 127.0f * factor;
    sum[g] = 0;
    for (size_t k = begin; k < end; ++k) {
      q[k] = k < w.inputs && inverse > 0 ? static_cast<int8_t>(std::nearbyint(x[k] * inverse)) : int8_t{0};
      sum[g] += q[k];
    }
  }
}

void multiply(const Weights& w, const Quantized& x, const Tile& tile, uint8_t*) {
  for (size_t m = tile.row; m < tile.row_end; ++m)
    for (size_t n = tile.block * kBlock; n < tile.block_end * kBlock && n < w.rows; ++n) {
      const size_t block = n / kBlock, j = n % kBlock;
      float total = 0;
      for (size_t g = 0; g < groups(w); ++g) {
        int32_t dot = -zero_at(w, block, g, j) * x.sum[m * groups(w) + g];
        for (size_t k = g * w.group; k < (g + 1) * w.group; ++k) dot += x.q[m * w.padded + k] * code_at(w, block, j, k);
        total += scale_at(w, block, g, j) * x.scale[m * groups(w) + g] * static_cast<float>(dot);
      }
      tile.y[m * tile.stride + n] = total;
    }
}

void multiply_exact(const Weights& w, const float* x, const Tile& tile) {
  const float factor = std::ldexp(1.0f, w.exponent);
  for (size_t m = tile.row; m < tile.row_end; ++m)
    for (size_t n = tile.block * kBlock; n < tile.block_end * kBlock && n < w.rows; ++n) {
      const size_t block = n / kBlock, j = n % kBlock;
      float total = 0;
      for (size_t g = 0; g < groups(w); ++g) {
        float dot = 0;
        for (size_t k = g * w.group; k < (g + 1) * w.group; ++k)
          dot += x[m * w.padded + k] * static_cast<float>(code_at(w, block, j, k) - zero_at(w, block, g, j));
        total += scale_at(w, block, g, j) * dot;
      }
      tile.y[m * tile.stride + n] = total * factor;
    }
}

size_t panel_bytes(const Weights&) { return 0; }
bool runs(const Cpu&) { return true; }

}  // namespace

const Kernel scalar{"scalar", runs, quantize, multiply, multiply_exact, panel_bytes};

}  // namespace qhub
