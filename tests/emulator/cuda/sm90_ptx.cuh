#pragma once
/// The instructions of csrc/cuda/sm90_ptx.cuh, by the tables of the PTX manual.
///
/// What is asynchronous there happens here at any moment that the manual allows, drawn at random: a box arrives, in
/// each block on its own, some time after it was asked for, and a product reads its operands either when it is
/// committed or as late as when it is waited for. What the manual asks for and chips often do without is checked: a
/// barrier is there for others once its thread has fenced it and the cluster has met, a block that has ended takes no
/// signal, accumulators are not-a-numbers between their product and the wait and pin behind it, and a product needs a
/// fence after they were used.
#include <cuda.h>
#include <cuda_runtime.h>

#include <map>
#include <utility>

#include "cuda/launch.cuh"

#define __cluster_dims__(...)
#define __grid_constant__

namespace sts::cuda::sm90 {

/// One box on its way to one block.
struct BoxInFlight {
    CUtensorMap map;
    emulator::Block* block;
    size_t destination, barrier;  ///< offsets in the block's shared memory
    int column, row;
};

/// A product that a thread has asked for: its share of the result.
struct Product64x256 {
    float* d;
    uint64_t a, b;
    bool accumulate;
};

struct ProductGroup {
    std::vector<Product64x256> products;
    bool late = false;
};

/// A thread's products that are under way, and its accumulators.
struct Products {
    std::vector<ProductGroup> groups = std::vector<ProductGroup>(1);  ///< the last one is still open
    float accumulators[128];                                          ///< as they are while products run
    enum { used, pinned, fenced, running, waited } state = used;
};

/// A barrier from its thread's initialisation on.
struct Initialised {
    const emulator::Fiber* by;
    bool is_fenced;
    uint64_t n_cluster_syncs;
};

/// What hardware outside of the threads knows of a cluster.
struct Hardware {
    std::vector<BoxInFlight> boxes;
    std::map<const emulator::Fiber*, Products> products;
    std::map<std::pair<uint64_t, size_t>, Initialised> barriers;  ///< by block and offset
    std::map<uint64_t, int> registers;                            ///< that the threads of a block hold
    std::mt19937_64 random{1};
    int n_in_cluster_sync = 0;
    uint64_t n_cluster_syncs = 0;

    static Hardware& get() {
        static Hardware hardware;
        return hardware;
    }
    bool toss(unsigned one_in) { return random() % one_in == 0; }
};

/// An mbarrier: 64 bits in shared memory.
struct Barrier {
    int32_t bytes;  ///< expected and not yet in; may be below zero for a while
    int8_t pending;
    int8_t expected;
    uint16_t phase;

    void settle() {
        if (pending < 0) emulator::Machine::fail("more arrivals at a barrier than it expects");
        if (pending == 0 && bytes == 0) {
            pending = expected;
            ++phase;
        }
    }
};
static_assert(sizeof(Barrier) == 8, "an mbarrier has 64 bits");

inline Barrier& barrier_at(emulator::Block& block, size_t offset) {
    const Hardware& hardware = Hardware::get();
    if (block.has_ended()) emulator::Machine::fail("a signal to a block that has ended");
    const auto found = hardware.barriers.find({block.number, offset});
    if (found == hardware.barriers.end() || found->second.n_cluster_syncs == hardware.n_cluster_syncs)
        emulator::Machine::fail("a barrier that is not there yet for other threads");
    return *reinterpret_cast<Barrier*>(block.shared + offset);
}

inline size_t offset_of(const void* pointer) {
    return static_cast<size_t>(static_cast<const unsigned char*>(pointer) - emulator::current().block->shared);
}

inline void deliver(const BoxInFlight& box) {
    Barrier& barrier = barrier_at(*box.block, box.barrier);
    const CUtensorMap& map = box.map;
    unsigned char* to = box.block->shared + box.destination;
    if (box.destination % 1024) emulator::Machine::fail("a box with a swizzle of 128 bytes is not aligned to 1024");
    for (uint32_t r = 0; r < map.box[1]; ++r)
        for (uint32_t c = 0; c < map.box[0]; ++c) {
            const int64_t row = int64_t{box.row} + r, column = int64_t{box.column} + c;
            const bool inside = row >= 0 && row < static_cast<int64_t>(map.extent[1]) && column >= 0 &&
                                column < static_cast<int64_t>(map.extent[0]);
            uint16_t element = 0;
            if (inside) std::memcpy(&element, map.data + row * static_cast<int64_t>(map.stride_bytes) + column * 2, 2);
            const uint32_t offset = r * 128 + c * 2;
            std::memcpy(to + (offset ^ (offset >> 7 & 7) << 4), &element, 2);
        }
    barrier.bytes -= static_cast<int32_t>(map.box[0] * map.box[1] * 2);
    barrier.settle();
}

inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(1024 + offset_of(pointer));  // the first 1,024 bytes are the system's
}

