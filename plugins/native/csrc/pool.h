// One set of threads, made once. Each has a share of the chunks, side by side, so that it reads memory in one stream; one that is
// through takes chunks from the ends of the others' shares, so a thread that the operating system has put aside costs its own chunk
// and no more. Idle threads look for work for some microseconds, then sleep.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace qhub {

class Pool {
 public:
  // `threads` counts the caller's own; at least one.
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls task(chunk, thread) for every chunk below `count`, thread below threads(), and returns when all are done.
  // For one caller at a time; a task must not throw and must not call run.
  template <class Task>
  void run(size_t count, const Task& task) {
    run_erased(count, [](const void* context, size_t chunk, int thread) { (*static_cast<const Task*>(context))(chunk, thread); }, &task);
  }

  // Calls row(i) for every i < rows, eight at a time on each thread.
  template <class Row>
  void run_rows(size_t rows, const Row& row) {
    constexpr size_t kAtOnce = 8;
    run((rows + kAtOnce - 1) / kAtOnce, [&](size_t chunk, int) {
      for (size_t i = chunk * kAtOnce; i < rows && i < (chunk + 1) * kAtOnce; ++i) row(i);
    });
  }

 private:
  using Call = void (*)(const void*, size_t, int);
  void run_erased(size_t count, Call call, const void* context);
  void work(int thread);
  uint32_t work_off(uint32_t round, int thread);
  void wait_for_round(uint32_t seen);

  // What is left of a thread's chunks: round · end · next in one word: who takes a chunk by compare-and-swap knows that the round
  // is still going on.
  struct alignas(64) Share {
    std::atomic<uint64_t> left{0};
    bool take(uint64_t round, bool first, size_t& chunk);
  };
  std::unique_ptr<Share[]> shares_;
  std::atomic<uint32_t> round_{0};
  alignas(64) std::atomic<uint32_t> done_{0};
  std::atomic<uint32_t> sleepers_{0};
  std::atomic<bool> caller_sleeps_{false};
  std::atomic<bool> stop_{false};
  Call call_ = nullptr;
  const void* context_ = nullptr;
  std::vector<std::thread> workers_;
};

}  // namespace qhub
