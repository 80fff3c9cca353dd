#include "pool.h"

#include <algorithm>
#include <chrono>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace qhub {
namespace {

constexpr int kChunkBits = 20, kRoundBits = 64 - 2 * kChunkBits;
constexpr uint64_t kChunkMask = (uint64_t{1} << kChunkBits) - 1, kRoundMask = (uint64_t{1} << kRoundBits) - 1;
// Longer than the pauses between the products of one token, shorter than anyone would notice on an idle machine.
constexpr std::chrono::microseconds kSpin{50};

uint64_t left_of(uint64_t round, uint64_t next, uint64_t end) { return (round & kRoundMask) << (2 * kChunkBits) | end << kChunkBits | next; }
uint64_t round_of(uint64_t left) { return left >> (2 * kChunkBits); }
uint64_t end_of(uint64_t left) { return (left >> kChunkBits) & kChunkMask; }
uint64_t next_of(uint64_t left) { return left & kChunkMask; }

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

template <class Ready>
bool spin_until(const Ready& ready) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return ready();
}

}  // namespace

Pool::Pool(int threads) : shares_(std::make_unique<Share[]>(static_cast<size_t>(std::max(threads, 1)))) {
  for (int thread = 1; thread < threads; ++thread) workers_.emplace_back([this, thread] { work(thread); });
}

Pool::~Pool() {
  stop_ = true;
  round_.fetch_add(1);
  round_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

bool Pool::Share::take(uint64_t round, bool first, size_t& chunk) {
  uint64_t now = left.load(std::memory_order_acquire);
  while (round_of(now) == (round & kRoundMask) && next_of(now) < end_of(now)) {
    const uint64_t next = next_of(now) + first, end = end_of(now) - !first;
    if (left.compare_exchange_weak(now, left_of(round, next, end), std::memory_order_acq_rel)) {
      chunk = first ? next - 1 : end;
      return true;
    }
  }
  return false;
}

// Does what is left of the round, this thread's share first; returns how many chunks that were.
uint32_t Pool::work_off(uint32_t round, int thread) {
  const int count = threads();
  uint32_t done = 0;
  for (int i = 0; i < count; ++i)
    for (size_t chunk = 0; shares_[(thread + i) % count].take(round, i == 0, chunk); ++done) call_(context_, chunk, thread);
  return done;
}

void Pool::run_erased(size_t count, Call call, const void* context) {
  if (workers_.empty() || count <= 1) {
    for (size_t chunk = 0; chunk < count; ++chunk) call(context, chunk, 0);
    return;
  }
  call_ = call;
  context_ = context;
  done_.store(0, std::memory_order_relaxed);
  const uint32_t round = round_.load(std::memory_order_relaxed) + 1;
  const size_t all = static_cast<size_t>(threads());
  for (size_t i = 0; i < all; ++i) shares_[i].left.store(left_of(round, i * count / all, (i + 1) * count / all), std::memory_order_release);
  round_.store(round);
  if (sleepers_.load()) round_.notify_all();
  const uint32_t others = static_cast<uint32_t>(count) - work_off(round, 0);
  if (spin_until([&] { return done_.load(std::memory_order_acquire) == others; })) return;
  caller_sleeps_ = true;
  for (uint32_t done = done_.load(); done != others; done = done_.load()) done_.wait(done);
  caller_sleeps_ = false;
}

void Pool::wait_for_round(uint32_t seen) {
  if (spin_until([&] { return round_.load(std::memory_order_acquire) != seen; })) return;
  ++sleepers_;
  round_.wait(seen);
  --sleepers_;
}

void Pool::work(int thread) {
  uint32_t seen = 0;
  while (true) {
    wait_for_round(seen);
    if (stop_) return;
    seen = round_.load(std::memory_order_acquire);
    if (const uint32_t done = work_off(seen, thread)) {
      done_.fetch_add(done);
      if (caller_sleeps_) done_.notify_one();
    }
  }
}

}  // namespace qhub
