// What this processor can run, and what the operating system lets it run.
#pragma once

namespace qhub {

struct Cpu {
  bool avx2 = false;         // with FMA and F16C
  bool avx_vnni = false;     // 256-bit vpdpbusd, VEX encoded
  bool avx512_vnni = false;  // F, BW, VL, DQ and VNNI
  bool amx_int8 = false;     // and the kernel gave us the tiles
  bool neon = false;
  bool dotprod = false;
  bool i8mm = false;
};

// Read once; thread-safe.
const Cpu& cpu();

}  // namespace qhub
