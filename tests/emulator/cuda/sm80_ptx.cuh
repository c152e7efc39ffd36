#pragma once
/// The instructions of csrc/cuda/sm80_ptx.cuh, by the tables of the PTX manual.
#include <cuda_runtime.h>

namespace sts::cuda {

inline void copy_16_bytes(void* shared, const void* global, bool inside) {
    emulator::current().copies.push_back({shared, global, inside ? 16 : 0, inside ? 0 : 16});
}
inline void commit_copies() {
    emulator::Fiber& self = emulator::current();
    self.copy_groups.push_back(std::move(self.copies));
    self.copies.clear();
}
/// Only here do the copies take place: what is read too early is still the old bytes.
template <int kPending>
void wait_for_copies() {
    auto& groups = emulator::current().copy_groups;
    while (groups.size() > kPending) {
        for (const emulator::Copy& copy : groups.front()) {
            if (reinterpret_cast<uintptr_t>(copy.to) % 16 ||
                (copy.n_bytes && reinterpret_cast<uintptr_t>(copy.from) % 16))
                emulator::Machine::fail("a copy of 16 bytes is not aligned");
            std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.n_bytes));
            std::memset(static_cast<char*>(copy.to) + copy.n_bytes, 0, static_cast<size_t>(copy.n_zeros));
        }
        groups.erase(groups.begin());
    }
}

/// Lane 8 m + r names row r of matrix m; a lane gets two elements of row lane / 4 of each matrix.
inline void load_matrices(uint32_t (&out)[4], const void* row) {
    if (reinterpret_cast<uintptr_t>(row) % 16) emulator::Machine::fail("a matrix row is not aligned");
    const void* const* rows = emulator::exchange(row);
    const int lane = emulator::current().lane;
    for (int m = 0; m < 4; ++m)
        std::memcpy(&out[m], static_cast<const char*>(rows[8 * m + lane / 4]) + 4 * (lane % 4), 4);
}

inline float bfloat16_half(uint32_t pair, int half) {
    return __uint_as_float(half ? pair & 0xffff0000u : pair << 16);
}

inline void multiply_add(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Given {
        uint32_t a[4], b[2];
    };
    const Given* all = emulator::exchange(Given{{a[0], a[1], a[2], a[3]}, {b0, b1}});
    const int lane = emulator::current().lane;
    for (int c = 0; c < 4; ++c) {
        const int row = lane / 4 + 8 * (c / 2), column = 2 * (lane % 4) + c % 2;
        for (int k = 0; k < 16; ++k) {
            // a: rows g and g + 8, then the same eight places further along k; b likewise.
            const uint32_t x = all[row % 8 * 4 + k % 8 / 2].a[row / 8 + 2 * (k / 8)];
            const uint32_t y = all[column * 4 + k % 8 / 2].b[k / 8];
            d[c] += bfloat16_half(x, k % 2) * bfloat16_half(y, k % 2);
        }
    }
}

}  // namespace sts::cuda
