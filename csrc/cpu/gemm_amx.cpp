// The product of two bfloat16 matrices on the tile unit (AMX): 16 x 16 sums of 32 products an instruction, in float32.
//
// Two by two tiles of c are 32 x 32; each step of 32 along the depth loads two tiles of a, two of b, and multiplies four
// times (64 cycles of the unit, 32 of loads). Rows of a whose depth lies in one piece are loaded where they are; else a is
// packed, [32 rows][depth] with rows of 64 bytes. b is packed as words of two neighbours along the depth,
// [depth / 2][32 columns], squares of it turned where its depth lies in one piece. Which operand is `a` is a matter of what
// that costs: few rows h times W^T are W h^T, with W in place and h packed, whose tiles are turned as they are stored.
//
// Sums are in pieces of DEPTH, whose order depends on the shapes alone, so no number of threads changes a bit. Subnormal
// operands and results count as 0 (the unit's own arithmetic). Measured on one core of a Xeon with AMX: 10 to 15 times the
// float32 product.
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
constexpr int64_t DEPTH = 512;            // of a sum: a block's operands, 32 KiB each, come from L1 and L2
constexpr int64_t PACKED = 1 << 19;       // elements of b that are packed at a time: half of L2
constexpr int64_t DEEP = 2048;            // depth that is packed at a time
constexpr int64_t TILES = 4, MOST = 4096;  // blocks of rows of one piece of work; rows that are packed at a time
constexpr int64_t FEW_ROWS = 128;         // rows for which every thread packs its own columns of b, next to using them
static_assert(FEW_ROWS <= TILES * BLOCK);
constexpr int64_t GROUP = 8;              // panels of b packed side by side, so that lines of a row come in a row

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

// One step of the depth of BLOCK rows of a, dst[j][k], a line each; or of columns of b: dst[w][j], a word
// (x[2w, j], x[2w + 1, j]) each. What is not there is 0.
void pack_step(const uint16_t* src, int64_t sk, int64_t sj, int64_t left, int64_t count, bool rows, uint16_t* dst) {
  if (!rows && sj == 1 && count >= BLOCK && left >= STEP) {
    const __m512i even = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i low = _mm512_add_epi32(_mm512_or_si512(even, _mm512_slli_epi32(even, 16)), _mm512_set1_epi32(0x00200000));
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(0x00100010));  // j, 32 + j of the second half
    for (int64_t w = 0; w < STEP / 2; ++w, src += 2 * sk, dst += 2 * BLOCK) {
      __builtin_prefetch(src + STEP * sk);
      __builtin_prefetch(src + (STEP + 1) * sk);
      const __m512i x = _mm512_loadu_si512(src), y = _mm512_loadu_si512(src + sk);
      _mm512_store_si512(dst, _mm512_permutex2var_epi16(x, low, y));
      _mm512_store_si512(dst + BLOCK, _mm512_permutex2var_epi16(x, high, y));
    }
    return;
  }
  const int64_t down = rows ? STEP : 2 * BLOCK, across = rows ? 16 * STEP : 2 * 16;  // of a square, and of its halves
  for (int64_t half = 0; half < 2; ++half) {
    if (sk == 1)  // lines one below the other, which hardware does not follow
      for (int64_t j = 0; j < 16; ++j) __builtin_prefetch(src + 4 * STEP + (16 * half + j) * sj);
    avx512::Float square[16];
    word_square(src + 16 * half * sj, sk, sj, std::clamp<int64_t>(count - 16 * half, 0, 16), left, rows, square);
    for (int64_t i = 0; i < 16; ++i) square[i].store(reinterpret_cast<float*>(dst + half * across + i * down));
  }
}

// Rows of a block as its tiles load them: `steps` of the depth where they lie, and one more, padded, if `rest` is there.
struct Left {
  const uint16_t* data;
  int64_t down, step, steps;  // from row to row and from step to step, in elements
  const uint16_t* rest;
};

template <int I, int J>
[[gnu::always_inline]] inline void multiply_step(const uint16_t* a, int64_t down, const uint16_t* b) {
  _tile_loadd(4, a, down * 2);
  _tile_loadd(6, b, 2 * LINE);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (J == 2) {
    _tile_loadd(7, b + 32, 2 * LINE);
    _tile_dpbf16ps(1, 4, 7);
  }
  if constexpr (I == 2) {
    _tile_loadd(5, a + 16 * down, down * 2);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (J == 2) _tile_dpbf16ps(3, 5, 7);
  }
}

