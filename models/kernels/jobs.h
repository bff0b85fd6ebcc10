// Jobs shared among threads.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

// Calls work(thread, job) for every job, on no more threads than jobs.
template <typename Work> void share(int threads, int64_t jobs, const Work& work) {
    threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, jobs)));
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t job = 0; job < jobs; job++) {
#ifdef _OPENMP
        work(omp_get_thread_num(), job);
#else
        work(0, job);
#endif
    }
}

// Calls work(worker, job) for every job, each thread with a Worker(given...) of its own.  They are made before the
// threads start: where memory does not suffice, nothing may be thrown within one.
template <typename Worker, typename Work, typename... Given>
void share(int threads, int64_t jobs, const Work& work, const Given&... given) {
    std::vector<std::unique_ptr<Worker>> workers(std::max<int64_t>(1, std::min<int64_t>(threads, jobs)));
    for (auto& worker : workers) worker = std::make_unique<Worker>(given...);
    share(int(workers.size()), jobs, [&](int thread, int64_t job) { work(*workers[thread], job); });
}
