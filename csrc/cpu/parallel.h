#pragma once
#include <cstdint>
#include <functional>

/// The threads of an op, and how it is abandoned.

namespace sts::cpu {

/// Calls task(worker, i) for every i in [0, n), each worker taking the next i in ascending order; worker is
/// in [0, n_workers). Threads live only for the call, so that a forked child can call it too. An exception
/// thrown by a task ends the others early and is thrown again here.
void parallel_for(int n_workers, int64_t n, const std::function<void(int worker, int64_t i)>& task);

/// A task that may take longer than a tenth of a second calls this often. It throws where the op is abandoned: on the
/// thread that called the op what the function of set_poll throws, on the other workers an exception that ends them.
void poll();

}  // namespace sts::cpu
