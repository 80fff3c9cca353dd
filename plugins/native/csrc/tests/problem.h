// A matrix product of which everything is known: the values it stands for, its packed operands, and what float64 makes of them.
//
// The operands are packed here from the text of gemm.h, not by the code that packs models, and no kernel's code is used.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "../gemm.h"
#include "../half.h"

namespace qhub::test {

// 64-byte aligned and not a byte longer than asked for, so that AddressSanitizer sees the first access beyond.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t count = 0) : count_(count) {
    data_ = static_cast<T*>(::operator new(count ? count * sizeof(T) : 1, std::align_val_t{64}));
    std::memset(static_cast<void*>(data_), 0, count * sizeof(T));
  }
  Buffer(Buffer&& other) noexcept : count_(other.count_), data_(other.data_) {
    other.data_ = nullptr;
    other.count_ = 0;
  }
  Buffer& operator=(Buffer&&) = delete;
  ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }

  T* data() const { return data_; }
  size_t size() const { return count_; }
  T& operator[](size_t index) const { return data_[index]; }

 private:
  size_t count_;
  T* data_;
};

// What the numbers are like.
//   saturating: all codes at their largest and activations of one magnitude, so that sums of products are as large as they get
//   vanishing:  all codes 0, the zero points as large as they get
//   tiny, huge: activations from float32's subnormal numbers, or large enough that their squares overflow
enum class Values { random, zeros, saturating, vanishing, tiny, huge };

struct Case {
  size_t inputs, outputs, group;
  int bits;
  bool symmetric;
  int exponent;
  Values values;
};

inline std::string name_of(const Case& c) {
  static const char* const kValues[] = {"random", "zeros", "saturating", "vanishing", "tiny", "huge"};
  char text[96];
  std::snprintf(text, sizeof text, "K%zu N%zu g%zu w%d %s %s", c.inputs, c.outputs, c.group, c.bits, c.symmetric ? "sym" : "asym",
                kValues[static_cast<int>(c.values)]);
  return text;
}

struct Problem {
  Case shape;
  size_t rows, padded, groups, blocks;
  std::vector<int32_t> weight;  // [outputs][padded]: code less zero, 0 in the padding
  std::vector<double> scale;    // [outputs][groups], with the exponent
  Buffer<uint8_t> codes;        // the operands of gemm.h
  Buffer<uint16_t> halves;
  Buffer<uint8_t> zero;
  Buffer<float> x;  // [rows][padded], zeros beyond `inputs`

  Weights weights() const {
    return {codes.data(), halves.data(),    shape.symmetric ? nullptr : zero.data(), shape.outputs, shape.inputs, padded, shape.group,
            shape.bits,   shape.exponent};
  }
};

class Random {
 public:
  explicit Random(uint32_t seed) : bits_(seed) {}
  uint32_t below(uint32_t limit) { return bits_() % limit; }
  float normal() { return normal_(bits_); }

 private:
  std::mt19937 bits_;
  std::normal_distribution<float> normal_;
};

inline int code_of(const Case& c, Random& random) {
  if (c.values == Values::saturating) return (1 << c.bits) - 1;
  if (c.values == Values::vanishing) return 0;
  return static_cast<int>(random.below(1u << c.bits));
}

inline int zero_of(const Case& c, Random& random) {
  if (c.symmetric) return 1 << (c.bits - 1);
  if (c.values == Values::saturating) return 0;
  if (c.values == Values::vanishing) return (1 << c.bits) - 1;
  return static_cast<int>(random.below(1u << c.bits));
}

// Scales of every kind that fp16 has: normal, now and then subnormal or zero.
inline uint16_t scale_of(Random& random) {
  const uint32_t kind = random.below(32);
  if (kind == 0) return static_cast<uint16_t>(random.below(0x400));
  return float_to_half(0.005f * (1 + static_cast<float>(random.below(1000)) / 500));
}

inline float activation_of(const Case& c, size_t row, size_t k, Random& random) {
  switch (c.values) {
    case Values::zeros: return 0;
    case Values::saturating: return row % 3 == 0 ? 1.0f : row % 3 == 1 ? -1.0f : k % 2 ? 1.0f : -1.0f;
    case Values::tiny: return random.normal() * (row % 2 ? 1e-41f : 1e-34f);
    case Values::huge: return random.normal() * 1e30f;
    default: return random.normal() * (random.below(64) ? 1.0f : 20.0f);
  }
}

// gemm.h: byte 4·j + i of a line holds output 16·b + j; lines follow every 8 inputs (two nibbles a byte) or every 4.
inline void store_code(Problem& p, size_t output, size_t k, int code) {
  const size_t per_line = p.shape.bits == 4 ? 8 : 4, lines = p.padded / per_line;
  const size_t line = (output / kBlock) * lines + k / per_line, input = k % per_line;
  uint8_t& byte = p.codes[line * kLine + 4 * (output % kBlock) + input % 4];
  byte = static_cast<uint8_t>(byte | (input < 4 ? code : code << 4));
}

