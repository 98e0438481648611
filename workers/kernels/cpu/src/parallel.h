// Phases of independent tasks on XLA's thread pool.
#pragma once
#include <algorithm>
#include <atomic>
#include <functional>
#include <initializer_list>
#include <memory>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace grokmesh {

// Devices that share this process's processors: more threads at work than processors would wait for those that have none.
extern int64_t devices;

// Calls task(phase, i) for all i < counts[phase]; a phase begins when the one before is done. Threads take tasks in order,
// and who takes one of a later phase waits for the tasks before it, which others have taken: so any number of threads will
// do, and none is waited for that has not begun.
inline void parallel_phases(xla::ffi::ThreadPool pool, std::vector<int64_t> counts,
                            std::function<void(int, int64_t)> task) {
  struct Job {
    std::vector<int64_t> ends;
    std::function<void(int, int64_t)> task;
    std::atomic<int64_t> next{0}, done{0};
    void run() {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < ends.back();) {
        int phase = 0;
        while (i >= ends[phase]) phase++;
        const int64_t begin = phase ? ends[phase - 1] : 0;
        while (done.load(std::memory_order_acquire) < begin) pause();
        task(phase, i - begin);
        done.fetch_add(1, std::memory_order_release);
      }
    }
    static void pause() {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  };
  int64_t end = 0, widest = 0;
  for (int64_t& count : counts) {
    widest = std::max(widest, count);
    count = end += count;
  }
  if (end == 0) return;
  auto job = std::make_shared<Job>();
  job->ends = std::move(counts);
  job->task = std::move(task);
  const int64_t threads = std::max<int64_t>(pool.num_threads() / devices, 1);
  for (int64_t helpers = std::min(threads, widest) - 1; helpers > 0; helpers--)
    pool.Schedule([job] { job->run(); });
  job->run();
  while (job->done.load(std::memory_order_acquire) < end) Job::pause();
}

}  // namespace grokmesh
