// Phases of independent tasks on XLA's thread pool.
#pragma once
#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace grokmesh {

// Devices that share this process's processors: more threads at work than processors would wait for those that have none.
extern int64_t devices;

// Calls task(phase, i) for all i < counts[phase]; a phase begins when the one before is done. Each thread has a stretch of a
// phase's tasks, which it takes in order, since what follows in memory has been asked for already; then it takes what others have
// left. So any number of threads will do, and none is waited for that has not begun.
inline void parallel_phases(xla::ffi::ThreadPool pool, std::vector<int64_t> counts,
                            std::function<void(int, int64_t)> task) {
  struct alignas(64) Next {
    std::atomic<int64_t> task;
  };
  struct Job {
    std::vector<int64_t> counts;
    std::function<void(int, int64_t)> task;
    int64_t threads;
    std::unique_ptr<Next[]> next;  // of each phase, of each thread's stretch
    std::atomic<int64_t> begun{0}, done{0};
    Job(std::vector<int64_t> all, std::function<void(int, int64_t)> function, int64_t most)
        : counts(std::move(all)), task(std::move(function)), threads(most), next(new Next[counts.size() * most]) {
      for (size_t phase = 0; phase < counts.size(); phase++)
        for (int64_t thread = 0; thread < threads; thread++) next[phase * threads + thread].task = first(phase, thread);
    }
    int64_t first(int phase, int64_t thread) const { return counts[phase] * thread / threads; }
    void run() {
      const int64_t own = begun.fetch_add(1, std::memory_order_relaxed);
      int64_t before = 0;
      for (size_t phase = 0; phase < counts.size(); before += counts[phase++])
        for (int64_t i = 0; i < threads; i++) {
          const int64_t stretch = (own + i) % threads, last = first(phase, stretch + 1);
          auto& left = next[phase * threads + stretch].task;
          for (int64_t at; left.load(std::memory_order_relaxed) < last && (at = left.fetch_add(1, std::memory_order_relaxed)) < last;) {
            wait(before);
            task(phase, at);
            done.fetch_add(1, std::memory_order_release);
          }
        }
    }
    void wait(int64_t tasks) const {
      while (done.load(std::memory_order_acquire) < tasks) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
    }
  };
  int64_t all = 0, widest = 0;
  for (int64_t count : counts) {
    widest = std::max(widest, count);
    all += count;
  }
  if (all == 0) return;
  const int64_t threads = std::min(std::max<int64_t>(pool.num_threads() / devices, 1), widest);
  auto job = std::make_shared<Job>(std::move(counts), std::move(task), threads);
  for (int64_t helpers = threads - 1; helpers > 0; helpers--)
    pool.Schedule([job] { job->run(); });
  job->run();
  job->wait(all);
}

}  // namespace grokmesh
