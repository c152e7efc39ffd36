// The most float32 multiply-adds that this machine does: independent sums in registers, no memory.
//   c++ -O3 -march=native -std=c++17 -pthread fma_peak.cpp && ./a.out THREADS
// prints GFLOP/s, the best of ten bursts of 30 ms, all threads together; each by its own processor's time, so that
// other work on the machine takes nothing away.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int kBytes = 64, kSums = 24;
#elif defined(__AVX__)
constexpr int kBytes = 32, kSums = 12;
#else
constexpr int kBytes = 16, kSums = 24;
#endif
#if defined(__aarch64__)
#define STS_REGISTER "w"
#else
#define STS_REGISTER "x"
#endif
typedef float Floats __attribute__((vector_size(kBytes)));
constexpr int kLanes = kBytes / 4;
constexpr long kSteps = 20000;

double thread_seconds() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

double burst(float seed) {
    Floats sums[kSums] = {};
    Floats x = {}, w = {};
    for (int i = 0; i < kLanes; ++i) {
        x[i] = seed;
        w[i] = 1e-9f * seed;
    }
    long blocks = 0;
    const double start = thread_seconds();
    double seconds = 0;
    for (; seconds < 0.03; ++blocks) {
        for (long step = 0; step < kSteps; ++step) {
#pragma GCC unroll 24
            for (int i = 0; i < kSums; ++i) sums[i] = x * w + sums[i];
            asm volatile("" : "+" STS_REGISTER(x), "+" STS_REGISTER(w));  // nothing is taken out of the loop
        }
        seconds = thread_seconds() - start;
    }
    for (int i = 0; i < kSums; ++i) asm volatile("" ::STS_REGISTER(sums[i]));
    return 2.0 * kLanes * kSums * static_cast<double>(kSteps) * static_cast<double>(blocks) / seconds / 1e9;
}

int main(int argc, char** argv) {
    const int n_threads = argc > 1 ? std::atoi(argv[1]) : 1;
    double best = 0;
    for (int repeat = 0; repeat < 10; ++repeat) {
        std::vector<double> rates(static_cast<size_t>(n_threads));
        std::vector<std::thread> threads;
        for (auto& rate : rates) threads.emplace_back([&rate] { rate = burst(1.0f); });
        for (auto& thread : threads) thread.join();
        double sum = 0;
        for (double rate : rates) sum += rate;
        best = std::max(best, sum);
    }
    std::printf("%.2f\n", best);
}
