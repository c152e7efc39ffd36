#include "cpu/parallel.h"

#include <sts/check.h>
#include <sts/sae_ops.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace sts {
namespace {

int available_cores() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

std::atomic<int> requested_threads{0};
std::atomic<void (*)()> poll_function{nullptr};

constexpr std::chrono::milliseconds kPollInterval{100};

/// Of a worker, whether its op was abandoned; null on the thread that called the op.
thread_local const std::atomic<bool>* is_abandoned = nullptr;

/// Ends a worker whose op was abandoned. The caller gets the exception that was first.
struct Abandoned {};

}  // namespace

void set_num_threads(int n) {
    check(n >= 1, "n must be at least 1 thread, got " + std::to_string(n));
    requested_threads = n;
}

int get_num_threads() {
    const int n = requested_threads;
    return n ? n : available_cores();
}

void set_poll(void (*poll)()) {
    poll_function = poll;
}

namespace cpu {

void poll() {
    if (is_abandoned) {
        if (*is_abandoned) throw Abandoned{};
        return;
    }
    void (*const function)() = poll_function;
    if (!function) return;
    thread_local std::chrono::steady_clock::time_point due;
    const auto now = std::chrono::steady_clock::now();
    if (now < due) return;
    due = now + kPollInterval;
    function();
}

void parallel_for(int n_workers, int64_t n, const std::function<void(int, int64_t)>& task) {
    std::atomic<int64_t> next{0};
    std::atomic<bool> abandoned{false};
    std::exception_ptr error;
    std::mutex error_mutex;
    const auto work = [&](int worker) {
        try {
            if (worker) is_abandoned = &abandoned;
            for (int64_t i; (i = next.fetch_add(1)) < n;) {
                poll();
                task(worker, i);
            }
        } catch (...) {
            next = n;
            const std::lock_guard<std::mutex> lock(error_mutex);
            if (!error) error = std::current_exception();
            abandoned = true;
        }
    };
    std::vector<std::thread> threads;
    const int64_t n_threads = std::min<int64_t>(n_workers, n);
    threads.reserve(static_cast<size_t>(std::max<int64_t>(n_threads, 1)));
    try {
        for (int worker = 1; worker < n_threads; ++worker) threads.emplace_back(work, worker);
    } catch (const std::system_error&) {
        // No more threads to be had: those that exist share the work.
    }
    work(0);
    for (std::thread& thread : threads) thread.join();
    if (error) std::rethrow_exception(error);
}

}  // namespace cpu
}  // namespace sts
