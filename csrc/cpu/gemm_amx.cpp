// The product of two bfloat16 matrices on the tile unit (AMX): 16 x 16 sums of 32 products an instruction, in float32.
//
// Two by two tiles of c are 32 x 32; each step of 32 along the depth loads two tiles of a, two of b, and multiplies four
// times (64 cycles of the unit, 32 of loads). Packed a: [32 rows][depth] with rows of 64 bytes; packed b: words of two
// neighbours along the depth, [depth / 2][32 columns]. Sums order: depth alone, so no number of threads changes a bit.
// Subnormal operands and results count as 0 (the unit's own arithmetic). Measured on one core of a Xeon with AMX: 10 to
// 15 times the float32 product.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/amx.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"

#if W2S_HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace w2s {

#if W2S_HAS_AMX
namespace {

using amx::BLOCK, amx::STEP, amx::LINE, amx::Unit;
constexpr int64_t DEPTH = 512, ROWS = 256, COLUMNS = 2048;

W2S_TARGET_BEGIN(W2S_AVX512 ",amx-tile,amx-bf16")

struct alignas(64) Shape {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
  Shape() {
    for (int t = 0; t < 8; ++t) bytes[t] = 64, rows[t] = 16;
  }
};

__mmask16 first(int64_t n) { return __mmask16((1u << std::clamp<int64_t>(n, 0, 16)) - 1); }

// 16 words (x[k, j], x[k + 1, j]) of two rows one after another
__m512i whole_words(const uint16_t* p, int64_t sk) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + sk)));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// the same of src[k * sk + j * sj] for j < n
__m512i words(const uint16_t* p, int64_t sk, int64_t sj, int64_t n, bool both) {
  if (sj == 1) {
    const __mmask16 mask = first(n);
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
    if (!both) return low;
    return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p + sk)), 16));
  }
  alignas(64) uint32_t pair[16] = {};
  for (int64_t j = 0; j < n; ++j) pair[j] = p[j * sj] | (both ? uint32_t(p[sk + j * sj]) << 16 : 0u);
  return _mm512_load_si512(pair);
}

// 16 x 16 words of src[k * sk + j * sj], `left` of its depth and n of its columns there: a row of them a column j, or a
// row a word.
void word_square(const uint16_t* src, int64_t sk, int64_t sj, int64_t n, int64_t left, bool row_a_column, avx512::Float (&square)[16]) {
  const bool whole = n == 16 && left == STEP;
  for (int64_t i = 0; i < 16; ++i) {
    __m512i row = _mm512_setzero_si512();
    if (sk == 1) {
      const __mmask32 there = left >= STEP ? ~__mmask32(0) : __mmask32((1u << left) - 1);
      if (whole) row = _mm512_loadu_si512(src + i * sj);
      else if (i < n) row = _mm512_maskz_loadu_epi16(there, src + i * sj);
    } else {
      const uint16_t* p = src + 2 * i * sk;
      if (whole && sj == 1) row = whole_words(p, sk);
      else if (2 * i < left) row = words(p, sk, sj, n, 2 * i + 1 < left);
    }
    square[i].v = _mm512_castsi512_ps(row);
  }
  if ((sk == 1) != row_a_column) avx512::Float::transpose(square);
}

// Lines of both layouts lie one below the other, which hardware does not follow: the ones AHEAD steps on are asked for.
constexpr int64_t AHEAD = 4;
void ask(const uint16_t* src, int64_t sk, int64_t sj, int64_t k) {
  const uint16_t* p = src + (k + AHEAD * STEP) * sk;
  if (sk == 1) {
    for (int64_t j = 0; j < BLOCK; ++j) __builtin_prefetch(p + j * sj);
  } else if (sj == 1) {
    for (int64_t i = 0; i < STEP; ++i) __builtin_prefetch(p + i * sk);
  }
}

// Packed for the unit, a step of the depth after another. Rows of a: dst[j][k], a line each; columns of b: dst[w][j], a word
// (x[2w, j], x[2w + 1, j]) each. What is not there is 0.
void pack(const uint16_t* src, int64_t sk, int64_t sj, int64_t depth, int64_t count, bool rows, uint16_t* dst) {
  const int64_t down = rows ? STEP : 2 * BLOCK, across = rows ? 16 * STEP : 2 * 16;  // of a square, and of its halves
  for (int64_t k = 0; k < depth; k += STEP, dst += BLOCK * STEP) {
    ask(src, sk, sj, k);
    for (int64_t half = 0; half < 2; ++half) {
      avx512::Float square[16];
      word_square(src + k * sk + 16 * half * sj, sk, sj, std::clamp<int64_t>(count - 16 * half, 0, 16), std::min(STEP, depth - k), rows, square);
      for (int64_t i = 0; i < 16; ++i) square[i].store(reinterpret_cast<float*>(dst + half * across + i * down));
    }
  }
}

