#include "linear.h"

#include <algorithm>
#include <cmath>

#include "memory.h"

namespace qhub {
namespace {

// Tiles of one product: rows vary fastest, so that a thread's weights stay in its cache while the rows go by.
struct Grid {
  size_t rows, blocks, row_step, block_step;

  size_t row_tiles() const { return (rows + row_step - 1) / row_step; }
  size_t count() const { return row_tiles() * ((blocks + block_step - 1) / block_step); }
  Tile tile(size_t chunk, float* y, size_t stride) const {
    const size_t row = chunk % row_tiles() * row_step, block = chunk / row_tiles() * block_step;
    return {row, std::min(row + row_step, rows), block, std::min(block + block_step, blocks), y, stride};
  }
};

// Eight chunks a thread: enough that one which is held up does not hold up the rest. Pairs of blocks stay together.
size_t share(size_t blocks, int threads) {
  const size_t even = blocks / (8 * static_cast<size_t>(threads)) & ~size_t{1};
  return std::max<size_t>(even, 2);
}

Grid grid(const Plan& plan, size_t m, size_t blocks, int threads) {
  return {m, blocks, std::min(plan.rows, m), plan.blocks ? plan.blocks : share(blocks, threads)};
}

}  // namespace

void Linear::multiply(const Engine& engine, Scratch& scratch, const float* x, size_t m, float* y, size_t stride) const {
  if (!packed_) multiply_dense(engine, x, m, y, stride);
  else if (engine.exact) multiply_exact(engine, scratch, x, m, y, stride);
  else multiply_packed(engine, scratch, x, m, y, stride);
  if (bias.empty()) return;
  for (size_t row = 0; row < m; ++row) engine.ops->add(bias.data(), bias.size(), y + row * stride);
}

void Linear::multiply_packed(const Engine& engine, Scratch& scratch, const float* x, size_t m, float* y, size_t stride) const {
  const Plan& plan = plans[bucket(m)];
  const Kernel& kernel = plan.kernel ? *plan.kernel : *engine.kernel;
  const size_t per_row = groups(weights_);
  int8_t* q = grown(scratch.q, m * weights_.padded);
  float* scale = grown(scratch.scale, m * per_row);
  int32_t* sum = grown(scratch.sum, m * per_row);
  const size_t panel = kernel.panel_bytes(weights_);
  uint8_t* panels = grown(scratch.panels, panel * static_cast<size_t>(engine.pool->threads()) + kLine);
  panels += (kLine - reinterpret_cast<uintptr_t>(panels) % kLine) % kLine;
  const float factor = std::ldexp(1.0f, weights_.exponent);
  engine.pool->run_rows(m, [&](size_t row) {
    kernel.quantize(x + row * weights_.inputs, weights_, factor, q + row * weights_.padded, scale + row * per_row, sum + row * per_row);
  });
  const Quantized rows{q, scale, sum, m};
  const Grid tiles = grid(plan, m, blocks(weights_), engine.pool->threads());
  engine.pool->run(tiles.count(), [&](size_t chunk, int thread) {
    kernel.multiply(weights_, rows, tiles.tile(chunk, y, stride), panels + panel * static_cast<size_t>(thread));
  });
}

void Linear::multiply_exact(const Engine& engine, Scratch& scratch, const float* x, size_t m, float* y, size_t stride) const {
  if (weights_.padded != weights_.inputs) {
    scratch.x.assign(m * weights_.padded, 0.0f);
    for (size_t row = 0; row < m; ++row) std::copy_n(x + row * weights_.inputs, weights_.inputs, scratch.x.data() + row * weights_.padded);
    x = scratch.x.data();
  }
  const Grid tiles = grid(plans[bucket(m)], m, blocks(weights_), engine.pool->threads());
  engine.pool->run(tiles.count(), [&](size_t chunk, int) { engine.kernel->multiply_exact(weights_, x, tiles.tile(chunk, y, stride)); });
}

void Linear::multiply_dense(const Engine& engine, const float* x, size_t m, float* y, size_t stride) const {
  constexpr size_t kOutputs = 64;
  engine.pool->run((rows_ + kOutputs - 1) / kOutputs, [&](size_t chunk, int) {
    engine.ops->dense(type_, data_, x, m, inputs_, chunk * kOutputs, std::min(rows_, (chunk + 1) * kOutputs), y, stride);
  });
}

size_t Stack::rows() const {
  size_t total = 0;
  for (const auto& part : parts) total += part->rows();
  return total;
}

void Stack::multiply(const Engine& engine, Scratch& scratch, const float* x, size_t m, float* y) const {
  const size_t stride = rows();
  for (const auto& part : parts) {
    part->multiply(engine, scratch, x, m, y, stride);
    y += part->rows();
  }
}

}  // namespace qhub
