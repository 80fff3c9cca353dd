#include "cpu.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#include <cstdint>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace qhub {
namespace {

#if defined(__x86_64__) || defined(_M_X64)

struct Leaf {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Leaf leaf(uint32_t function, uint32_t index) {
  Leaf found;
  if (!__get_cpuid_count(function, index, &found.eax, &found.ebx, &found.ecx, &found.edx)) return {};
  return found;
}

bool bit(uint32_t word, int position) { return (word >> position) & 1; }

// Which register files the operating system saves (Intel SDM vol. 1, 13.3): bit 1 SSE, 2 AVX, 5-7 AVX-512, 17-18 AMX.
uint64_t enabled_states() {
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux hands out the tile registers only on request (Documentation/arch/x86/xstate.rst).
bool tiles_granted() {
#if defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

Cpu detect() {
  Cpu found;
  const Leaf basic = leaf(1, 0), extended = leaf(7, 0), second = leaf(7, 1);
  if (!bit(basic.ecx, 27)) return found;  // OSXSAVE: without it xgetbv does not exist
  const uint64_t states = enabled_states();
  const bool os_avx = (states & 0x6) == 0x6, os_avx512 = (states & 0xe6) == 0xe6, os_amx = (states & 0x60000) == 0x60000;
  found.avx2 = os_avx && bit(extended.ebx, 5) && bit(basic.ecx, 12) && bit(basic.ecx, 29);
  found.avx_vnni = found.avx2 && bit(second.eax, 4);
  const bool base = bit(extended.ebx, 16) && bit(extended.ebx, 17) && bit(extended.ebx, 30) && bit(extended.ebx, 31);
  found.avx512_vnni = found.avx2 && os_avx512 && base && bit(extended.ecx, 11);
  const bool amx = found.avx512_vnni && os_amx && bit(extended.edx, 24) && bit(extended.edx, 25);
  found.amx_int8 = amx && tiles_granted();
  return found;
}

#elif defined(__aarch64__)

Cpu detect() {
  Cpu found;
  found.neon = true;
#if defined(__linux__)
  constexpr unsigned long kDotprod = 1UL << 20, kI8mm = 1UL << 13;  // HWCAP_ASIMDDP, HWCAP2_I8MM
  found.dotprod = getauxval(AT_HWCAP) & kDotprod;
  found.i8mm = getauxval(AT_HWCAP2) & kI8mm;
#elif defined(__APPLE__)
  auto has = [](const char* name) {
    int value = 0;
    size_t bytes = sizeof value;
    return sysctlbyname(name, &value, &bytes, nullptr, 0) == 0 && value == 1;
  };
  found.dotprod = has("hw.optional.arm.FEAT_DotProd");
  found.i8mm = has("hw.optional.arm.FEAT_I8MM");
#endif
  return found;
}

#else
Cpu detect() { return {}; }
#endif

}  // namespace

const Cpu& cpu() {
  static const Cpu found = detect();
  return found;
}

}  // namespace qhub
