// What this machine gives, and how long a product takes by a plan: what the kernel selector decides by.
#pragma once

#include <memory>
#include <vector>

#include "linear.h"

namespace qhub {

// Bytes per second that the pool's threads read from memory: the best pass over `bytes` within `seconds`.
double read_bandwidth(Pool& pool, const Ops& ops, size_t bytes, double seconds);

// Seconds of one product of m rows with a matrix of these, which have one shape, taken in turn so that they are not in the cache
// because they were used just now; the lower quartile (others' work disturbs the rest) of what fits into `seconds`, four at least.
double time_plan(const Engine& engine, const std::vector<std::shared_ptr<Linear>>& alike, size_t m, const Plan& plan, double seconds);

}  // namespace qhub