// c (+)= a b for a block of 32 x 32, of which rows x columns are stored
void block(int64_t steps, const uint16_t* a, const uint16_t* b, int64_t rows, int64_t columns, Target<float> c, bool add) {
  const bool direct = c.across == 1 && rows == BLOCK && columns == BLOCK;
  const int64_t stride = c.down * int64_t(sizeof(float));
  float* low = c.data + 16 * c.down;
  if (direct && add) {
    _tile_loadd(0, c.data, stride);
    _tile_loadd(1, c.data + 16, stride);
    _tile_loadd(2, low, stride);
    _tile_loadd(3, low + 16, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s, a += BLOCK * STEP, b += BLOCK * STEP) {
    _tile_loadd(4, a, LINE);
    _tile_loadd(6, b, 2 * LINE);
    _tile_loadd(7, b + 32, 2 * LINE);
    _tile_loadd(5, a + 16 * STEP, LINE);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  if (direct) {
    _tile_stored(0, c.data, stride);
    _tile_stored(1, c.data + 16, stride);
    _tile_stored(2, low, stride);
    _tile_stored(3, low + 16, stride);
    return;
  }
  alignas(64) float sum[BLOCK][BLOCK];
  _tile_stored(0, &sum[0][0], 2 * LINE);
  _tile_stored(1, &sum[0][16], 2 * LINE);
  _tile_stored(2, &sum[16][0], 2 * LINE);
  _tile_stored(3, &sum[16][16], 2 * LINE);
  if (c.across == 1) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; j += 16) {
        const __mmask16 mask = first(columns - j);
        float* p = c.data + i * c.down + j;
        const __m512 x = _mm512_load_ps(&sum[i][j]);
        _mm512_mask_storeu_ps(p, mask, add ? _mm512_add_ps(_mm512_maskz_loadu_ps(mask, p), x) : x);
      }
    return;
  }
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t i = 0; i < rows; ++i) {
      float& p = c.data[i * c.down + j * c.across];
      p = add ? p + sum[i][j] : sum[i][j];
    }
}

const uint16_t* at(const Operand& x, int64_t i, int64_t j) {
  return static_cast<const uint16_t*>(x.data) + i * x.down + j * x.across;
}

void product(const Operand& a, const Operand& b, Target<float> c, bool add) {
  const int64_t M = a.rows, N = b.columns, K = a.columns;
  const int64_t workers = threads();
  const int64_t tiles = pieces(M, BLOCK), cuts = pieces(K, DEPTH), depth0 = pieces(pieces(K, cuts), STEP) * STEP;
  const int64_t blocks = std::min(tiles, pieces(pieces(tiles, ROWS / BLOCK), workers) * workers);
  uint16_t* right = scratch_of<uint16_t>(0, depth0 * std::min(pieces(N, BLOCK) * BLOCK, COLUMNS));
  for (int64_t j0 = 0; j0 < N; j0 += COLUMNS) {
    const int64_t columns = std::min(COLUMNS, N - j0), panels = pieces(columns, BLOCK);
    const int64_t groups = blocks >= workers ? 1 : std::min(panels, pieces(workers, blocks));
    for (int64_t k0 = 0; k0 < K; k0 += depth0) {
      const int64_t depth = std::min(depth0, K - k0), steps = pieces(depth, STEP), size = steps * STEP * BLOCK;
      parallel_items(panels, 1, [&](int64_t p) {
        pack(at(b, k0, j0 + p * BLOCK), b.down, b.across, depth, std::min(BLOCK, columns - p * BLOCK), false, right + p * size);
      });
      parallel_items(blocks * groups, 1, [&](int64_t item) {
        const int64_t share = item / groups, group = item % groups;
        const int64_t t0 = share * tiles / blocks, t1 = (share + 1) * tiles / blocks;
        const int64_t p0 = group * panels / groups, p1 = (group + 1) * panels / groups;
        uint16_t* left = scratch_of<uint16_t>(1, (t1 - t0) * size);
        for (int64_t t = t0; t < t1; ++t)
          pack(at(a, t * BLOCK, k0), a.across, a.down, depth, std::min(BLOCK, M - t * BLOCK), true, left + (t - t0) * size);
        const Unit unit;
        for (int64_t p = p0; p < p1; ++p)
          for (int64_t t = t0; t < t1; ++t)
            block(steps, left + (t - t0) * size, right + p * size, std::min(BLOCK, M - t * BLOCK),
                  std::min(BLOCK, columns - p * BLOCK),
                  {c.data + t * BLOCK * c.down + (j0 + p * BLOCK) * c.across, c.down, c.across}, add || k0 > 0);
      });
    }
  }
}

void set_up() {
  static const Shape shape;
  _tile_loadconfig(&shape);
}
void give_back() { _tile_release(); }

W2S_TARGET_END

// The system gives the unit's registers to a process that asks.
bool granted() {
  constexpr long ASK = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
}

bool cpu_has_amx() {
  uint32_t a = 7, b, c = 0, d;
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return (d >> 22 & 1) && (d >> 24 & 1);  // amx-bf16, amx-tile
}

}  // namespace

namespace amx {

Unit::Unit() { set_up(); }
Unit::~Unit() { give_back(); }
void pack_rows(const uint16_t* src, int64_t sk, int64_t sj, int64_t depth, int64_t count, uint16_t* dst) {
  pack(src, sk, sj, depth, count, true, dst);
}
void pack_columns(const uint16_t* src, int64_t sk, int64_t sj, int64_t depth, int64_t count, uint16_t* dst) {
  pack(src, sk, sj, depth, count, false, dst);
}

}  // namespace amx

bool has_amx() {
  static const bool found = [] {
    const char* cap = std::getenv("W2S_FAST_CPU");  // a forced instruction set is that one and no more
    return isa() == Isa::avx512 && !(cap && *cap) && cpu_has_amx() && granted();
  }();
  return found;
}

void gemm_amx(const Operand& a, const Operand& b, Target<float> c, bool add) {
  if (c.across == 1) product(a, b, c, add);
  else product(b.t(), a.t(), {c.data, c.across, c.down}, add);
}

#else

bool has_amx() { return false; }
void gemm_amx(const Operand& a, const Operand& b, Target<float> c, bool add) { gemm(a, b, c, 1.0f, add); }

#endif

}  // namespace w2s
