// What this machine gives, and how long a product takes by a plan: what the kernel selector decides by.
#pragma once

#include <memory>
#include <vector>

#include "linear.h"

namespace qhub {

// Bytes per second that the pool's threads read from memory: the best pass over `bytes` within `seconds`.
double read_bandwidth(Pool& pool, const Ops& ops, size_t bytes, double seconds);

// Int8 operations per second that the pool's threads reach with the kernel's instruction alone: the best pass within `seconds`; 0
// where the kernel does not tell.
double peak_operations(Pool& pool, const Kernel& kernel, double seconds);

// Seconds of each product of m rows with a matrix of these, which have one shape, taken in turn so that they are not in the cache
// because they were used just now; as many as fit into `seconds`, four at least.
std::vector<double> time_plan(const Engine& engine, const std::vector<std::shared_ptr<Linear>>& alike, size_t m, const Plan& plan, double seconds);

}  // namespace qhub
