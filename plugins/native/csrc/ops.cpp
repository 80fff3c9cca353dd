#include "ops.h"

#include <cstring>

namespace qhub {

extern const Ops ops_scalar;
#if defined(__x86_64__)
extern const Ops ops_avx512, ops_avx2;
#elif defined(__aarch64__)
extern const Ops ops_neon;
#endif

namespace {

const Ops* const kAll[] = {  // best first
#if defined(__x86_64__)
    &ops_avx512,
    &ops_avx2,
#elif defined(__aarch64__)
    &ops_neon,
#endif
    &ops_scalar,
};

}  // namespace

const Ops& ops(const Cpu& cpu) {
  for (const Ops* candidate : kAll)
    if (candidate->runs(cpu)) return *candidate;
  return ops_scalar;
}

const Ops* ops_named(const char* name) {
  for (const Ops* candidate : kAll)
    if (!std::strcmp(candidate->name, name)) return candidate;
  return nullptr;
}

}  // namespace qhub