// sums to columns of c (c.down == 1)
void put_turned(const float* sum, int64_t rows, int64_t columns, Target<float> c, bool add) {
  for (int64_t i = 0; i < rows; i += 16)
    for (int64_t j = 0; j < columns; j += 16) {
      avx512::Float square[16];
#pragma GCC unroll 16
      for (int64_t k = 0; k < 16; ++k) square[k].v = _mm512_load_ps(sum + (i + k) * BLOCK + j);
      avx512::Float::transpose(square);
      const __mmask16 mask = first(rows - i);
      float* p = c.data + i + j * c.across;
#pragma GCC unroll 16
      for (int64_t k = 0; k < 16; ++k, p += c.across)
        if (j + k < columns) _mm512_mask_storeu_ps(p, mask, add ? _mm512_add_ps(_mm512_maskz_loadu_ps(mask, p), square[k].v) : square[k].v);
    }
}

void put(const float* sum, int64_t rows, int64_t columns, Target<float> c, bool add) {
  if (c.across == 1) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; j += 16) {
        const __mmask16 mask = first(columns - j);
        float* p = c.data + i * c.down + j;
        const __m512 x = _mm512_load_ps(sum + i * BLOCK + j);
        _mm512_mask_storeu_ps(p, mask, add ? _mm512_add_ps(_mm512_maskz_loadu_ps(mask, p), x) : x);
      }
    return;
  }
  if (c.down == 1) return put_turned(sum, rows, columns, c, add);
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t i = 0; i < rows; ++i) {
      float& p = c.data[i * c.down + j * c.across];
      p = add ? p + sum[i * BLOCK + j] : sum[i * BLOCK + j];
    }
}

