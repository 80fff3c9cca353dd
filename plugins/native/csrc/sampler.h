// From logits to a token.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace qhub {

struct Sampling {
  float temperature = 0;         // 0: the most probable token
  int top_k = 0;                 // 0: all
  float top_p = 1, min_p = 0;    // the smallest set of this mass; at least this share of the most probable
  float repetition_penalty = 1;  // of tokens already seen: their logits / penalty if positive, · penalty if negative (CTRL, 2019)
};

// Deterministic by seed on every machine: PCG32 (O'Neill 2014).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 6364136223846793005u + 1442695040888963407u) { next(); }
  float uniform() { return static_cast<float>(next() >> 8) * 0x1p-24f; }  // 0 ≤ u < 1

 private:
  uint32_t next();
  uint64_t state_;
};

// logits (V) are changed. `seen` are the tokens that the penalty holds for.
int32_t sample(std::span<float> logits, std::span<const int32_t> seen, const Sampling& settings, Random& random);

}  // namespace qhub