inline void fill_group(Problem& p, size_t output, size_t g, Random& random) {
  const int zero = zero_of(p.shape, random);
  const size_t at = (output / kBlock * p.groups + g) * kBlock + output % kBlock;
  p.halves[at] = scale_of(random);
  if (!p.shape.symmetric) p.zero[at] = static_cast<uint8_t>(zero);
  const bool real = output < p.shape.outputs;
  if (real) p.scale[output * p.groups + g] = std::ldexp(static_cast<double>(half_to_float(p.halves[at])), p.shape.exponent);
  for (size_t k = g * p.shape.group; k < (g + 1) * p.shape.group; ++k) {
    const int code = real && k < p.shape.inputs ? code_of(p.shape, random) : zero;
    store_code(p, output, k, code);
    if (real) p.weight[output * p.padded + k] = code - zero;
  }
}

inline Problem make_problem(const Case& c, size_t rows) {
  const size_t groups = (c.inputs + c.group - 1) / c.group, padded = groups * c.group, blocks = (c.outputs + kBlock - 1) / kBlock;
  const size_t bytes = blocks * kBlock * padded * static_cast<size_t>(c.bits) / 8, scales = blocks * groups * kBlock;
  const size_t zeros = c.symmetric ? 0 : scales;
  Problem p{c, rows, padded, groups, blocks, {}, {},
            Buffer<uint8_t>(bytes), Buffer<uint16_t>(scales), Buffer<uint8_t>(zeros), Buffer<float>(rows * padded)};
  p.weight.resize(c.outputs * padded);
  p.scale.resize(c.outputs * groups);
  Random random(static_cast<uint32_t>(c.inputs * 31 + c.outputs * 7 + c.group + static_cast<size_t>(c.bits)));
  for (size_t output = 0; output < blocks * kBlock; ++output)
    for (size_t g = 0; g < groups; ++g) fill_group(p, output, g, random);
  for (size_t row = 0; row < rows; ++row)
    for (size_t k = 0; k < c.inputs; ++k) p.x[row * padded + k] = activation_of(c, row, k, random);
  return p;
}

// Activations as a kernel quantized them.
struct Activations {
  Buffer<int8_t> q;
  Buffer<float> scale;
  Buffer<int32_t> sum;
  explicit Activations(const Problem& p) : q(p.rows * p.padded), scale(p.rows * p.groups), sum(p.rows * p.groups) {}
};

// What y must be, [rows][outputs], and how far from it float32 may be.
struct Expected {
  std::vector<double> y, bound;
  explicit Expected(const Problem& p) : y(p.rows * p.shape.outputs), bound(p.rows * p.shape.outputs) {}
};

constexpr double kRounding = 0x1p-24, kUnderflow = 0x1p-126;  // half a unit in the last place; float32's smallest normal number

// The integers are given and exact; only scaling and adding up the groups rounds.
inline Expected expect_fast(const Problem& p, const Activations& a) {
  Expected expected(p);
  for (size_t row = 0; row < p.rows; ++row)
    for (size_t n = 0; n < p.shape.outputs; ++n) {
      double y = 0, magnitude = 0;
      for (size_t g = 0; g < p.groups; ++g) {
        const int8_t* q = a.q.data() + row * p.padded + g * p.shape.group;
        const int32_t* weight = p.weight.data() + n * p.padded + g * p.shape.group;
        int32_t dot = 0, size = 0;
        for (size_t k = 0; k < p.shape.group; ++k) dot += q[k] * weight[k], size += std::abs(q[k] * weight[k]);
        // The kernel's scale carries the exponent; p.scale does too, so it is taken out here.
        const double scale = std::ldexp(p.scale[n * p.groups + g], -p.shape.exponent) * static_cast<double>(a.scale[row * p.groups + g]);
        y += scale * dot;
        magnitude += scale * size;
      }
      const double steps = static_cast<double>(p.groups) + 4;
      expected.y[row * p.shape.outputs + n] = y;
      expected.bound[row * p.shape.outputs + n] = steps * (kRounding * magnitude + kUnderflow);
    }
  return expected;
}

inline Expected expect_exact(const Problem& p) {
  Expected expected(p);
  for (size_t row = 0; row < p.rows; ++row)
    for (size_t n = 0; n < p.shape.outputs; ++n) {
      double y = 0, magnitude = 0;
      for (size_t g = 0; g < p.groups; ++g) {
        const float* x = p.x.data() + row * p.padded + g * p.shape.group;
        const int32_t* weight = p.weight.data() + n * p.padded + g * p.shape.group;
        double dot = 0, size = 0;
        for (size_t k = 0; k < p.shape.group; ++k) {
          const double product = static_cast<double>(x[k]) * weight[k];
          dot += product;
          size += std::fabs(product);
        }
        y += p.scale[n * p.groups + g] * dot;
        magnitude += p.scale[n * p.groups + g] * size;
      }
      const double steps = static_cast<double>(p.shape.group + p.groups) + 4;
      expected.y[row * p.shape.outputs + n] = y;
      expected.bound[row * p.shape.outputs + n] = steps * (kRounding * magnitude + kUnderflow);
    }
  return expected;
}

}  // namespace qhub::test
