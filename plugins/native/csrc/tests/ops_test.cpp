// Every set of vector operations against float64: ops_test [--list | NAME…]. Without a name: all that run here.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../half.h"
#include "../memory.h"
#include "../ops.h"

namespace qhub::test {
namespace {

const char* const kNames[] = {"avx512", "avx2", "neon", "scalar"};

struct Run {
  const Ops& ops;
  std::mt19937 random{7};
  size_t cases = 0, failures = 0;

  std::vector<float> draw(size_t count, float spread = 1) {
    std::normal_distribution<float> normal(0, spread);
    std::vector<float> values(count);
    for (float& value : values) value = normal(random);
    return values;
  }
  void near(const std::string& what, double found, double wanted, double bound) {
    ++cases;
    if (std::fabs(found - wanted) <= bound) return;  // false for NaN, too
    if (++failures <= 20) std::printf("ops %s: %s: %.9g instead of %.9g\n", ops.name, what.c_str(), found, wanted);
  }
};

void norms(Run& run) {
  for (size_t n : {1, 7, 16, 64, 100, 2048}) {
    const std::vector<float> x = run.draw(n), weight = run.draw(n);
    std::vector<float> y(n);
    run.ops.rms_norm(x.data(), weight.data(), 1e-5f, n, y.data());
    double squares = 0;
    for (float value : x) squares += static_cast<double>(value) * value;
    for (size_t i = 0; i < n; ++i) {
      const double wanted = x[i] / std::sqrt(squares / static_cast<double>(n) + 1e-5) * weight[i];
      run.near("rms_norm of " + std::to_string(n), y[i], wanted, 1e-5 * std::fabs(wanted) + 1e-7);
    }
  }
}

double gated(Gate kind, double x) {
  if (kind == Gate::silu) return x / (1 + std::exp(-x));
  if (kind == Gate::gelu) return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

void gates(Run& run) {
  for (Gate kind : {Gate::silu, Gate::gelu_tanh, Gate::gelu})
    for (size_t n : {1, 16, 37, 256}) {
      std::vector<float> a = run.draw(n, 8);
      const std::vector<float> b = run.draw(n);
      a[0] = n > 1 ? -200.0f : 200.0f;  // beyond what exp can hold
      std::vector<float> y(n);
      run.ops.gate(kind, a.data(), b.data(), n, y.data());
      for (size_t i = 0; i < n; ++i) run.near("gate", y[i], gated(kind, a[i]) * b[i], 2e-6 * std::fabs(a[i] * b[i]) + 1e-6);
    }
}

void sums(Run& run) {
  for (size_t n : {1, 15, 128, 4096}) {
    const std::vector<float> x = run.draw(n);
    std::vector<float> y = run.draw(n);
    const std::vector<float> before = y;
    run.ops.add(x.data(), n, y.data());
    for (size_t i = 0; i < n; ++i) run.near("add", y[i], static_cast<double>(x[i]) + before[i], 1e-6);
  }
  const std::vector<float> ones(4096, 1.0f);
  run.near("sum", run.ops.sum(ones.data(), ones.size()), 4096, 0);
}

void rotations(Run& run) {
  for (size_t half : {1, 4, 32, 50}) {
    std::vector<float> x = run.draw(2 * half), cosine(half), sine(half);
    const std::vector<float> before = x, angles = run.draw(half, 3);
    for (size_t i = 0; i < half; ++i) cosine[i] = std::cos(angles[i]), sine[i] = std::sin(angles[i]);
    run.ops.rotate(x.data(), cosine.data(), sine.data(), half);
    for (size_t i = 0; i < half; ++i) {
      run.near("rotate", x[i], before[i] * std::cos(static_cast<double>(angles[i])) - before[i + half] * std::sin(static_cast<double>(angles[i])), 1e-5);
      run.near("rotate", x[i + half], before[i + half] * std::cos(static_cast<double>(angles[i])) + before[i] * std::sin(static_cast<double>(angles[i])), 1e-5);
    }
  }
}

// `values` rounded to `type`, as bytes.
std::vector<uint8_t> stored(Float type, std::vector<float>& values) {
  const size_t item = float_bytes(type);
  std::vector<uint8_t> bytes(values.size() * item);
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t narrow = type == Float::f16 ? float_to_half(values[i]) : static_cast<uint16_t>(bits_of_float(values[i]) >> 16);
    if (type != Float::f32) values[i] = type == Float::f16 ? half_to_float(narrow) : bfloat_to_float(narrow);
    std::memcpy(bytes.data() + i * item, type == Float::f32 ? static_cast<const void*>(&values[i]) : &narrow, item);
  }
  return bytes;
}

void dense(Run& run) {
  for (Float type : {Float::f32, Float::f16, Float::bf16})
    for (size_t inputs : {1, 16, 37, 172})
      for (size_t rows : {1, 3, 5}) {
        constexpr size_t kOutputs = 11, kStride = 13;
        std::vector<float> weight = run.draw(kOutputs * inputs);
        const std::vector<float> x = run.draw(rows * inputs);
        const std::vector<uint8_t> bytes = stored(type, weight);
        std::vector<float> y(rows * kStride, 99.0f);
        run.ops.dense(type, bytes.data(), x.data(), rows, inputs, 1, kOutputs, y.data(), kStride);
        for (size_t m = 0; m < rows; ++m)
          for (size_t n = 0; n < kStride; ++n) {
            double wanted = 0, size = 0;
            for (size_t k = 0; k < inputs && n < kOutputs; ++k) wanted += static_cast<double>(x[m * inputs + k]) * weight[n * inputs + k];
            for (size_t k = 0; k < inputs && n < kOutputs; ++k) size += std::fabs(static_cast<double>(x[m * inputs + k]) * weight[n * inputs + k]);
            const bool untouched = n == 0 || n >= kOutputs;
            run.near("dense", y[m * kStride + n], untouched ? 99.0 : wanted, untouched ? 0 : 1e-6 * size);
          }
      }
}

// One head's cache and queries against it.
struct Scene {
  size_t size, positions, rows;
  Kept kept;
  size_t window;
  float softcap;
};

void attention(Run& run, const Scene& scene) {
  const size_t dim = cache_dim(scene.size), capacity = (scene.positions + kScoreBlock - 1) / kScoreBlock * kScoreBlock;
  const Memory keys(capacity * dim * 4, Pages::small), values(capacity * dim * 4, Pages::small);
  std::vector<float> key_scale(capacity), value_scale(capacity);
  const Cache cache{keys.data(), values.data(), key_scale.data(), value_scale.data(), scene.kept, scene.size, dim};
  const std::vector<float> k = run.draw(scene.positions * scene.size), v = run.draw(scene.positions * scene.size);
  for (size_t p = 0; p < scene.positions; ++p) run.ops.store(cache, p, k.data() + p * scene.size, v.data() + p * scene.size);
  const std::vector<float> q = run.draw(scene.rows * scene.size, 2);
  std::vector<float> out(scene.rows * scene.size), scratch(attention_scratch(scene.rows, dim));
  std::vector<const float*> queries;
  std::vector<float*> outs;
  std::vector<size_t> first, last;
  for (size_t r = 0; r < scene.rows; ++r) {
    queries.push_back(q.data() + r * scene.size);
    outs.push_back(out.data() + r * scene.size);
    last.push_back(scene.positions - 1 - (scene.rows - 1 - r) % scene.positions);
    first.push_back(scene.window && last[r] >= scene.window ? last[r] + 1 - scene.window : 0);
  }
  const float scale = 1 / std::sqrt(static_cast<float>(scene.size));
  run.ops.attend(cache, {queries.data(), outs.data(), first.data(), last.data(), scene.rows, scale, scene.softcap, scratch.data()});
  const double bound = scene.kept == Kept::f32 ? 2e-5 : scene.kept == Kept::f16 ? 5e-3 : 8e-2;
  for (size_t r = 0; r < scene.rows; ++r) {
    std::vector<double> weights;
    double total = 0;
    for (size_t p = first[r]; p <= last[r]; ++p) {
      double score = 0;
      for (size_t d = 0; d < scene.size; ++d) score += static_cast<double>(queries[r][d]) * k[p * scene.size + d] * scale;
      if (scene.softcap > 0) score = scene.softcap * std::tanh(score / scene.softcap);
      weights.push_back(std::exp(score));
      total += weights.back();
    }
    for (size_t d = 0; d < scene.size; ++d) {
      double wanted = 0;
      for (size_t p = first[r]; p <= last[r]; ++p) wanted += weights[p - first[r]] / total * v[p * scene.size + d];
      run.near("attend size " + std::to_string(scene.size) + " positions " + std::to_string(scene.positions), outs[r][d], wanted, bound);
    }
  }
}

void attentions(Run& run) {
  for (Kept kept : {Kept::f32, Kept::f16, Kept::i8})
    for (size_t size : {8, 16, 64, 80, 128})
      for (size_t positions : {1, 15, 17, 128, 300})
        for (size_t rows : {1, 4, 9}) attention(run, {size, positions, rows, kept, positions > 20 ? size_t{20} : 0, rows == 4 ? 5.0f : 0.0f});
}

bool tested(const Ops& ops) {
  Run run{ops};
  norms(run);
  gates(run);
  sums(run);
  rotations(run);
  dense(run);
  attentions(run);
  if (run.failures) std::printf("ops %s: %zu of %zu numbers are wrong\n", ops.name, run.failures, run.cases);
  else std::printf("ops %s: %zu numbers ok\n", ops.name, run.cases);
  return !run.failures;
}

int main_of(int count, char** words) {
  bool good = true, any = false;
  for (const char* name : kNames) {
    const Ops* ops = ops_named(name);
    if (!ops || !ops->runs(cpu())) continue;
    bool wanted = count == 1;
    for (int i = 1; i < count; ++i) wanted = wanted || !std::strcmp(words[i], name);
    if (count == 2 && !std::strcmp(words[1], "--list")) {
      std::puts(name);
      any = true;
    } else if (wanted) {
      good = tested(*ops) && good;
      any = true;
    }
  }
  if (!any) std::fputs("none of these runs here; --list names those that do\n", stderr);
  return any ? !good : 2;
}

}  // namespace
}  // namespace qhub::test

int main(int count, char** words) { return qhub::test::main_of(count, words); }