inline int block_in_cluster() {
    return static_cast<int>(emulator::current().block->rank);
}

inline void cluster_sync() {
    Hardware& hardware = Hardware::get();
    for (const auto& [place, barrier] : hardware.barriers)
        if (barrier.by == &emulator::current() && !barrier.is_fenced)
            emulator::Machine::fail("an initialised barrier is not fenced");
    int n_threads = 0;
    for (const auto& block : emulator::Machine::get().cluster) n_threads += block->n_threads;
    const uint64_t before = hardware.n_cluster_syncs;
    if (++hardware.n_in_cluster_sync == n_threads) {
        hardware.n_in_cluster_sync = 0;
        ++hardware.n_cluster_syncs;
    }
    emulator::Machine::get().wait([&] { return hardware.n_cluster_syncs != before; });
}

/// Registers of a multiprocessor, of which a block that has it for itself starts with a multiple of eight a thread.
constexpr int kRegisters = 65536;
inline int registers_at_start() {
    return kRegisters / emulator::current().block->n_threads / 8 * 8;
}
inline int& registers_held() {
    const emulator::Block* block = emulator::current().block;
    return Hardware::get().registers.try_emplace(block->number, registers_at_start() * block->n_threads).first->second;
}
template <int N>
void give_registers_above() {
    static_assert(N % 8 == 0 && N >= 24 && N <= 256);
    registers_held() -= registers_at_start() - N;
}
template <int N>
void take_registers_up_to() {
    static_assert(N % 8 == 0 && N >= 24 && N <= 256);
    const int more = N - registers_at_start();
    emulator::Machine::get().wait([&] { return registers_held() + more <= kRegisters; });
    registers_held() += more;
}

inline void barrier_init(uint64_t* barrier, int n_arrivals) {
    Hardware::get().barriers[{emulator::current().block->number, offset_of(barrier)}] = {
        &emulator::current(), false, Hardware::get().n_cluster_syncs};
    *reinterpret_cast<Barrier*>(barrier) = {0, static_cast<int8_t>(n_arrivals), static_cast<int8_t>(n_arrivals), 0};
}

inline void barrier_init_fence() {
    for (auto& [place, barrier] : Hardware::get().barriers)
        if (barrier.by == &emulator::current()) barrier.is_fenced = true;
}

inline void arrive(emulator::Block& block, size_t offset, int n_bytes) {
    Barrier& barrier = barrier_at(block, offset);
    --barrier.pending;
    barrier.bytes += n_bytes;
    barrier.settle();
}

inline void barrier_arrive_expecting(uint64_t* barrier, int n_bytes) {
    arrive(*emulator::current().block, offset_of(barrier), n_bytes);
}

inline void barrier_arrive_at(uint64_t* barrier, int rank) {
    arrive(*emulator::Machine::get().cluster[static_cast<size_t>(rank)], offset_of(barrier), 0);
}

inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
    Hardware& hardware = Hardware::get();
    const Barrier& awaited = barrier_at(*emulator::current().block, offset_of(barrier));
    bool slow = hardware.toss(3);
    emulator::Machine::get().wait([&] {
        if (!hardware.boxes.empty() && hardware.toss(40)) {
            const size_t next = hardware.random() % hardware.boxes.size();
            const BoxInFlight box = hardware.boxes[next];
            hardware.boxes.erase(hardware.boxes.begin() + static_cast<std::ptrdiff_t>(next));
            deliver(box);
        }
        return !std::exchange(slow, false) && (awaited.phase & 1u) != parity;
    });
}

inline void load_box_multicast(const CUtensorMap* map, void* destination, uint64_t* barrier, int column, int row,
                               uint16_t blocks) {
    for (const auto& block : emulator::Machine::get().cluster)
        if (blocks >> block->rank & 1u)
            Hardware::get().boxes.push_back(
                {*map, block.get(), offset_of(destination), offset_of(barrier), column, row});
}

