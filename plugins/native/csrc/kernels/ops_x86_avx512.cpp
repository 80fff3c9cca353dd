// Norms, gates, rotations and attention: AVX-512.
#if defined(__x86_64__)

#include <immintrin.h>

#include "../half.h"
#include "../isa.h"
#include "../ops.h"

QHUB_ISA_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")

namespace qhub {
namespace {

#define WIDTH 16
typedef float vec __attribute__((vector_size(WIDTH * 4)));

inline vec load_half(const uint16_t* from) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
inline void store_half(vec value, uint16_t* to) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(value, 0)); }

#include "ops.inc"

bool runs(const Cpu& cpu) { return cpu.avx512_vnni; }

}  // namespace

extern const Ops ops_avx512;
const Ops ops_avx512{"avx512", runs, rms_norm, gate, add, rotate, dense, to_float, store, attend, sum};

}  // namespace qhub

QHUB_ISA_END

#endif
