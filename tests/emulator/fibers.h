#pragma once
/// Runs a CUDA kernel's source on the CPU: every thread is a fiber, the blocks of a cluster run together, clusters one
/// after the other. Threads take turns in an order drawn anew for every round, so that a missing barrier shows.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

namespace emulator {

struct Dim3 {
    unsigned x = 1, y = 1, z = 1;
    Dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

/// What the lanes of a warp hand each other; two sides, since a lane may be one exchange ahead of another.
struct Warp {
    static constexpr int kBytes = 64;
    alignas(16) unsigned char slots[2][32][kBytes];
    int arrived = 0;
    uint64_t generation = 0;
};

struct Block {
    Dim3 index;
    uint64_t number = 0;  ///< of all that have ever run
    unsigned rank = 0;    ///< in its cluster
    std::vector<unsigned char> shared_storage;
    unsigned char* shared = nullptr;  ///< 1,024-byte aligned
    size_t shared_bytes = 0;          ///< what lies behind them is nobody's
    std::vector<Warp> warps;
    int n_threads = 0, n_left = 0, arrived = 0;
    uint64_t generation = 0;

    /// Its memory is the next one's from now on.
    void end() {
        if (std::any_of(shared + shared_bytes, shared + shared_bytes + kBehind,
                        [](unsigned char b) { return b != 0xff; }))
            throw std::logic_error("a thread wrote past the end of its block's shared memory");
        std::fill(shared_storage.begin(), shared_storage.end(), static_cast<unsigned char>(0xff));
    }
    bool has_ended() const { return n_left == 0; }
    static constexpr size_t kBehind = 1024;
};

/// A copy that has been asked for and not waited for.
struct Copy {
    void* to;
    const void* from;
    int n_bytes, n_zeros;
};

struct Fiber {
    ucontext_t context;  ///< to start with
    jmp_buf resume;      ///< to go on with: unlike swapcontext, no system call
    bool started = false;
    std::unique_ptr<unsigned char[]> stack;
    Block* block = nullptr;
    Dim3 thread;
    int lane = 0, warp = 0;
    bool done = false;
    std::vector<Copy> copies;                    ///< of the group that is still open
    std::vector<std::vector<Copy>> copy_groups;  ///< committed, oldest first
};

class Machine {
  public:
    static Machine& get() {
        static Machine machine;
        return machine;
    }

    Fiber& current() { return *fibers_[current_]; }
    Dim3 grid, block_shape;
    unsigned cluster_size = 1;
    std::vector<std::unique_ptr<Block>> cluster;
    uint64_t seed = 1;
    bool warp_is_late = false;  ///< of each cluster one warp, drawn anew, takes few turns: the others run ahead of it

    /// Runs `body` once per thread of the grid.
    void run(Dim3 grid_shape, Dim3 threads, size_t shared_bytes, unsigned blocks_per_cluster,
             const std::function<void()>& body) {
        grid = grid_shape;
        block_shape = threads;
        cluster_size = blocks_per_cluster;
        body_ = &body;
        order_random_.seed(seed);
        const uint64_t n_blocks = uint64_t{grid.x} * grid.y * grid.z;
        for (uint64_t first = 0; first < n_blocks; first += cluster_size) run_cluster(first, shared_bytes);
    }

    /// Lets the others run until `ready()`.
    template <class Ready>
    void wait(const Ready& ready) {
        while (!ready()) {
            if (++idle_ > 64 * fibers_.size() + 4096) fail("deadlock: every thread waits");
            pause();
        }
        idle_ = 0;
    }

    [[noreturn]] static void fail(const char* what) { throw std::logic_error(what); }

  private:
    void pause() {
        if (!_setjmp(current().resume)) _longjmp(scheduler_, 1);
    }

    void resume(Fiber& fiber) {
        if (_setjmp(scheduler_)) return;
        if (fiber.started) _longjmp(fiber.resume, 1);
        fiber.started = true;
        setcontext(&fiber.context);
    }

    static void enter() {
        Machine& machine = get();
        try {
            (*machine.body_)();
            for (const auto& group : machine.current().copy_groups)
                if (!group.empty()) fail("a thread ends with copies that it has not waited for");
        } catch (...) {
            machine.error_ = std::current_exception();
        }
        machine.current().done = true;
        machine.idle_ = 0;
        machine.pause();
    }

