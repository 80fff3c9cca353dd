// A linear layer: quantized (packed blocks) or float (rows of the file as they are), with an optional bias.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "gemm.h"
#include "ops.h"
#include "pack.h"
#include "pool.h"

namespace qhub {

// How a product is divided among threads, and by which kernel it is done.
struct Plan {
  const Kernel* kernel = nullptr;  // null: the engine's
  size_t rows = 96;                // of activations per tile
  size_t blocks = 0;               // of outputs per tile; 0: an eighth of a thread's share
};

// Products of a like number of rows share a plan: 1, 2 … 4, 5 … 8, 9 … 64, more.
constexpr size_t kBuckets = 5;
inline size_t bucket(size_t m) { return m <= 1 ? 0 : m <= 4 ? 1 : m <= 8 ? 2 : m <= 64 ? 3 : 4; }

// What carries out products: chosen once per session.
struct Engine {
  Pool* pool;
  const Kernel* kernel;
  const Ops* ops;
  bool exact;
};

// Scratch memory that the products of one session share; grows to what the largest needs.
struct Scratch {
  std::vector<int8_t> q;
  std::vector<float> scale, x;
  std::vector<int32_t> sum;
  std::vector<uint8_t> panels;
};

class Linear {
 public:
  // Bytes belong to whoever made the view and must outlive it.
  static Linear quantized(const Weights& weights) { return Linear(weights); }
  static Linear dense(Float type, const void* data, size_t rows, size_t inputs) { return Linear(type, data, rows, inputs); }

  size_t rows() const { return packed_ ? weights_.rows : rows_; }
  size_t inputs() const { return packed_ ? weights_.inputs : inputs_; }
  bool is_packed() const { return packed_; }

  // y[m, n] = Σ x[m, k] W[n, k] + bias[n]; x (M, inputs), y (M, stride), rows n < rows().
  void multiply(const Engine& engine, Scratch& scratch, const float* x, size_t m, float* y, size_t stride) const;

  std::vector<float> bias;
  Plan plans[kBuckets];

 private:
  explicit Linear(const Weights& weights) : packed_(true), weights_(weights) {}
  Linear(Float type, const void* data, size_t rows, size_t inputs) : type_(type), data_(data), rows_(rows), inputs_(inputs) {}

  void multiply_packed(const Engine& engine, Scratch& scratch, const float* x, size_t m, float* y, size_t stride) const;
  void multiply_exact(const Engine& engine, Scratch& scratch, const float* x, size_t m, float* y, size_t stride) const;
  void multiply_dense(const Engine& engine, const float* x, size_t m, float* y, size_t stride) const;

  bool packed_ = false;
  Weights weights_{};
  Float type_ = Float::f32;
  const void* data_ = nullptr;
  size_t rows_ = 0, inputs_ = 0;
};

// Layers that read the same input, their outputs side by side: one product where their schemes agree.
struct Stack {
  std::vector<std::shared_ptr<Linear>> parts;

  size_t rows() const;
  size_t inputs() const { return parts.empty() ? 0 : parts.front()->inputs(); }
  // y (M, rows()).
  void multiply(const Engine& engine, Scratch& scratch, const float* x, size_t m, float* y) const;
};

}  // namespace qhub
