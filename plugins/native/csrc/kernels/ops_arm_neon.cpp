// Norms, gates, rotations and attention: NEON.
#if defined(__aarch64__)

#include <arm_neon.h>

#include "../half.h"
#include "../ops.h"

namespace qhub {
namespace {

#define WIDTH 4
typedef float vec __attribute__((vector_size(WIDTH * 4)));

inline vec load_half(const uint16_t* from) { return vec(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)))); }
inline void store_half(vec value, uint16_t* to) { vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(float32x4_t(value)))); }

#include "ops.inc"

bool runs(const Cpu& cpu) { return cpu.neon; }

}  // namespace

extern const Ops ops_neon;
const Ops ops_neon{"neon", runs, rms_norm, gate, add, rotate, dense, to_float, store, attend, sum};

}  // namespace qhub

#endif