inline void load_box(const CUtensorMap* map, void* destination, uint64_t* barrier, int column, int row) {
    load_box_multicast(map, destination, barrier, column, row, static_cast<uint16_t>(1u << block_in_cluster()));
}

/// Element k of a row that a descriptor names.
inline float operand(uint64_t descriptor, int row, int k) {
    const uint64_t start = (descriptor & 0x3FFF) << 4, group_bytes = (descriptor >> 32 & 0x3FFF) << 4;
    if (descriptor >> 62 != 1) emulator::Machine::fail("a descriptor without the swizzle of 128 bytes");
    if (descriptor >> 49 & 7) emulator::Machine::fail("a descriptor with an offset of its base");
    const uint64_t address = start + static_cast<uint64_t>(row / 8) * group_bytes +
                             static_cast<uint64_t>(row % 8) * 128 + static_cast<uint64_t>(k) * 2;
    uint16_t bits;
    std::memcpy(&bits, emulator::current().block->shared + (address ^ (address >> 7 & 7) << 4) - 1024, 2);
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

inline void multiply(const Product64x256& product) {
    const emulator::Fiber& self = emulator::current();
    const int first_row = self.warp % 4 * 16 + self.lane / 4;
    float a[2][16];
    for (int j = 0; j < 2; ++j)
        for (int k = 0; k < 16; ++k) a[j][k] = operand(product.a, first_row + 8 * j, k);
    for (int i = 0; i < 32; ++i)
        for (int e = 0; e < 2; ++e) {
            float b[16];
            for (int k = 0; k < 16; ++k) b[k] = operand(product.b, 8 * i + 2 * (self.lane % 4) + e, k);
            for (int j = 0; j < 2; ++j) {
                float& d = product.d[4 * i + 2 * j + e];
                if (!product.accumulate) d = 0;
                for (int k = 0; k < 16; ++k) d += a[j][k] * b[k];
            }
        }
}

inline Products& own_products() {
    return Hardware::get().products[&emulator::current()];
}

/// Without it the compiler may have moved what uses the accumulators to where they hold anything.
inline void pin_accumulators(float (&accumulators)[128]) {
    Products& own = own_products();
    if (own.state == Products::waited) std::copy_n(own.accumulators, 128, accumulators);
    if (own.state == Products::waited)
        own.state = Products::used;
    else if (own.state == Products::used)
        own.state = Products::pinned;
}

inline void product_begin() {
    Products& own = own_products();
    if (own.state == Products::used || own.state == Products::waited)
        emulator::Machine::fail("a fence before the accumulators are pinned");
    if (own.state == Products::pinned) own.state = Products::fenced;
}

inline void product_m64n256k16(float (&d)[128], uint64_t a, uint64_t b, bool accumulate) {
    Products& own = own_products();
    if (own.state == Products::fenced) {
        std::copy_n(d, 128, own.accumulators);
        std::fill_n(d, 128, __uint_as_float(0x7fc00000));
        own.state = Products::running;
    }
    if (own.state != Products::running)
        emulator::Machine::fail("a product without a fence after its accumulators' use");
    own.groups.back().products.push_back({own.accumulators, a, b, accumulate});
}

inline void product_commit() {
    auto& groups = own_products().groups;
    groups.back().late = Hardware::get().toss(2);
    if (!groups.back().late && groups.size() == 1) {
        for (const Product64x256& product : groups.back().products) multiply(product);
        groups.back().products.clear();
    }
    groups.emplace_back();
}

template <int n>
void product_wait() {
    Products& own = own_products();
    while (own.groups.size() > n + 1) {
        for (const Product64x256& product : own.groups.front().products) multiply(product);
        own.groups.erase(own.groups.begin());
    }
    if (n == 0 && own.state == Products::running) own.state = Products::waited;
    emulator::exchange(0);  // all lanes of a warp wait together
}

template <unsigned n_blocks, class Params>
cudaError_t launch_clusters(void (*kernel)(Params), unsigned n_clusters, unsigned n_threads, size_t shared_bytes,
                            cudaStream_t, const Params& params) {
    Hardware& hardware = Hardware::get();
    hardware = {};
    hardware.random.seed(emulator::Machine::get().seed);
    emulator::Machine::get().run(n_blocks * n_clusters, n_threads, shared_bytes, n_blocks, [&] { kernel(params); });
    if (!hardware.boxes.empty()) emulator::Machine::fail("a kernel ended with boxes on their way");
    return cudaSuccess;
}

}  // namespace sts::cuda::sm90
