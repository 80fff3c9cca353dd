#include "pool.h"

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

uint64_t round_of(uint64_t ticket) { return ticket >> (2 * kChunkBits); }
uint64_t count_of(uint64_t ticket) { return (ticket >> kChunkBits) & kChunkMask; }
uint64_t next_of(uint64_t ticket) { return ticket & kChunkMask; }

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

Pool::Pool(int threads) {
  for (int thread = 1; thread < threads; ++thread) workers_.emplace_back([this, thread] { work(thread); });
}

Pool::~Pool() {
  stop_ = true;
  round_.fetch_add(1);
  round_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

bool Pool::take(uint64_t round, size_t& chunk) {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  while (round_of(ticket) == round && next_of(ticket) < count_of(ticket)) {
    if (ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) {
      chunk = next_of(ticket);
      return true;
    }
  }
  return false;
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
  ticket_.store((round & kRoundMask) << (2 * kChunkBits) | static_cast<uint64_t>(count) << kChunkBits, std::memory_order_release);
  round_.store(round);
  if (sleepers_.load()) round_.notify_all();
  uint32_t mine = 0;
  for (size_t chunk = 0; take(round & kRoundMask, chunk); ++mine) call(context, chunk, 0);
  const uint32_t others = static_cast<uint32_t>(count) - mine;
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
    for (size_t chunk = 0; take(seen & kRoundMask, chunk);) {
      call_(context_, chunk, thread);
      done_.fetch_add(1);
      if (caller_sleeps_) done_.notify_one();
    }
  }
}

}  // namespace qhub
