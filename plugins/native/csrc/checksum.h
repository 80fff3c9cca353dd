// A fast checksum of large memory: to find a damaged file, not to withstand an adversary.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pool.h"

namespace qhub {

uint64_t checksum(Pool& pool, const uint8_t* bytes, size_t count);

}  // namespace qhub
