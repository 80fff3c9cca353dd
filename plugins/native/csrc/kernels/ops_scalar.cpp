// Norms, gates, rotations and attention: what every processor of the architecture has.

#include "../half.h"
#include "../isa.h"
#include "../ops.h"

namespace qhub {
namespace {

#define WIDTH 4
typedef float vec __attribute__((vector_size(WIDTH * 4)));

inline vec load_half(const uint16_t* from) {
  return vec{half_to_float(from[0]), half_to_float(from[1]), half_to_float(from[2]), half_to_float(from[3])};
}
inline void store_half(vec value, uint16_t* to) {
  for (size_t i = 0; i < WIDTH; ++i) to[i] = float_to_half(value[i]);
}

#include "ops.inc"

bool runs(const Cpu&) { return true; }

}  // namespace

extern const Ops ops_scalar;
const Ops ops_scalar{"scalar", runs, rms_norm, gate, add, rotate, dense, to_float, store, attend, sum};

}  // namespace qhub
