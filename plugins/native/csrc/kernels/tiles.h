// The tile registers of AMX, and the same in plain C++ for tests on processors without them (QHUB_EMULATE_TILES).
//
// Registers are named by literals 0 … 7. Loads say that they read memory: gcc 12's intrinsics do not say so, and declare 8 of the
// configuration's 64 bytes as read, so that stores which they depend on may be dropped or come too late.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace qhub {

// The operand of LDTILECFG (Intel SDM vol. 1, 18.3): per register the bytes of a row, and rows.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

#if !defined(QHUB_EMULATE_TILES)

#define TILE_CONFIGURE(config) __asm__ volatile("ldtilecfg %0" : : "m"(config))
#define TILE_RELEASE() __asm__ volatile("tilerelease")
#define TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile ::)
#define TILE_LOAD(tile, from, stride) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"(static_cast<size_t>(stride)) : "memory")
#define TILE_STORE(tile, to, stride) \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(to), "r"(static_cast<size_t>(stride)) : "memory")
// sums += a · b: both signed, four products a step
#define TILE_DOT(sums, a, b) __asm__ volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #sums ::)

#else

struct Tiles {
  TileConfig config{};
  alignas(64) uint8_t bytes[8][16][64] = {};

  static Tiles& mine() {
    static thread_local Tiles tiles;
    return tiles;
  }
  // What the processor answers with a fault.
  static void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "tiles: %s\n", what);
    std::abort();
  }
  void configure(const TileConfig& wanted) {
    require(wanted.palette == 1 && wanted.start_row == 0, "palette 1 from row 0 is all there is");
    for (uint8_t byte : wanted.reserved) require(byte == 0, "a reserved byte is not 0");
    for (int tile = 0; tile < 16; ++tile) {
      require(wanted.rows[tile] <= 16 && wanted.row_bytes[tile] <= 64, "a tile has 16 rows of 64 bytes at most");
      require(tile < 8 || (!wanted.rows[tile] && !wanted.row_bytes[tile]), "there are 8 tiles");
    }
    config = wanted;
    std::memset(bytes, 0, sizeof bytes);
  }
  void release() { config = TileConfig{}; }
  void check(int tile) const {
    require(config.palette == 1 && config.rows[tile] && config.row_bytes[tile], "a tile is used that is not configured");
  }
  void zero(int tile) {
    check(tile);
    std::memset(bytes[tile], 0, sizeof bytes[tile]);
  }
  void load(int tile, const void* from, size_t stride) {
    zero(tile);
    for (int row = 0; row < config.rows[tile]; ++row)
      std::memcpy(bytes[tile][row], static_cast<const uint8_t*>(from) + row * stride, config.row_bytes[tile]);
  }
  void store(int tile, void* to, size_t stride) const {
    check(tile);
    for (int row = 0; row < config.rows[tile]; ++row)
      std::memcpy(static_cast<uint8_t*>(to) + row * stride, bytes[tile][row], config.row_bytes[tile]);
  }
  void dot(int sums, int a, int b) {
    for (int tile : {sums, a, b}) check(tile);
    require(config.rows[sums] == config.rows[a] && config.row_bytes[sums] == config.row_bytes[b], "sums and factors differ in shape");
    require(config.row_bytes[a] == 4 * config.rows[b], "the factors differ in shape");
    for (int row = 0; row < config.rows[sums]; ++row)
      for (int step = 0; step < config.rows[b]; ++step)
        for (int column = 0; column < config.row_bytes[b] / 4; ++column) {
          int32_t sum;
          std::memcpy(&sum, bytes[sums][row] + 4 * column, sizeof sum);
          for (int i = 0; i < 4; ++i) {
            const int left = static_cast<int8_t>(bytes[a][row][4 * step + i]), right = static_cast<int8_t>(bytes[b][step][4 * column + i]);
            sum += left * right;
          }
          std::memcpy(bytes[sums][row] + 4 * column, &sum, sizeof sum);
        }
  }
};

#define TILE_CONFIGURE(config) Tiles::mine().configure(config)
#define TILE_RELEASE() Tiles::mine().release()
#define TILE_ZERO(tile) Tiles::mine().zero(tile)
#define TILE_LOAD(tile, from, stride) Tiles::mine().load(tile, from, stride)
#define TILE_STORE(tile, to, stride) Tiles::mine().store(tile, to, stride)
#define TILE_DOT(sums, a, b) Tiles::mine().dot(sums, a, b)

#endif

}  // namespace qhub
