// One set of threads, made once. Work is handed out in chunks as threads come for it, so a thread that the operating system has
// put aside costs its own chunk and no more. Idle threads look for work for some microseconds, then sleep.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
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
  bool take(uint64_t round, size_t& chunk);
  void wait_for_round(uint32_t seen);

  // round · count · next chunk in one word: who takes a chunk by compare-and-swap knows that the round is still going on.
  std::atomic<uint64_t> ticket_{0};
  std::atomic<uint32_t> round_{0};
  std::atomic<uint32_t> done_{0};
  std::atomic<uint32_t> sleepers_{0};
  std::atomic<bool> caller_sleeps_{false};
  std::atomic<bool> stop_{false};
  Call call_ = nullptr;
  const void* context_ = nullptr;
  std::vector<std::thread> workers_;
};

}  // namespace qhub