    void run_cluster(uint64_t first_block, size_t shared_bytes) {
        const int n_threads = static_cast<int>(block_shape.x * block_shape.y * block_shape.z);
        cluster.clear();
        size_t n = 0;
        for (unsigned rank = 0; rank < cluster_size; ++rank) {
            auto block = std::make_unique<Block>();
            const uint64_t index = first_block + rank;
            block->number = n_blocks_run_++;
            block->index = Dim3(static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                                static_cast<unsigned>(index / grid.x / grid.y));
            block->rank = rank;
            // Not-a-numbers: what is read before it was written does not go unnoticed.
            block->shared_storage.assign(1024 + shared_bytes + Block::kBehind, 0xff);
            block->shared_bytes = shared_bytes;
            const auto address = reinterpret_cast<uintptr_t>(block->shared_storage.data());
            block->shared = block->shared_storage.data() + (1024 - address % 1024) % 1024;
            block->warps.resize(static_cast<size_t>((n_threads + 31) / 32));
            block->n_threads = block->n_left = n_threads;
            for (int t = 0; t < n_threads; ++t) {
                if (n == fibers_.size()) fibers_.push_back(std::make_unique<Fiber>());
                start(*fibers_[n++], block.get(), t);
            }
            cluster.push_back(std::move(block));
        }
        fibers_.resize(n);
        std::vector<size_t> order(n);
        for (size_t i = 0; i < n; ++i) order[i] = i;
        const size_t late = warp_is_late ? order_random_() % ((n + 31) / 32) : n;
        for (size_t n_left = n; n_left;) {
            std::shuffle(order.begin(), order.end(), order_random_);
            for (const size_t i : order) {
                if (fibers_[i]->done || (i / 32 == late && order_random_() % 8 != 0)) continue;
                current_ = i;
                resume(*fibers_[i]);
                if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
                if (!fibers_[i]->done) continue;
                --n_left;
                if (--fibers_[i]->block->n_left == 0) fibers_[i]->block->end();
            }
        }
    }

    void start(Fiber& fiber, Block* block, int thread) {
        constexpr size_t kStack = 128 * 1024;
        if (!fiber.stack) fiber.stack.reset(new unsigned char[kStack]);
        fiber.block = block;
        fiber.thread = Dim3(static_cast<unsigned>(thread) % block_shape.x,
                            static_cast<unsigned>(thread) / block_shape.x % block_shape.y,
                            static_cast<unsigned>(thread) / block_shape.x / block_shape.y);
        fiber.lane = thread % 32;
        fiber.warp = thread / 32;
        fiber.done = fiber.started = false;
        fiber.copies.clear();
        fiber.copy_groups.clear();
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, &Machine::enter, 0);
    }

    std::vector<std::unique_ptr<Fiber>> fibers_;
    size_t current_ = 0, idle_ = 0;
    uint64_t n_blocks_run_ = 0;
    jmp_buf scheduler_;
    std::mt19937_64 order_random_;
    const std::function<void()>* body_ = nullptr;
    std::exception_ptr error_;
};

inline Fiber& current() {
    return Machine::get().current();
}

/// Hands `mine` to the warp and returns what every lane handed over.
template <class T>
const T* exchange(const T& mine) {
    static_assert(sizeof(T) <= Warp::kBytes);
    Fiber& self = current();
    Warp& warp = self.block->warps[static_cast<size_t>(self.warp)];
    const uint64_t generation = warp.generation;
    std::memcpy(warp.slots[generation % 2][self.lane], &mine, sizeof(T));
    if (++warp.arrived == 32) {
        warp.arrived = 0;
        ++warp.generation;
    }
    Machine::get().wait([&] { return warp.generation != generation; });
    thread_local T all[32];
    for (int lane = 0; lane < 32; ++lane) std::memcpy(&all[lane], warp.slots[generation % 2][lane], sizeof(T));
    return all;
}

inline void sync_block() {
    Block& block = *current().block;
    const uint64_t generation = block.generation;
    if (++block.arrived == block.n_threads) {
        block.arrived = 0;
        ++block.generation;
    }
    Machine::get().wait([&] { return block.generation != generation; });
}

}  // namespace emulator
