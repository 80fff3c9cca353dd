#include "checksum.h"

#include <cstring>
#include <vector>

namespace qhub {
namespace {

constexpr size_t kPiece = size_t{1} << 21;
constexpr uint64_t kPrime = 0x9e3779b97f4a7c15;  // 2^64 / golden ratio, odd

uint64_t mixed(uint64_t value) {
  value ^= value >> 32;
  value *= kPrime;
  return value ^ value >> 29;
}

// Eight lanes of eight bytes; multiplication by an odd number loses nothing, so one changed bit changes its lane.
uint64_t piece_sum(const uint8_t* bytes, size_t count) {
  uint64_t lanes[8] = {1, 2, 3, 4, 5, 6, 7, 8}, words[8];
  size_t at = 0;
  for (; at + sizeof words <= count; at += sizeof words) {
    std::memcpy(words, bytes + at, sizeof words);
    for (int i = 0; i < 8; ++i) lanes[i] = (lanes[i] ^ words[i]) * kPrime;
  }
  uint64_t total = count;
  for (; at < count; ++at) total = (total ^ bytes[at]) * kPrime;
  for (uint64_t lane : lanes) total = mixed(total ^ lane);
  return total;
}

}  // namespace

uint64_t checksum(Pool& pool, const uint8_t* bytes, size_t count) {
  std::vector<uint64_t> sums((count + kPiece - 1) / kPiece);
  pool.run(sums.size(), [&](size_t piece, int) {
    const size_t begin = piece * kPiece;
    sums[piece] = piece_sum(bytes + begin, count - begin < kPiece ? count - begin : kPiece);
  });
  uint64_t total = count;
  for (uint64_t sum : sums) total = mixed(total ^ sum) + 1;
  return total;
}

}  // namespace qhub
