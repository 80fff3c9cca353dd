// Matrix products with quantized weights: the layout of the operands, and what a kernel is.
//
//     y[m, n] = sum over k of x[m, k] · (codes[n, k] − zero[n, g]) · scale[n, g]        g = k / group
//
// Weights, N outputs × K inputs, lie in blocks of kBlock = 16 outputs; K is padded to a multiple of the group, N to one of 16.
// Padding has code = zero, so it adds nothing. Within block b:
//   4 bits: for every 8 inputs one line of 64 bytes: byte 4·j + i holds output 16·b + j; its low nibble is input i, its high nibble
//           input i + 4. After `line & 0x0f` and `(line >> 4) & 0x0f` each 32-bit lane holds four successive inputs of one
//           output: what `vpdpbusd` and `sdot` multiply, and two rows of an AMX tile.
//   8 bits: for every 4 inputs one line of 64 bytes: byte 4·j + i holds output 16·b + j, input i.
//   scale   fp16 [b][g][16]; multiplied by 2^exponent it is the stored scale, exactly.
//   zero    uint8 [b][g][16]; absent (null) where it is 2^(bits − 1) everywhere.
// One layout serves every instruction set, so a packed file can move between machines.
//
// Activations of the fast path are int8, quantized per row and group: x[m, k] ≈ q[m, k] · scale[m, g], q in −127 … 127, rounded half
// to even; every kernel finds the same bits. A group whose largest magnitude is below kSmallest has q = 0; one with an infinite
// value or a NaN has q = 0 and a scale that is not finite, so that y is not finite either.
// Everything is little-endian, 64-byte aligned, and owned by the caller; no kernel allocates.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qhub {

constexpr size_t kBlock = 16;  // outputs per block
constexpr size_t kLine = 64;   // bytes per line of codes

constexpr float kSmallest = 0x1p-118f;  // 127 / kSmallest is still a finite float32

// What x is multiplied by to become q.
inline float inverse_step(float largest) { return largest >= kSmallest && largest < __builtin_inff() ? 127.0f / largest : 0.0f; }

struct Cpu;

// A packed matrix. `rows` and `inputs` are the true N and K; `padded` is K rounded up to the group.
struct Weights {
  const uint8_t* codes;
  const uint16_t* scale;  // fp16 bits
  const uint8_t* zero;    // null: symmetric
  size_t rows, inputs, padded, group;
  int bits;      // 4 or 8
  int exponent;  // stored scale = fp16 scale · 2^exponent
};

inline size_t groups(const Weights& w) { return w.padded / w.group; }
inline size_t blocks(const Weights& w) { return (w.rows + kBlock - 1) / kBlock; }
inline size_t block_bytes(const Weights& w) { return w.padded * kBlock * static_cast<size_t>(w.bits) / 8; }

// M rows of quantized activations. q is [m][padded]; scale and sum are [m][groups]. sum[m, g] is Σ q over the group.
// scale already carries 2^exponent of the weights it is meant for.
struct Quantized {
  const int8_t* q;
  const float* scale;
  const int32_t* sum;
  size_t rows;
};

// The part of y that one call computes: rows [row, row_end) × blocks [block, block_end). y is [M][stride] float32.
struct Tile {
  size_t row, row_end, block, block_end;
  float* y;
  size_t stride;
};

// One instruction set. Every function is thread-safe and writes only inside its tile (never the padding of y).
struct Kernel {
  const char* name;
  bool (*runs)(const Cpu&);
  // One row x[0 … inputs) → q, scale, sum; inputs … padded become zeros. `factor` multiplies the scales.
  void (*quantize)(const float* x, const Weights& w, float factor, int8_t* q, float* scale, int32_t* sum);
  // The fast path. `panel` is scratch of `panel_bytes` for this thread.
  void (*multiply)(const Weights& w, const Quantized& x, const Tile& tile, uint8_t* panel);
  // The exact path: x is [M][padded] float32, zeros beyond `inputs`.
  void (*multiply_exact)(const Weights& w, const float* x, const Tile& tile);
  size_t (*panel_bytes)(const Weights& w);
  // Runs its multiply instruction `steps` times some, from registers; returns the int8 operations (a product and its sum are two).
  // Null: nobody wrote that down.
  uint64_t (*spin)(size_t steps) = nullptr;
};

}  // namespace qhub
