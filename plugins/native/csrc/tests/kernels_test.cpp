// Every kernel against float64, over a grid of shapes: kernels_test [--quick] [--list | NAME…]. Without a name: all that run here.
//
// Prints a line per failure and a summary per kernel; exits with 1 if anything failed.
#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "../kernels.h"
#include "problem.h"
#if defined(__x86_64__)
#define QHUB_EMULATE_TILES  // the AMX kernel once more, for processors without tiles
#include "../kernels/x86_amx_int8.cpp"
#endif

namespace qhub::test {
namespace {

const float kGuard = -7.25e22f;
constexpr size_t kMaxFailures = 20;  // printed per kernel

struct Grid {
  std::vector<size_t> inputs, outputs, rows, groups;
  size_t many;  // rows, of one case: more than any kernel takes at once
};

const Grid kFull{{32, 64, 100, 128, 344, 2048}, {1, 15, 16, 17, 40, 176}, {1, 2, 3, 5, 8, 12, 13, 16, 17, 33, 65}, {32, 64, 128}, 530};
const Grid kQuick{{32, 100, 344}, {1, 16, 40}, {1, 2, 3, 5, 8, 13, 33}, {32, 64, 128}, 50};  // for emulators

// What is being tested, and what came of it.
struct Run {
  const Kernel& kernel;
  std::string place;
  size_t cases = 0, failures = 0;

