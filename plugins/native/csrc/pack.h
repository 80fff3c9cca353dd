// From codes, scales and zeros in rows, as a file holds them, to the blocks of gemm.h.
#pragma once

#include <cstdint>
#include <vector>

#include "gemm.h"
#include "ops.h"
#include "pool.h"

namespace qhub {

struct Shape {
  size_t rows, inputs, group;  // N, K, and 32, 64 or 128
  int bits;                    // 4 or 8
  bool symmetric;
};

inline size_t padded_inputs(const Shape& shape) { return (shape.inputs + shape.group - 1) / shape.group * shape.group; }

// Bytes of the three areas of a packed matrix, in the order codes, scale, zero; each begins 64-byte aligned.
struct PackedBytes {
  size_t codes, scale, zero;
  size_t total() const { return codes + scale + zero; }
};

PackedBytes packed_bytes(const Shape& shape);

// A view of the packed matrix at `memory`: packed_bytes(shape).total() bytes, 64-byte aligned.
Weights packed_view(const Shape& shape, const uint8_t* memory, int exponent);

// Some rows of a matrix. Codes are a dense little-endian stream of `bits` along each row, lowest bits first (compressed-tensors).
struct Rows {
  const uint8_t* codes;  // [rows][row_bytes]
  size_t row_bytes;
  int bits;             // 2 … 8, at most the shape's
  const float* scale;   // [rows][scales]
  const uint8_t* zero;  // [rows][scales]; null: symmetric, 2^(bits − 1)
  size_t scales;        // per row
  size_t every;         // inputs that share a scale: a multiple of the shape's group, or at least K
  size_t rows;
};

// Packs the parts, one below the other, into zeroed `memory`. The scales must be exact at `exponent`.
void pack(Pool& pool, const Shape& shape, const std::vector<Rows>& parts, int exponent, uint8_t* memory);

// Rounds float rows [N][K] to 8 bits, symmetric, by group (largest magnitude → 127), into zeroed `memory`; the exponent is 0.
void pack_rounded(Pool& pool, const Shape& shape, const Ops& ops, Float type, const void* rows, uint8_t* memory);

// The exponent e for which every scale · 2^−e is exact in fp16; false if there is none.
bool scale_exponent(const std::vector<Rows>& parts, int& exponent);

}  // namespace qhub
