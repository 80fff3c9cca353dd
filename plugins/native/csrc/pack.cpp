#include "pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "half.h"

namespace qhub {
namespace {

size_t aligned(size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

// The row of a part that output n of the matrix is.
struct Source {
  const Rows* part;
  size_t row;
};

Source find(const std::vector<Rows>& parts, size_t n) {
  for (const Rows& part : parts) {
    if (n < part.rows) return {&part, n};
    n -= part.rows;
  }
  return {nullptr, 0};
}

void unpack_row(const uint8_t* stream, int bits, size_t count, uint8_t* codes) {
  if (bits == 8) {
    std::copy(stream, stream + count, codes);
    return;
  }
  if (bits == 4) {
    for (size_t k = 0; k + 1 < count; k += 2) {
      codes[k] = stream[k / 2] & 0x0f;
      codes[k + 1] = stream[k / 2] >> 4;
    }
    if (count % 2) codes[count - 1] = stream[count / 2] & 0x0f;
    return;
  }
  const unsigned mask = (1u << bits) - 1;
  for (size_t k = 0; k < count; ++k) {
    const size_t bit = k * static_cast<size_t>(bits), byte = bit / 8, shift = bit % 8;
    unsigned word = stream[byte];
    if (shift + static_cast<size_t>(bits) > 8) word |= static_cast<unsigned>(stream[byte + 1]) << 8;
    codes[k] = static_cast<uint8_t>((word >> shift) & mask);
  }
}

// Output j of the block: its scales, zeros and codes (all K, padding included) as the kernels read them.
struct Lane {
  const Shape& shape;
  Source source;

  size_t scale_index(size_t g) const { return std::min(g * shape.group / source.part->every, source.part->scales - 1); }
  float scale(size_t g) const { return source.part->scale[source.row * source.part->scales + scale_index(g)]; }
  // Symmetric rows of fewer bits than the container's are moved up, so that zero lies where the kernels take it to be.
  int shift() const { return source.part->zero ? 0 : (1 << (shape.bits - 1)) - (1 << (source.part->bits - 1)); }
  uint8_t zero(size_t g) const {
    if (!source.part->zero) return static_cast<uint8_t>(1 << (shape.bits - 1));
    return source.part->zero[source.row * source.part->scales + scale_index(g)];
  }
  void codes(uint8_t* out) const {
    unpack_row(source.part->codes + source.row * source.part->row_bytes, source.part->bits, shape.inputs, out);
    if (const int up = shift())
      for (size_t k = 0; k < shape.inputs; ++k) out[k] = static_cast<uint8_t>(out[k] + up);
    for (size_t k = shape.inputs; k < padded_inputs(shape); ++k) out[k] = zero(k / shape.group);
  }
};

void interleave(const Shape& shape, const uint8_t* codes, size_t j, uint8_t* block) {
  const size_t padded = padded_inputs(shape);
  if (shape.bits == 8) {
    for (size_t k = 0; k < padded; k += 4) std::copy(codes + k, codes + k + 4, block + k / 4 * kLine + 4 * j);
    return;
  }
  for (size_t k = 0; k < padded; k += 8)
    for (size_t i = 0; i < 4; ++i) block[k / 8 * kLine + 4 * j + i] = static_cast<uint8_t>(codes[k + i] | codes[k + i + 4] << 4);
}

// Four nibbles, lowest first, to four bytes.
uint32_t spread(uint32_t nibbles) {
  nibbles = (nibbles | nibbles << 8) & 0x00ff00ff;
  return (nibbles | nibbles << 4) & 0x0f0f0f0f;
}

// Whether each line of the block is made of 32-bit words of the file, one a lane: four bits, no padding, all rows there.
bool is_plain(const Shape& shape, const std::vector<Rows>& parts, size_t block) {
  if (shape.bits != 4 || padded_inputs(shape) != shape.inputs || (block + 1) * kBlock > shape.rows) return false;
  for (const Rows& part : parts)
    if (part.bits != 4) return false;
  return true;
}

void interleave_plain(const Shape& shape, const std::vector<Rows>& parts, size_t block, uint8_t* to) {
  const uint8_t* rows[kBlock];
  for (size_t j = 0; j < kBlock; ++j) {
    const Source source = find(parts, block * kBlock + j);
    rows[j] = source.part->codes + source.row * source.part->row_bytes;
  }
  for (size_t at = 0; at < shape.inputs / 2; at += 4, to += kLine) {
    uint32_t words[kBlock];
    for (size_t j = 0; j < kBlock; ++j) std::memcpy(words + j, rows[j] + at, 4);
    for (size_t j = 0; j < kBlock; ++j) words[j] = spread(words[j] & 0xffff) | spread(words[j] >> 16) << 4;
    std::memcpy(to, words, kLine);
  }
}

void pack_block(const Shape& shape, const std::vector<Rows>& parts, int exponent, size_t block, uint8_t* memory) {
  const PackedBytes bytes = packed_bytes(shape);
  const size_t padded = padded_inputs(shape), count = padded / shape.group;
  uint8_t* codes = memory + block * padded * kBlock * static_cast<size_t>(shape.bits) / 8;
  uint16_t* scale = reinterpret_cast<uint16_t*>(memory + bytes.codes) + block * count * kBlock;
  uint8_t* zero = memory + bytes.codes + bytes.scale + block * count * kBlock;
  std::vector<uint8_t> row(padded);
  const bool plain = is_plain(shape, parts, block);
  if (plain) interleave_plain(shape, parts, block, codes);
  for (size_t j = 0; j < kBlock; ++j) {
    const Lane lane{shape, find(parts, block * kBlock + j)};
    // An output beyond N has scale 0; its codes are as good as any, zero by convention.
    if (!lane.source.part) std::fill(row.begin(), row.end(), static_cast<uint8_t>(shape.symmetric ? 1 << (shape.bits - 1) : 0));
    else if (!plain) lane.codes(row.data());
    if (!plain) interleave(shape, row.data(), j, codes);
    for (size_t g = 0; g < count && lane.source.part; ++g) {
      scale[g * kBlock + j] = float_to_half(std::ldexp(lane.scale(g), -exponent));
      if (!shape.symmetric) zero[g * kBlock + j] = lane.zero(g);
    }
  }
}

// One group to codes around 128; returns the fp16 scale.
uint16_t round_group(const float* values, size_t count, uint8_t* codes) {
  float largest = 0;
  for (size_t k = 0; k < count; ++k) largest = std::max(largest, std::fabs(values[k]));
  const uint16_t stored = float_to_half(largest / 127);
  const float scale = half_to_float(stored), inverse = scale > 0 ? 1 / scale : 0;
  for (size_t k = 0; k < count; ++k) {
    const float code = values[k] * inverse + 128.5f;  // to nearest; all positive
    codes[k] = static_cast<uint8_t>(std::min(std::max(code, 0.0f), 255.0f));
  }
  return stored;
}

bool all_exact(const std::vector<Rows>& parts, int exponent) {
  for (const Rows& part : parts)
    for (size_t i = 0; i < part.rows * part.scales; ++i) {
      const float value = std::ldexp(part.scale[i], -exponent);
      if (half_to_float(float_to_half(value)) != value) return false;
    }
  return true;
}

}  // namespace

PackedBytes packed_bytes(const Shape& shape) {
  const size_t count = (shape.rows + kBlock - 1) / kBlock, padded = padded_inputs(shape), scales = count * kBlock * (padded / shape.group);
  return {count * kBlock * padded * static_cast<size_t>(shape.bits) / 8, aligned(scales * 2), shape.symmetric ? 0 : aligned(scales)};
}

Weights packed_view(const Shape& shape, const uint8_t* memory, int exponent) {
  const PackedBytes bytes = packed_bytes(shape);
  Weights view{};
  view.codes = memory;
  view.scale = reinterpret_cast<const uint16_t*>(memory + bytes.codes);
  view.zero = shape.symmetric ? nullptr : memory + bytes.codes + bytes.scale;
  view.rows = shape.rows;
  view.inputs = shape.inputs;
  view.padded = padded_inputs(shape);
  view.group = shape.group;
  view.bits = shape.bits;
  view.exponent = exponent;
  return view;
}

void pack(Pool& pool, const Shape& shape, const std::vector<Rows>& parts, int exponent, uint8_t* memory) {
  pool.run((shape.rows + kBlock - 1) / kBlock, [&](size_t block, int) { pack_block(shape, parts, exponent, block, memory); });
}

bool scale_exponent(const std::vector<Rows>& parts, int& exponent) {
  exponent = 0;
  if (all_exact(parts, exponent)) return true;
  float largest = 0;
  for (const Rows& part : parts)
    for (size_t i = 0; i < part.rows * part.scales; ++i) largest = std::max(largest, std::fabs(part.scale[i]));
  if (!std::isfinite(largest) || largest == 0) return false;
  exponent = std::ilogb(largest) - 14;  // the largest just fits, so that the smallest has the most room
  return all_exact(parts, exponent);
}

void pack_rounded(Pool& pool, const Shape& shape, const Ops& ops, Float type, const void* rows, uint8_t* memory) {
  const PackedBytes bytes = packed_bytes(shape);
  const size_t padded = padded_inputs(shape), count = padded / shape.group, item = float_bytes(type);
  pool.run((shape.rows + kBlock - 1) / kBlock, [&](size_t block, int) {
    uint16_t* scale = reinterpret_cast<uint16_t*>(memory + bytes.codes) + block * count * kBlock;
    std::vector<float> row(padded, 0.0f);
    std::vector<uint8_t> codes(padded, 128);
    for (size_t j = 0; j < kBlock; ++j) {
      const size_t n = block * kBlock + j;
      if (n < shape.rows) ops.to_float(type, static_cast<const uint8_t*>(rows) + n * shape.inputs * item, shape.inputs, row.data());
      else std::fill(row.begin(), row.end(), 0.0f);
      for (size_t g = 0; g < count; ++g) scale[g * kBlock + j] = round_group(row.data() + g * shape.group, shape.group, codes.data() + g * shape.group);
      interleave(shape, codes.data(), j, memory + block * padded * kBlock);
    }
  });
}

}  // namespace qhub