  void check(bool holds, const std::string& what) {
    if (holds) return;
    if (++failures <= kMaxFailures) std::printf("kernel %s: %s: %s\n", kernel.name, place.c_str(), what.c_str());
  }
};

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.9g", value);
  return text;
}

Activations quantized(const Problem& p, const Kernel& kernel) {
  Activations a(p);
  const Weights w = p.weights();
  for (size_t row = 0; row < p.rows; ++row) {
    Buffer<float> x(w.inputs);  // not the padding: quantize may not read it
    std::memcpy(x.data(), p.x.data() + row * p.padded, w.inputs * sizeof(float));
    const size_t at = row * p.groups;
    kernel.quantize(x.data(), w, std::ldexp(1.0f, w.exponent), a.q.data() + row * p.padded, a.scale.data() + at, a.sum.data() + at);
  }
  return a;
}

template <class T>
bool same(const Buffer<T>& a, const Buffer<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// The reference's quantization from first principles: within half a step of x, sums right, padding zero.
void check_quantize(Run& run, const Problem& p, const Activations& a) {
  const double factor = std::ldexp(1.0, p.shape.exponent);
  for (size_t row = 0; row < p.rows; ++row)
    for (size_t g = 0; g < p.groups; ++g) {
      const double step = static_cast<double>(a.scale[row * p.groups + g]) / factor;
      int32_t sum = 0;
      bool near = true;
      for (size_t k = row * p.padded + g * p.shape.group; k < row * p.padded + (g + 1) * p.shape.group; ++k) {
        sum += a.q[k];
        const bool padding = k % p.padded >= p.shape.inputs;
        const double error = std::fabs(static_cast<double>(p.x[k]) - a.q[k] * step);
        near = near && (padding ? a.q[k] == 0 : error <= step * 0.50002 + static_cast<double>(kSmallest)) && a.q[k] >= -127;
      }
      run.check(near, "quantize: row " + std::to_string(row) + " group " + std::to_string(g) + " is not within half a step of x");
      run.check(sum == a.sum[row * p.groups + g], "quantize: wrong sum in row " + std::to_string(row));
    }
}

void check_tile(Run& run, const Problem& p, const Tile& tile, const Buffer<float>& y, const Expected& expected, const char* path) {
  size_t worst = 0;
  double excess = 0;
  bool guards = true;
  const size_t rows = y.size() / tile.stride;
  for (size_t row = 0; row < rows; ++row)
    for (size_t n = 0; n < tile.stride; ++n) {
      const float value = y[row * tile.stride + n];
      const bool column = n >= tile.block * kBlock && n < std::min(tile.block_end * kBlock, p.shape.outputs);
      if (!column || row < tile.row || row >= tile.row_end) {
        guards = guards && value == kGuard;
        continue;
      }
      const size_t at = row * p.shape.outputs + n;
      const double over = std::fabs(static_cast<double>(value) - expected.y[at]) - expected.bound[at];
      if (!(over <= excess)) excess = over, worst = at;  // a NaN is no small error
    }
  const std::string where = std::string(path) + " rows " + std::to_string(tile.row) + ":" + std::to_string(tile.row_end) + " of " +
                            std::to_string(rows) + ", blocks " + std::to_string(tile.block) + ":" + std::to_string(tile.block_end);
  run.check(guards, where + " wrote outside its tile");
  const size_t row = worst / p.shape.outputs, n = worst % p.shape.outputs;
  run.check(excess <= 0, where + " y[" + std::to_string(row) + ", " + std::to_string(n) + "] = " +
                             number(static_cast<double>(y[row * tile.stride + n])) + ", expected " + number(expected.y[worst]) + " ± " +
                             number(expected.bound[worst]));
}

struct Operands {
  const Problem& problem;
  const Activations& activations;
  const Expected& fast;
  const Expected& exact;
};

void run_tile(Run& run, const Operands& o, size_t rows, Tile tile) {
  const Problem& p = o.problem;
  const Weights w = p.weights();
  Buffer<float> y(rows * tile.stride);
  Buffer<uint8_t> panel(run.kernel.panel_bytes(w));
  tile.y = y.data();
  std::fill(y.data(), y.data() + y.size(), kGuard);
  run.kernel.multiply(w, {o.activations.q.data(), o.activations.scale.data(), o.activations.sum.data(), rows}, tile, panel.data());
  check_tile(run, p, tile, y, o.fast, "multiply");
  std::fill(y.data(), y.data() + y.size(), kGuard);
  run.kernel.multiply_exact(w, p.x.data(), tile);
  check_tile(run, p, tile, y, o.exact, "multiply_exact");
  ++run.cases;
}

// The whole product and tiles that leave out rows and blocks on each side.
void run_tiles(Run& run, const Operands& o, size_t rows) {
  const size_t blocks = o.problem.blocks, stride = o.problem.shape.outputs + rows % 5;
  run_tile(run, o, rows, {0, rows, 0, blocks, nullptr, stride});
  if (rows < 3 || blocks < 2) return;
  run_tile(run, o, rows, {1, rows - 1, blocks / 2, blocks, nullptr, stride});
  run_tile(run, o, rows, {rows / 2, rows, 0, (blocks + 1) / 2, nullptr, stride});
}

void run_case(std::vector<Run>& runs, const Case& shape, const Grid& grid) {
  const Problem problem = make_problem(shape, grid.rows.back());
  const Activations activations = quantized(problem, scalar);
  const Expected fast = expect_fast(problem, activations), exact = expect_exact(problem);
  const Operands operands{problem, activations, fast, exact};
  for (Run& run : runs) {
    run.place = name_of(shape);
    const Activations own = quantized(problem, run.kernel);
    if (&run.kernel == &scalar) check_quantize(run, problem, own);
    run.check(same(own.q, activations.q), "quantize: q is not the reference's");
    run.check(same(own.sum, activations.sum), "quantize: sum is not the reference's");
    run.check(same(own.scale, activations.scale), "quantize: scale is not the reference's");
    for (size_t rows : grid.rows)
      if (rows <= 3 || &run.kernel != &scalar) run_tiles(run, operands, rows);  // the reference treats each row alike, and is slow
  }
}

void run_grid(std::vector<Run>& runs, const Grid& grid) {
  for (size_t inputs : grid.inputs)
    for (size_t outputs : grid.outputs)
      for (size_t group : grid.groups)
        for (int bits : {4, 8})
          for (bool symmetric : {true, false})
            run_case(runs, {inputs, outputs, group, bits, symmetric, symmetric ? 0 : -9, Values::random}, grid);
  run_case(runs, {100, 24, 32, 4, false, 0, Values::random}, {{}, {}, {grid.many}, {}, 0});
  for (Values values : {Values::zeros, Values::saturating, Values::vanishing, Values::tiny, Values::huge})
    for (size_t group : grid.groups)
      for (int bits : {4, 8})
        for (bool symmetric : {true, false}) run_case(runs, {344, 40, group, bits, symmetric, 3, values}, grid);
}

// One value that is not finite: its group is silent, its row of y is not finite, other rows are as they were.
void check_not_finite(Run& run, float value) {
  run.place = "x holds " + number(static_cast<double>(value));
  Problem p = make_problem({128, 40, 32, 4, false, 0, Values::random}, 3);
  p.x[p.padded + 40] = value;
  const Activations a = quantized(p, run.kernel);
  const Weights w = p.weights();
  Buffer<float> y(p.rows * w.rows);
  Buffer<uint8_t> panel(run.kernel.panel_bytes(w));
  run.kernel.multiply(w, {a.q.data(), a.scale.data(), a.sum.data(), p.rows}, {0, p.rows, 0, p.blocks, y.data(), w.rows}, panel.data());
  for (size_t k = 32; k < 64; ++k) run.check(a.q[p.padded + k] == 0, "quantize: q of its group is not 0");
  for (size_t at = 0; at < y.size(); ++at) run.check(std::isfinite(y[at]) == (at / w.rows != 1), "multiply: y[" + std::to_string(at) + "]");
}

std::vector<const Kernel*> available() {
  std::vector<const Kernel*> found;
  for (const Kernel* const* kernel = kKernels; *kernel; ++kernel)
    if ((*kernel)->runs(cpu())) found.push_back(*kernel);
#if defined(__x86_64__)
  if (x86_amx_int8_emulated.runs(cpu())) found.insert(found.begin(), &x86_amx_int8_emulated);
#endif
  return found;
}

// The kernels of those names, or all; exits where one does not run here.
std::vector<Run> chosen(const std::vector<std::string>& names) {
  std::vector<Run> runs;
  const std::vector<const Kernel*> kernels = available();
  for (const Kernel* kernel : kernels)
    if (names.empty() || std::find(names.begin(), names.end(), kernel->name) != names.end()) runs.push_back({*kernel, {}});
  if (!names.empty() && runs.size() != names.size()) {
    std::fprintf(stderr, "error: not every named kernel runs here; --list names those that do\n");
    std::exit(2);
  }
  return runs;
}

int report(const std::vector<Run>& runs) {
  bool failed = false;
  for (const Run& run : runs) {
    std::printf("kernel %s: %zu cases %s\n", run.kernel.name, run.cases, run.failures ? "FAILED" : "ok");
    failed = failed || run.failures;
  }
  return failed;
}

}  // namespace
}  // namespace qhub::test

int main(int count, char** arguments) {
  using namespace qhub::test;
  std::vector<std::string> names;
  bool quick = false;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "--quick") quick = true;
    else if (argument != "--list") names.push_back(argument);
    else {
      for (const qhub::Kernel* kernel : available()) std::puts(kernel->name);
      return 0;
    }
  }
  std::vector<Run> runs = chosen(names);
  run_grid(runs, quick ? kQuick : kFull);
  for (Run& run : runs)
    for (float value : {INFINITY, -INFINITY, NAN}) check_not_finite(run, value);
  return report(runs);
}