// c (+)= a b for I x J tiles, of which rows x columns are stored. next: where the following block's sums will go, asked for
// while this one multiplies (or null), and next_a its rows of a where they lie. What comes is in registers: a value that went through memory would wait there until
// the sums of the block before had been written.
template <int I, int J>
void block(const Left& left, const uint16_t* b, int64_t rows, int64_t columns, float* c, int64_t c_down, int64_t c_across, bool add,
           const float* next, const uint16_t* next_a) {
  const bool direct = c_across == 1 && rows == 16 * I && columns == 16 * J;
  alignas(64) float sum[BLOCK][BLOCK];
  float* to = direct ? c : &sum[0][0];
  const int64_t down = direct ? c_down : BLOCK, stride = down * int64_t(sizeof(float));
  if (direct && add) {
    _tile_loadd(0, to, stride);
    if constexpr (J == 2) _tile_loadd(1, to + 16, stride);
    if constexpr (I == 2) _tile_loadd(2, to + 16 * down, stride);
    if constexpr (I == 2 && J == 2) _tile_loadd(3, to + 16 * down + 16, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const uint16_t* a = left.data;
  const int64_t steps = left.steps, a_down = left.down, a_step = left.step;
  for (int64_t s = 0; s < steps; ++s, a += a_step, b += BLOCK * STEP) {
    if (next && s < BLOCK / 4)
      for (int64_t i = 0; i < 4; ++i, next += c_down) {
        __builtin_prefetch(next, 1);
        __builtin_prefetch(next + 16, 1);
      }
    if (next_a) {
      const uint16_t* line = next_a + s * STEP;
      for (int64_t i = 0; i < BLOCK; ++i, line += a_down) __builtin_prefetch(line, 0, 2);
    }
    multiply_step<I, J>(a, a_down, b);
  }
  if (left.rest) multiply_step<I, J>(left.rest, STEP, b);
  _tile_stored(0, to, stride);
  if constexpr (J == 2) _tile_stored(1, to + 16, stride);
  if constexpr (I == 2) _tile_stored(2, to + 16 * down, stride);
  if constexpr (I == 2 && J == 2) _tile_stored(3, to + 16 * down + 16, stride);
  if (!direct) put(&sum[0][0], rows, columns, {c, c_down, c_across}, add);
}

const uint16_t* at(const Operand& x, int64_t i, int64_t j) {
  return static_cast<const uint16_t*>(x.data) + i * x.down + j * x.across;
}

// c (+)= a b. A block of work has rows [row, row + rows) of at most TILES blocks.
struct Product {
  const Operand& a;
  const Operand& b;
  Target<float> c;
  bool add;

  bool in_place() const { return a.across == 1; }

  // `count` columns of b from j on, a step of the depth after another; panels `pitch` apart
  void pack_columns(int64_t j, int64_t count, int64_t k0, int64_t depth, int64_t pitch, uint16_t* to) const {
    for (int64_t k = 0; k < depth; k += STEP)
      for (int64_t p = 0; p < count; p += BLOCK)
        pack_step(at(b, k0 + k, j + p), b.down, b.across, std::min(STEP, depth - k), std::min(BLOCK, count - p), false,
                  to + p / BLOCK * pitch + k * BLOCK);
  }
  void pack_rows(int64_t i, int64_t count, int64_t k0, int64_t depth, uint16_t* to) const {
    for (int64_t k = 0; k < depth; k += STEP)
      pack_step(at(a, i, k0 + k), a.across, a.down, std::min(STEP, depth - k), count, true, to + k * BLOCK);
  }
  // the same where they lie; what has to be padded goes to `spare`
  Left rows_of(int64_t i, int64_t count, int64_t k0, int64_t depth, uint16_t* spare) const {
    if (count % 16) {
      pack_rows(i, count, k0, depth, spare);
      return {spare, STEP, BLOCK * STEP, pieces(depth, STEP), nullptr};
    }
    const int64_t whole = depth / STEP, rest = depth % STEP;
    if (rest) pack_step(at(a, i, k0 + whole * STEP), 1, a.down, rest, count, true, spare);
    return {at(a, i, k0), a.down, STEP, whole, rest ? spare : nullptr};
  }

  // Rows [i, end) times columns [j, last) over [k0, k0 + depth): packed rows (or null) and columns are `height` and `pitch` apart.
  void multiply(int64_t i, int64_t end, int64_t j, int64_t last, int64_t k0, int64_t depth, const uint16_t* left, int64_t height,
                const uint16_t* right, int64_t pitch) const {
    Left lines[TILES];
    uint16_t* spare = left ? nullptr : scratch_of<uint16_t>(1, BLOCK * DEPTH + TILES * BLOCK * STEP);
    for (int64_t t = 0; i + t * BLOCK < end; ++t) {
      const int64_t row = i + t * BLOCK;
      if (left) lines[t] = {left + t * height, STEP, BLOCK * STEP, pieces(depth, STEP), nullptr};
      else lines[t] = rows_of(row, std::min(BLOCK, end - row), k0, depth, spare + t * BLOCK * STEP);  // the last may be longer
    }
    const Unit unit;
    for (int64_t p = j; p < last; p += BLOCK, right += pitch)
      for (int64_t t = 0; i + t * BLOCK < end; ++t) {
        const int64_t row = i + t * BLOCK, rows = std::min(BLOCK, end - row), columns = std::min(BLOCK, last - p);
        float* to = c.data + row * c.down + p * c.across;
        const float* next = nullptr;  // whole blocks alone: the one below, or the first of the next columns
        if (c.across == 1 && row + 2 * BLOCK <= end) next = to + BLOCK * c.down;
        else if (c.across == 1 && t > 0 && p + 2 * BLOCK <= last) next = c.data + i * c.down + p + BLOCK;
        const auto run = rows <= 16 ? columns <= 16 ? block<1, 1> : block<1, 2> : columns <= 16 ? block<2, 1> : block<2, 2>;
        const uint16_t* next_a = !left && p == j && row + 2 * BLOCK <= end ? at(a, row + BLOCK, k0) : nullptr;
        run(lines[t], right, rows, columns, to, c.down, c.across, add || k0 > 0, next, next_a);
      }
  }

  // Few rows: every thread packs its own columns of b, a group of panels and a piece of the depth at a time.
  void few() const {
    const int64_t M = a.rows, N = b.columns, K = a.columns, cut = cut_of(K), height = round_up(K, STEP) * BLOCK, tiles = pieces(M, BLOCK);
    uint16_t* left = in_place() ? nullptr : scratch_of<uint16_t>(1, tiles * height);
    if (left) parallel_items(tiles, 1, [&](int64_t t) { pack_rows(t * BLOCK, std::min(BLOCK, M - t * BLOCK), 0, K, left + t * height); });
    parallel_items(pieces(N, GROUP * BLOCK), 1, [&](int64_t group) {
      const int64_t j = group * GROUP * BLOCK, last = std::min(N, j + GROUP * BLOCK), pitch = cut * BLOCK;
      uint16_t* right = scratch_of<uint16_t>(0, GROUP * pitch);
      for (int64_t k = 0; k < K; k += cut) {
        const int64_t depth = std::min(cut, K - k);
        pack_columns(j, last - j, k, depth, pitch, right);
        multiply(0, M, j, last, k, depth, left ? left + k * BLOCK : nullptr, height, right, pitch);
      }
    });
  }

  // Both operands packed (a where it has to be) in parts that stay in L2, for all threads; a block of rows is one's work.
  void many() const {
    const int64_t M = a.rows, N = b.columns, K = a.columns, cut = cut_of(K), workers = threads();
    const int64_t deep = std::min(round_up(K, cut), DEEP / cut * cut);
    const int64_t columns = std::max(PACKED / deep / BLOCK, GROUP) * BLOCK, most = in_place() ? M : MOST;
    for (int64_t i0 = 0; i0 < M; i0 += most)
      for (int64_t k0 = 0; k0 < K; k0 += deep) {
        const int64_t rows = std::min(most, M - i0), depth = std::min(deep, K - k0), tiles = pieces(rows, BLOCK);
        const int64_t pitch = round_up(depth, STEP) * BLOCK;
        uint16_t* left = in_place() ? nullptr : scratch_of<uint16_t>(1, tiles * pitch);
        for (int64_t j0 = 0; j0 < N; j0 += columns) {
          const int64_t last = std::min(N, j0 + columns), panels = pieces(last - j0, BLOCK), to_pack = left && j0 == 0 ? tiles : 0;
          uint16_t* right = scratch_of<uint16_t>(0, panels * pitch);
          parallel_items(to_pack + pieces(panels, GROUP), 1, [&](int64_t item) {
            if (item < to_pack) return pack_rows(i0 + item * BLOCK, std::min(BLOCK, rows - item * BLOCK), k0, depth, left + item * pitch);
            const int64_t p = (item - to_pack) * GROUP, j = j0 + p * BLOCK;
            pack_columns(j, std::min(GROUP * BLOCK, last - j), k0, depth, pitch, right + p * pitch);
          });
          const int64_t blocks = std::min(tiles, pieces(pieces(tiles, TILES), workers) * workers);
          const int64_t groups = blocks >= workers ? 1 : std::min(panels, pieces(workers, blocks));
          parallel_items(blocks * groups, 1, [&](int64_t item) {
            const int64_t share = item / groups, group = item % groups, t = share * tiles / blocks, p = group * panels / groups;
            const int64_t i = i0 + t * BLOCK, end = std::min(i0 + rows, i0 + (share + 1) * tiles / blocks * BLOCK);
            const int64_t j = j0 + p * BLOCK, until = std::min(last, j0 + (group + 1) * panels / groups * BLOCK);
            for (int64_t k = 0; k < depth; k += cut)
              multiply(i, end, j, until, k0 + k, std::min(cut, depth - k), left ? left + t * pitch + k * BLOCK : nullptr, pitch,
                       right + p * pitch + k * BLOCK, pitch);
          });
        }
      }
  }

  static int64_t cut_of(int64_t K) { return round_up(pieces(K, pieces(K, DEPTH)), STEP); }

  // What packing costs, and storing tiles turned, in tenths of a cycle.
  double cost() const {
    const double M = double(a.rows), N = double(b.columns), K = double(a.columns);
    return (in_place() ? 0 : 3) * M * K + (b.across == 1 ? 1 : 2) * N * K + (c.across == 1 ? 0 : 5) * M * N * double(pieces(a.columns, DEPTH));
  }
  void run() const { a.rows <= FEW_ROWS ? few() : many(); }
};

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
  for (int64_t k = 0; k < depth; k += STEP) pack_step(src + k * sk, sk, sj, std::min(STEP, depth - k), count, true, dst + k * BLOCK);
}
void pack_columns(const uint16_t* src, int64_t sk, int64_t sj, int64_t depth, int64_t count, uint16_t* dst) {
  for (int64_t k = 0; k < depth; k += STEP) pack_step(src + k * sk, sk, sj, std::min(STEP, depth - k), count, false, dst + k * BLOCK);
}

}  // namespace amx

bool has_amx() {
  static const bool found = [] {
    const char* cap = std::getenv("W2S_FAST_CPU");  // a forced instruction set is that one and no more
    // the bfloat16 dots too: what is too small for tiles takes them, and attention rounds by their instructions
    return has_bf16_dot() && !(cap && *cap) && cpu_has_amx() && granted();
  }();
  return found;
}

void gemm_amx(const Operand& a, const Operand& b, Target<float> c, bool add) {
  const Operand x = b.t(), y = a.t();
  const Product straight{a, b, c, add}, turned{x, y, {c.data, c.across, c.down}, add};
  (straight.cost() <= turned.cost() ? straight : turned).run();
}

#else

bool has_amx() { return false; }
void gemm_amx(const Operand& a, const Operand& b, Target<float> c, bool add) { gemm(a, b, c, 1.0f, add); }

#endif

}  // namespace w2s
