// The tile unit (AMX) for kernels that multiply by it themselves; gemm_amx.cpp has the product, and these.
#pragma once

#include <cstdint>

#if (defined(__x86_64__) || defined(_M_X64)) && defined(__linux__) && defined(__GNUC__) && (defined(__clang__) || __GNUC__ >= 11)
#define W2S_HAS_AMX 1
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#else
#define W2S_HAS_AMX 0
#endif

#if W2S_HAS_AMX
namespace w2s {
namespace amx {

constexpr int64_t BLOCK = 32, STEP = 32;  // rows and columns of two by two tiles; depth of a tile
constexpr int64_t LINE = 64;              // bytes of a tile's row

// Eight tiles of 16 rows of 64 bytes, for as long as this lives.
struct Unit {
  Unit();
  ~Unit();
  Unit(const Unit&) = delete;
  Unit& operator=(const Unit&) = delete;
};

// `count` (at most BLOCK) rows src[k * sk + j * sj] of `depth`, as steps of [BLOCK rows][STEP]: tiles of a product's left side.
void pack_rows(const uint16_t* src, int64_t sk, int64_t sj, int64_t depth, int64_t count, uint16_t* dst);
// `count` columns of them, as steps of [STEP / 2][BLOCK] words of two neighbours along the depth: tiles of its right side.
void pack_columns(const uint16_t* src, int64_t sk, int64_t sj, int64_t depth, int64_t count, uint16_t* dst);

}  // namespace amx
}  // namespace w2s
#endif
