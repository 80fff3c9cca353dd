// What a decoder does besides products with quantized weights: norms, gates, rotations, products with float weights, attention.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu.h"

namespace qhub {

enum class Float : int { f32, f16, bf16 };
inline size_t float_bytes(Float type) { return type == Float::f32 ? 4 : 2; }
enum class Gate : int { silu, gelu_tanh, gelu };

constexpr size_t kKeyBlock = 16;  // positions per block of keys

// How keys and values are kept: float32 for the exact path, float16, or int8 with a scale for each position.
enum class Kept : int { f32, f16, i8 };

inline size_t kept_bytes(Kept kept) { return kept == Kept::f32 ? 4 : kept == Kept::f16 ? 2 : 1; }

// Keys and values of one layer and one key/value head.
//   keys   [positions / 16][dim][16]: sixteen positions side by side, so that scores need no sums across lanes
//   values [positions][dim]
// Beyond `size` both hold zeros.
struct Cache {
  void* keys;
  void* values;
  float* key_scale;    // [positions]; null unless int8
  float* value_scale;  // likewise
  Kept kept;
  size_t size;  // numbers of a head
  size_t dim;   // the same, rounded up to a multiple of 16
};

inline size_t cache_dim(size_t size) { return (size + 15) / 16 * 16; }

// Rows of queries against one key/value head. Row r is a query at position last[r]: it sees positions first[r] … last[r].
struct Attention {
  const float* const* queries;  // [rows] → size floats
  float* const* out;            // [rows] → size floats
  const size_t* first;
  const size_t* last;
  size_t rows;
  float scale;    // of the scores
  float softcap;  // scores become softcap · tanh(score / softcap); 0: off
  float* scratch; // attention_scratch(rows, dim) floats
};

constexpr size_t kScoreBlock = 128;  // positions whose scores are held at a time
inline size_t attention_scratch(size_t rows, size_t dim) { return rows * (kScoreBlock + 2 * dim + 16); }

// One instruction set; every function is thread-safe.
struct Ops {
  const char* name;
  bool (*runs)(const Cpu&);
  // y = x / sqrt(mean(x²) + eps) · weight; y may be x.
  void (*rms_norm)(const float* x, const float* weight, float eps, size_t n, float* y);
  // out = gate(a) · b; out may be a.
  void (*gate)(Gate kind, const float* a, const float* b, size_t n, float* out);
  void (*add)(const float* x, size_t n, float* y);  // y += x
  // Rotates pairs (x[i], x[i + half]) by the angles whose cosines and sines are given, i < half.
  void (*rotate)(float* x, const float* cosine, const float* sine, size_t half);
  // y[m, n] = Σ x[m, k] · weight[n, k] for n in [first, last); weight [N][inputs] of `type`, x [rows][inputs], y [rows][stride].
  void (*dense)(Float type, const void* weight, const float* x, size_t rows, size_t inputs, size_t first, size_t last, float* y, size_t stride);
  void (*to_float)(Float type, const void* from, size_t n, float* to);
  void (*store)(const Cache& cache, size_t position, const float* key, const float* value);
  void (*attend)(const Cache& cache, const Attention& work);
  float (*sum)(const float* x, size_t n);  // reads as fast as it can: to measure what memory gives
};

// The best that this processor runs.
const Ops& ops(const Cpu& cpu);
// The one named so ("scalar", "avx2", "avx512", "neon"); null if there is none.
const Ops* ops_named(const char* name);

}  // namespace qhub
