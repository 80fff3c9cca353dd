// Norms, gates, rotations and attention: AVX2 with FMA and F16C.
#if defined(__x86_64__)

#include <immintrin.h>

#include "../half.h"
#include "../isa.h"
#include "../ops.h"

QHUB_ISA_BEGIN("avx2,fma,f16c")

namespace qhub {
namespace {

#define WIDTH 8
typedef float vec __attribute__((vector_size(WIDTH * 4)));

inline vec load_half(const uint16_t* from) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }
inline void store_half(vec value, uint16_t* to) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value, 0)); }

#include "ops.inc"

bool runs(const Cpu& cpu) { return cpu.avx2; }

}  // namespace

extern const Ops ops_avx2;
const Ops ops_avx2{"avx2", runs, rms_norm, gate, add, rotate, dense, to_float, store, attend, sum};

}  // namespace qhub

QHUB_ISA_END

#endif
