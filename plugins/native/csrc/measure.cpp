#include "measure.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "memory.h"

namespace qhub {
namespace {

using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

}  // namespace

double read_bandwidth(Pool& pool, const Ops& ops, size_t bytes, double seconds) {
  const Memory memory(bytes);
  std::fill_n(memory.as<float>(), bytes / sizeof(float), 1.0f);
  constexpr size_t kPiece = size_t{1} << 20;
  double best = 0;
  std::vector<float> sums(bytes / kPiece);  // kept, so that nothing is left out
  for (const auto start = Clock::now(); since(start) < seconds;) {
    const auto begin = Clock::now();
    pool.run(bytes / kPiece, [&](size_t piece, int) { sums[piece] = ops.sum(memory.as<float>() + piece * kPiece / sizeof(float), kPiece / sizeof(float)); });
    best = std::max(best, static_cast<double>(bytes) / since(begin));
  }
  return best;
}

double peak_operations(Pool& pool, const Kernel& kernel, double seconds) {
  if (!kernel.spin) return 0;
  constexpr size_t kSteps = 20000;
  const size_t parts = 8 * static_cast<size_t>(pool.threads());
  double best = 0;
  for (const auto start = Clock::now(); since(start) < seconds;) {
    std::atomic<uint64_t> operations{0};
    const auto begin = Clock::now();
    pool.run(parts, [&](size_t, int) { operations += kernel.spin(kSteps); });
    best = std::max(best, static_cast<double>(operations) / since(begin));
  }
  return best;
}

std::vector<double> time_plan(const Engine& engine, const std::vector<std::shared_ptr<Linear>>& alike, size_t m, const Plan& plan, double seconds) {
  std::vector<float> x(m * alike.front()->inputs()), y(m * alike.front()->rows());
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 97) - 48.0f;
  Scratch scratch;
  std::vector<double> times;
  const auto start = Clock::now();
  for (size_t i = 0; times.size() < 4 || since(start) < seconds; ++i) {
    Linear linear = *alike[i % alike.size()];
    std::fill(std::begin(linear.plans), std::end(linear.plans), plan);
    const auto begin = Clock::now();
    linear.multiply(engine, scratch, x.data(), m, y.data(), linear.rows());
    if (i) times.push_back(since(begin));  // the first one finds its scratch
  }
  return times;
}

}  // namespace qhub
