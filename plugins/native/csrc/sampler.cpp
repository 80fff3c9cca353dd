#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <unordered_set>

namespace qhub {
namespace {

struct Candidate {
  float weight;  // e^((logit − largest) / temperature)
  int32_t token;
};

bool likelier(const Candidate& a, const Candidate& b) { return a.weight != b.weight ? a.weight > b.weight : a.token < b.token; }

void penalize(std::span<float> logits, std::span<const int32_t> seen, float penalty) {
  if (penalty == 1) return;
  for (int32_t token : std::unordered_set<int32_t>(seen.begin(), seen.end())) {
    float& logit = logits[static_cast<size_t>(token)];
    logit = logit > 0 ? logit / penalty : logit * penalty;
  }
}

std::vector<Candidate> candidates(std::span<const float> logits, const Sampling& settings) {
  const float largest = *std::max_element(logits.begin(), logits.end());
  const float least = std::max(settings.min_p, 1e-9f);  // what is less likely than this cannot be drawn in practice
  std::vector<Candidate> found;
  for (size_t token = 0; token < logits.size(); ++token) {
    const float weight = std::exp((logits[token] - largest) / settings.temperature);
    if (weight >= least) found.push_back({weight, static_cast<int32_t>(token)});
  }
  return found;
}

void keep_top(std::vector<Candidate>& found, const Sampling& settings) {
  if (settings.top_k <= 0 && settings.top_p >= 1) return;
  std::sort(found.begin(), found.end(), likelier);
  if (settings.top_k > 0 && found.size() > static_cast<size_t>(settings.top_k)) found.resize(static_cast<size_t>(settings.top_k));
  const float total = std::accumulate(found.begin(), found.end(), 0.0f, [](float sum, const Candidate& c) { return sum + c.weight; });
  float mass = 0;
  size_t count = 0;
  while (count < found.size() && (count == 0 || mass < settings.top_p * total)) mass += found[count++].weight;
  found.resize(count);
}

}  // namespace

uint32_t Random::next() {
  const uint64_t old = state_;
  state_ = old * 6364136223846793005u + 1442695040888963407u;
  const uint32_t mixed = static_cast<uint32_t>(((old >> 18) ^ old) >> 27), turn = static_cast<uint32_t>(old >> 59);
  return mixed >> turn | mixed << (-turn & 31);
}

int32_t sample(std::span<float> logits, std::span<const int32_t> seen, const Sampling& settings, Random& random) {
  penalize(logits, seen, settings.repetition_penalty);
  if (settings.temperature <= 0) return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  std::vector<Candidate> found = candidates(logits, settings);
  keep_top(found, settings);
  float total = 0;
  for (const Candidate& candidate : found) total += candidate.weight;
  float drawn = random.uniform() * total;
  for (const Candidate& candidate : found) {
    if (drawn < candidate.weight) return candidate.token;
    drawn -= candidate.weight;
  }
  return found.back().token;
}

}  // namespace qhub
