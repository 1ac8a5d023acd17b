// The product of two bfloat16 matrices with the machine's own dot instruction: two neighbours along the depth lie in one
// word, so a word of a times a vector of words of b is two multiply-adds a lane, in float32. Twice the rate of widening
// (Zen 5, Sapphire Rapids). Blocking as in gemm.cpp.
//
// Packing the large operand costs as much as two dozen rows of products, so for fewer rows it is read where it lies: rows of
// W times rows along a shared depth (z = W h^T: up to 8 as sums along it, up to SOME as the vector, with words of W
// broadcast, of which up to FEW_COLUMNS by whole tiles), or up to FEW rows of coefficients times rows of W (dh = dz W).
// Zen 4, 1024 x 1024, us of 16 rows: 164 and 184 (torch.mm 220 and 240), and 164 at the rate of its dot instruction.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "cpu/gemm.h"
#include "cpu/parallel.h"

#if W2S_X86 && defined(__GNUC__) && (defined(__clang__) || __GNUC__ >= 10)
#define W2S_HAS_DOT 1
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#define W2S_DOT W2S_AVX512 ",avx512bf16"
#else
#define W2S_HAS_DOT 0
#endif

namespace w2s {

#if W2S_HAS_DOT
namespace {

constexpr int HEIGHT = 14, WIDTH = 32;                     // a register tile: 28 of 32 registers
constexpr int64_t DEPTH = 384, ROWS = 168, COLUMNS = 2048;  // depth in words
constexpr int64_t AHEAD = 32;                              // rows asked for beforehand: no prefetcher follows them
constexpr int64_t FEWEST = 2;                               // rows for which the tile unit (AMX) is no quicker
constexpr int64_t DOTS = 8;                                 // rows for which sums along the depth are quickest
constexpr int64_t SOME = 256;                               // rows for which no more than they are packed
constexpr int64_t VECTOR = 16, FEW_COLUMNS = 128;           // between them by tiles that read the other operand where it lies,
constexpr int64_t SHALLOW = 256;                            // and up to SOME columns of such a depth
constexpr int64_t ALONG = 256, NEAR = 1 << 18;             // a depth at which it is c that takes time; bytes of b in L2
constexpr int IN_PLACE = 12;                                // rows of such a tile

W2S_TARGET_BEGIN(W2S_DOT)

// words (x[j], y[j]) of 32 columns
struct Words {
  __m512i low, high;
};
[[gnu::always_inline]] inline Words interleaved(__m512i x, __m512i y) {  // a call in a loop would keep its sums in memory
  const __m512i step = _mm512_set1_epi32(0x00200000), even = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i first = _mm512_add_epi32(_mm512_or_si512(even, _mm512_slli_epi32(even, 16)), step);  // j, 32 + j
  return {_mm512_permutex2var_epi16(x, first, y), _mm512_permutex2var_epi16(x, _mm512_add_epi32(first, _mm512_set1_epi32(0x00100010)), y)};
}

// dst[w * width + j] = the pair (x[2w, j], x[2w + 1, j]) for x[k, j] = src[k * sk + j * sj], zero past `depth` and `columns`
void pack_words(const uint16_t* src, int64_t sk, int64_t sj, int64_t depth, int64_t columns, int64_t width, uint32_t* dst) {
  const int64_t whole = depth / 2, words = pieces(depth, 2);
  int64_t first = 0;
  if (sk == 1) {
    for (; first < words; first += 16) {  // a word is two neighbours in memory: squares of words, turned
      const int64_t left = std::min<int64_t>(depth - 2 * first, 32), lines = std::min<int64_t>(words - first, 16);
      const __mmask32 there = left == 32 ? ~__mmask32(0) : __mmask32((1u << left) - 1);
      for (int64_t j = 0; j < width; j += 16) {
        const int64_t room = std::min<int64_t>(16, width - j);
        const __mmask16 fits = __mmask16((1u << room) - 1);
        avx512::Float square[16];
        for (int64_t i = 0; i < 16; ++i) {
          const uint16_t* p = src + 2 * first + (j + i) * sj;
          square[i].v = _mm512_castsi512_ps(j + i < columns ? _mm512_maskz_loadu_epi16(there, p) : _mm512_setzero_si512());
          __builtin_prefetch(p + width * sj);  // the next panel's
        }
        avx512::Float::transpose(square);
        for (int64_t i = 0; i < lines; ++i) _mm512_mask_storeu_ps(dst + (first + i) * width + j, fits, square[i].v);
      }
    }
    return;
  }
  if (sj == 1 && width == WIDTH && columns == WIDTH)
    for (; first < whole; ++first) {
      const uint16_t* p = src + 2 * first * sk;
      __builtin_prefetch(p + AHEAD * sk);
      __builtin_prefetch(p + (AHEAD + 1) * sk);
      const Words words = interleaved(_mm512_loadu_si512(p), _mm512_loadu_si512(p + sk));
      _mm512_storeu_si512(dst + first * WIDTH, words.low);
      _mm512_storeu_si512(dst + first * WIDTH + 16, words.high);
    }
  for (int64_t w = first; w < words; ++w)
    for (int64_t j = 0; j < width; j += 16) {
      const int64_t n = std::clamp<int64_t>(columns - j, 0, 16), room = std::min<int64_t>(16, width - j);
      const __mmask16 mask = __mmask16((1u << n) - 1), fits = __mmask16((1u << room) - 1);
      const uint16_t* p = src + 2 * w * sk + j * sj;
      __m512i pairs = _mm512_setzero_si512();
      if (sj == 1) {
        __builtin_prefetch(p + AHEAD * sk);
        __builtin_prefetch(p + (AHEAD + 1) * sk);
        pairs = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
        if (w < whole) pairs = _mm512_or_si512(pairs, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p + sk)), 16));
      } else {
        alignas(64) uint32_t pair[16] = {};
        for (int64_t i = 0; i < n; ++i) pair[i] = p[i * sj] | (w < whole ? uint32_t(p[sk + i * sj]) << 16 : 0u);
        pairs = _mm512_load_si512(pair);
      }
      _mm512_mask_storeu_epi32(dst + w * width + j, fits, pairs);
    }
}

// p[j] = sum[j] or p[j] += sum[j] for the columns that there are, at most 16
[[gnu::always_inline]] inline void put(float* p, int64_t columns, __m512 sum, bool add) {
  const __mmask16 there = __mmask16((1u << std::clamp<int64_t>(columns, 0, 16)) - 1);
  _mm512_mask_storeu_ps(p, there, add ? _mm512_add_ps(_mm512_maskz_loadu_ps(there, p), sum) : sum);
}

// The same, rounded to bfloat16.
[[gnu::always_inline]] inline void put(uint16_t* p, int64_t columns, __m512 sum, bool) {
  const __mmask16 there = __mmask16((1u << std::clamp<int64_t>(columns, 0, 16)) - 1);
  _mm256_mask_storeu_epi16(p, there, (__m256i)_mm512_cvtneps_pbh(sum));
}

// c (+)= lanes, rows `width` apart
template <class C>
void scatter(const float* lanes, int64_t width, int64_t rows, int64_t columns, Target<C> c, bool add) {
  if (c.across == 1) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; j += 16) put(c.data + i * c.down + j, columns - j, _mm512_loadu_ps(lanes + i * width + j), add);
    return;
  }
  if constexpr (sizeof(C) == sizeof(float))
    for (int64_t j = 0; j < columns; ++j)  // c is mostly stored by columns then
      for (int64_t i = 0; i < rows; ++i) {
        float& p = c.data[i * c.down + j * c.across];
        p = add ? p + lanes[i * width + j] : lanes[i * width + j];
      }
}

// c (+)= the sums of a register tile
template <int M, class C>
[[gnu::always_inline]] inline void store(const __m512 (&sum)[M][2], int64_t rows, int64_t columns, Target<C> c, bool add) {
  if (c.across == 1 && rows == M) {
#pragma GCC unroll 14
    for (int i = 0; i < M; ++i) {
      put(c.data + i * c.down, columns, sum[i][0], add);
      put(c.data + i * c.down + 16, columns - 16, sum[i][1], add);
    }
    return;
  }
  float lanes[M][WIDTH];
#pragma GCC unroll 14
  for (int i = 0; i < M; ++i) {
    _mm512_storeu_ps(&lanes[i][0], sum[i][0]);
    _mm512_storeu_ps(&lanes[i][16], sum[i][1]);
  }
  scatter(&lanes[0][0], WIDTH, rows, columns, c, add);
}

[[gnu::always_inline]] inline __m512bh word(const void* x) {  // two neighbours, in every lane
  int both;
  std::memcpy(&both, x, sizeof both);
  return (__m512bh)_mm512_set1_epi32(both);
}

template <int M, class C>
void tile(int64_t depth, const uint32_t* a, const uint32_t* b, int64_t rows, int64_t columns, Target<C> c, bool add) {
  __m512 sum[M][2];
#pragma GCC unroll 14
  for (int i = 0; i < M; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; ++k) {
    const __m512bh left = (__m512bh)_mm512_loadu_si512(b + k * WIDTH), right = (__m512bh)_mm512_loadu_si512(b + k * WIDTH + 16);
#pragma GCC unroll 14
    for (int i = 0; i < M; ++i) {
      const __m512bh x = (__m512bh)_mm512_set1_epi32(int(a[k * M + i]));
      sum[i][0] = _mm512_dpbf16_ps(sum[i][0], x, left);
      sum[i][1] = _mm512_dpbf16_ps(sum[i][1], x, right);
    }
  }
  store(sum, rows, columns, c, add);
}

template <class C>
void run_tile(int height, int64_t depth, const uint32_t* a, const uint32_t* b, int64_t rows, int64_t columns, Target<C> c, bool add) {
  switch (height) {
    case 2: return tile<2>(depth, a, b, rows, columns, c, add);
    case 4: return tile<4>(depth, a, b, rows, columns, c, add);
    case 6: return tile<6>(depth, a, b, rows, columns, c, add);
    case 8: return tile<8>(depth, a, b, rows, columns, c, add);
    case 10: return tile<10>(depth, a, b, rows, columns, c, add);
    case 12: return tile<12>(depth, a, b, rows, columns, c, add);
    default: return tile<14>(depth, a, b, rows, columns, c, add);
  }
}

// The same for rows of a where they lie, their depth in one piece: a word is taken from memory as it is multiplied.
template <class C>
void tile_in_place(int64_t depth, const uint16_t* a, int64_t a_down, const uint32_t* b, int64_t columns, Target<C> c, bool add) {
  __m512 sum[IN_PLACE][2];
#pragma GCC unroll 12
  for (int i = 0; i < IN_PLACE; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
  const char* quarter[IN_PLACE / 4];  // four rows from each: addresses that need no register of their own
  const int64_t down = 2 * a_down;
#pragma GCC unroll 3
  for (int q = 0; q < IN_PLACE / 4; ++q) quarter[q] = reinterpret_cast<const char*>(a + 4 * q * a_down);
  for (int64_t k = 0; k < depth; ++k) {
    const __m512bh left = (__m512bh)_mm512_loadu_si512(b + k * WIDTH), right = (__m512bh)_mm512_loadu_si512(b + k * WIDTH + 16);
#pragma GCC unroll 3
    for (int q = 0; q < IN_PLACE / 4; ++q) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512bh x = word(quarter[q] + i * down);
        sum[4 * q + i][0] = _mm512_dpbf16_ps(sum[4 * q + i][0], x, left);
        sum[4 * q + i][1] = _mm512_dpbf16_ps(sum[4 * q + i][1], x, right);
      }
      quarter[q] += 4;
    }
  }
  store(sum, IN_PLACE, columns, c, add);
}

const uint16_t* padded(const uint16_t* from, int64_t count, uint16_t* to) {
  std::memcpy(to, from, size_t(count) * 2);
  return to;
}

// c[i, j] of 16 / J (rounded down) rows of a and J of b, both with their depth in one piece; sums along it, then over the lanes.
template <int J>
void dots(int64_t depth, const uint16_t* a, int64_t a_down, int64_t rows, const uint16_t* b, int64_t b_down, int64_t columns,
          Target<float> c, bool add) {
  constexpr int I = 16 / J;
  const uint16_t *left[I], *right[J];
  for (int i = 0; i < I; ++i) left[i] = a + std::min<int64_t>(i, rows - 1) * a_down;  // rows that are not there: the last
  for (int j = 0; j < J; ++j) right[j] = b + std::min<int64_t>(j, columns - 1) * b_down;
  avx512::Float sum[16];
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) sum[k].v = _mm512_setzero_ps();  // I J of them are used
  // plain loads: with a masked one in the loop, the compiler keeps the sums in memory
  const auto step = [&](const uint16_t* const* x, const uint16_t* const* y, int64_t k) __attribute__((always_inline)) {
    __m512bh of_b[J];
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) of_b[j] = (__m512bh)_mm512_loadu_si512(y[j] + k);
#pragma GCC unroll 16
    for (int i = 0; i < I; ++i) {
      const __m512bh of_a = (__m512bh)_mm512_loadu_si512(x[i] + k);
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) sum[i * J + j].v = _mm512_dpbf16_ps(sum[i * J + j].v, of_a, of_b[j]);
    }
  };
  const int64_t whole = depth / 32 * 32;
  for (int64_t k = 0; k < whole; k += 32) step(left, right, k);
  if (whole < depth) {  // what is left, padded
    alignas(64) uint16_t rest[I + J][32] = {};
    const uint16_t *x[I], *y[J];
    for (int i = 0; i < I; ++i) x[i] = padded(left[i] + whole, depth - whole, rest[i]);
    for (int j = 0; j < J; ++j) y[j] = padded(right[j] + whole, depth - whole, rest[I + j]);
    step(x, y, 0);
  }
  avx512::Float::transpose(sum);
  __m512 total = sum[0].v;
#pragma GCC unroll 16
  for (int k = 1; k < 16; ++k) total = _mm512_add_ps(total, sum[k].v);
  alignas(64) float lanes[16];
  _mm512_store_ps(lanes, total);
  for (int64_t i = 0; i < std::min<int64_t>(I, rows); ++i)
    for (int64_t j = 0; j < std::min<int64_t>(J, columns); ++j) {
      float& p = c.data[i * c.down + j * c.across];
      p = add ? p + lanes[i * J + j] : lanes[i * J + j];
    }
}

constexpr int64_t LINES = 8;  // rows of W at a time: a set of L1 holds no more where they lie a power of two apart

// c[i, j] of 8 rows of a, read a word at a time where they lie, and the 16 NV columns of packed b.
template <int NV>
void lines(int64_t depth, const uint16_t* a, int64_t a_down, int64_t rows, const uint32_t* b, int64_t columns, Target<float> c, bool add) {
  constexpr int64_t STEP = 2 / NV, width = 16 * NV;  // 16 sums in flight: of two words, or of two vectors
  const uint16_t* left[LINES];
  for (int64_t i = 0; i < LINES; ++i) left[i] = a + std::min(i, rows - 1) * a_down;  // rows that are not there: the last
  alignas(64) float lanes[LINES][width] = {};
  const int64_t words = depth / 2, whole = words / STEP * STEP;
  for (int64_t w = 0; w < whole;) {  // in pieces, so that no sum is one long chain of roundings
    __m512 sum[LINES][2];
#pragma GCC unroll 8
    for (int i = 0; i < LINES; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    for (const int64_t end = std::min(whole, w + DEPTH); w < end; w += STEP) {
      const __m512bh first = (__m512bh)_mm512_loadu_si512(b + w * width), second = (__m512bh)_mm512_loadu_si512(b + w * width + 16);
#pragma GCC unroll 8
      for (int i = 0; i < LINES; ++i) {
        const uint16_t *x = left[i] + 2 * w, *y = x + 2 * (STEP - 1);
        sum[i][0] = _mm512_dpbf16_ps(sum[i][0], word(x), first);
        sum[i][1] = _mm512_dpbf16_ps(sum[i][1], word(y), second);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < LINES; ++i) {
      if (NV == 1) sum[i][0] = _mm512_add_ps(sum[i][0], sum[i][1]);
      for (int n = 0; n < NV; ++n) _mm512_store_ps(lanes[i] + 16 * n, _mm512_add_ps(_mm512_load_ps(lanes[i] + 16 * n), sum[i][n]));
    }
  }
  for (int64_t w = whole; w < pieces(depth, 2); ++w)  // what is left; behind an odd depth there is nothing to read
    for (int64_t i = 0; i < LINES; ++i) {
      uint32_t x = 0;
      std::memcpy(&x, left[i] + 2 * w, size_t(2 * std::min<int64_t>(2, depth - 2 * w)));
      for (int n = 0; n < NV; ++n)
        _mm512_store_ps(lanes[i] + 16 * n, _mm512_dpbf16_ps(_mm512_load_ps(lanes[i] + 16 * n), (__m512bh)_mm512_set1_epi32(int(x)),
                                                            (__m512bh)_mm512_loadu_si512(b + w * width + 16 * n)));
    }
  scatter(&lanes[0][0], width, std::min(LINES, rows), columns, c, add);
}

// c[i, 0 .. 32) += words of a, `step` apart, times rows of b, two a step
template <int M>
void strip(int64_t words, const uint32_t* a, int64_t step, const uint16_t* b, int64_t b_down, float* c, int64_t c_down, bool add) {
  __m512 sum[M][2];
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) {
    sum[i][0] = add ? _mm512_loadu_ps(c + i * c_down) : _mm512_setzero_ps();
    sum[i][1] = add ? _mm512_loadu_ps(c + i * c_down + 16) : _mm512_setzero_ps();
  }
  for (int64_t w = 0; w < words; ++w, b += 2 * b_down) {
    __builtin_prefetch(b + 64);  // two strips on: no prefetcher follows so many rows
    __builtin_prefetch(b + b_down + 64);
    const Words pair = interleaved(_mm512_loadu_si512(b), _mm512_loadu_si512(b + b_down));
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const __m512bh factor = (__m512bh)_mm512_set1_epi32(int(a[w * step + i]));
      sum[i][0] = _mm512_dpbf16_ps(sum[i][0], factor, (__m512bh)pair.low);
      sum[i][1] = _mm512_dpbf16_ps(sum[i][1], factor, (__m512bh)pair.high);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) {
    _mm512_storeu_ps(c + i * c_down, sum[i][0]);
    _mm512_storeu_ps(c + i * c_down + 16, sum[i][1]);
  }
}

constexpr int64_t DOWN = 512;  // rows of b that a strip walks down: fewer, and c goes to and fro too often

void whole_strip(int64_t rows, int64_t words, const uint32_t* a, int64_t step, const uint16_t* b, int64_t b_down, float* c, int64_t c_down,
                 bool add) {
  for (int64_t n = 0; rows > 0; rows -= n, a += n, c += n * c_down) {  // 16 are 8 and 8, not 12 and 4
    n = rows >= 20 || (rows >= 12 && rows < 16) ? 12 : rows >= 8 ? 8 : rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
    const auto run = n == 12 ? strip<12> : n == 8 ? strip<8> : n == 4 ? strip<4> : n == 2 ? strip<2> : strip<1>;
    run(words, a, step, b, b_down, c, c_down, add);
  }
}

// Where fewer than 32 columns or an odd number of rows are there, on copies that are padded.
void run_strip(int64_t rows, int64_t depth, const uint32_t* a, int64_t step, const uint16_t* b, int64_t b_down, int64_t columns, float* c,
               int64_t c_down, bool add) {
  const int64_t words = pieces(depth, 2);
  if (columns == 32 && depth % 2 == 0) return whole_strip(rows, words, a, step, b, b_down, c, c_down, add);
  alignas(64) uint16_t some[DOWN][32] = {};
  alignas(64) float sums[FEW][32] = {};
  for (int64_t k = 0; k < depth; ++k) std::memcpy(some[k], b + k * b_down, size_t(columns) * 2);
  for (int64_t i = 0; i < rows && add; ++i) std::memcpy(sums[i], c + i * c_down, size_t(columns) * 4);
  whole_strip(rows, words, a, step, some[0], 32, sums[0], 32, add);
  for (int64_t i = 0; i < rows; ++i) std::memcpy(c + i * c_down, sums[i], size_t(columns) * 4);
}

W2S_TARGET_END

const uint16_t* at(const Operand& x, int64_t i, int64_t j) {
  return static_cast<const uint16_t*>(x.data) + i * x.down + j * x.across;
}

// Whole words along the depth, and few columns to pay for packing by: a stays where it is.
bool stays(const Operand& a, const Operand& b) {
  return a.across == 1 && a.columns % 2 == 0 && b.columns <= (a.columns <= SHALLOW ? SOME : FEW_COLUMNS);
}

template <class C>
void product(const Operand& a, const Operand& b, Target<C> c, bool add) {
  const int64_t M = a.rows, N = b.columns, K = a.columns;
  const bool in_place = stays(a, b);
  const int height = in_place ? IN_PLACE : int(pieces(pieces(M, pieces(M, HEIGHT)), 2) * 2);
  const int64_t tiles = pieces(M, height), workers = threads();
  const int64_t cuts = pieces(K, 2 * DEPTH), depth0 = 2 * pieces(pieces(K, cuts), 2);  // even
  const int64_t blocks = std::min(tiles, pieces(pieces(tiles, std::max<int64_t>(1, ROWS / height)), workers) * workers);
  const bool along = K <= ALONG;  // what takes time is writing c: along its rows then
  const int64_t most = along ? std::clamp(NEAR / 2 / K / WIDTH * WIDTH, int64_t(WIDTH), COLUMNS) : COLUMNS;
  uint32_t* right = scratch_of<uint32_t>(0, depth0 / 2 * std::min(pieces(N, WIDTH) * WIDTH, most) + 64);
  for (int64_t j0 = 0; j0 < N; j0 += most) {
    const int64_t columns = std::min(most, N - j0), panels = pieces(columns, WIDTH);
    for (int64_t k0 = 0; k0 < K; k0 += depth0) {
      const int64_t depth = std::min(depth0, K - k0), words = pieces(depth, 2);
      parallel_items(panels, 1, [&](int64_t p) {
        pack_words(at(b, k0, j0 + p * WIDTH), b.down, b.across, depth, std::min<int64_t>(WIDTH, columns - p * WIDTH), WIDTH,
                   right + p * WIDTH * words);
      });
      parallel_items(blocks, 1, [&](int64_t block) {
        const int64_t t0 = block * tiles / blocks, t1 = (block + 1) * tiles / blocks;
        const int64_t packed = in_place ? std::max(t0, std::min(t1, M / height)) : t0;  // tiles before it are whole
        uint32_t* left = scratch_of<uint32_t>(1, (t1 - packed) * height * words + 64) - (packed - t0) * height * words;
        for (int64_t t = packed; t < t1; ++t)
          pack_words(at(a, t * height, k0), a.across, a.down, depth, std::min<int64_t>(height, M - t * height), height,
                     left + (t - t0) * height * words);
        const auto one = [&](int64_t t, int64_t p) {
          const int64_t wide = std::min<int64_t>(WIDTH, columns - p * WIDTH);
          const Target<C> to{c.data + t * height * c.down + (j0 + p * WIDTH) * c.across, c.down, c.across};
          const uint32_t* panel = right + p * WIDTH * words;
          if (t < packed) tile_in_place(words, at(a, t * height, k0), a.down, panel, wide, to, add || k0 > 0);
          else
            run_tile(height, words, left + (t - t0) * height * words, panel, std::min<int64_t>(height, M - t * height), wide, to,
                     add || k0 > 0);
        };
        for (int64_t t = t0; along && t < t1; ++t)
          for (int64_t p = 0; p < panels; ++p) one(t, p);
        for (int64_t p = 0; !along && p < panels; ++p)
          for (int64_t t = t0; t < t1; ++t) one(t, p);
      });
    }
  }
}

// c [rows, few] = a b^T of rows whose depth lies in one piece
void few_dots(const Operand& a, const Operand& b, Target<float> c, bool add) {
  constexpr decltype(&dots<1>) RUN[] = {dots<1>, dots<2>, dots<3>, dots<4>, dots<5>, dots<6>, dots<7>, dots<8>};
  const int64_t J = b.rows, I = 16 / J;
  parallel_items(pieces(a.rows, 64), 1, [&](int64_t block) {
    const int64_t end = std::min(a.rows, (block + 1) * 64);
    for (int64_t i = block * 64; i < end; i += I)
      RUN[J - 1](a.columns, at(a, i, 0), a.down, end - i, at(b, 0, 0), b.down, J, {c.data + i * c.down, c.down, c.across}, add);
  });
}

// c [rows, few] = a b^T where rows of a lie in one piece: few rows of b are the vector, 32 at a time
void few_lines(const Operand& a, const Operand& b, Target<float> c, bool add) {
  const int64_t words = pieces(a.columns, 2), width = b.rows <= 16 ? 16 : WIDTH, panels = pieces(b.rows, width);
  uint32_t* right = scratch_of<uint32_t>(0, words * panels * width + 64);
  parallel_items(panels, 1, [&](int64_t p) {
    pack_words(at(b, p * width, 0), b.across, b.down, a.columns, std::min(width, b.rows - p * width), width, right + p * width * words);
  });
  const int64_t share = std::clamp<int64_t>((1 << 16) / std::max<int64_t>(a.columns, 1) / LINES * LINES, LINES, 64);  // stay in L2
  parallel_items(pieces(a.rows, share), 1, [&](int64_t block) {
    const int64_t end = std::min(a.rows, (block + 1) * share);
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t i = block * share; i < end; i += LINES)
        (width == 16 ? lines<1> : lines<2>)(a.columns, at(a, i, 0), a.down, end - i, right + p * width * words,
                                            std::min(width, b.rows - p * width),
                                            {c.data + i * c.down + p * width * c.across, c.down, c.across}, add);
  });
}

// c [rows, some] = a b, rows of a in one piece; a tile stores rows of c
void some_rows(const Operand& a, const Operand& b, Target<float> c, bool add) {
  if (b.columns > VECTOR && c.across == 1 && stays(a, b)) product(a, b, c, add);
  else few_lines(a, b.t(), c, add);
}

// c [few, columns] = a b, rows of b and of c in one piece. A thread owns columns, and walks down b in blocks that stay in L1.
void few_rows(const Operand& a, const Operand& b, Target<float> c, bool add) {
  const int64_t words = pieces(a.columns, 2), share_columns = round_up(pieces(b.columns, threads()), 32);
  uint32_t* left = scratch_of<uint32_t>(1, a.rows * words);
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t w = 0; w < words; ++w) {
      const uint32_t next = 2 * w + 1 < a.columns ? *at(a, i, 2 * w + 1) : 0;
      left[w * a.rows + i] = *at(a, i, 2 * w) | next << 16;
    }
  parallel_items(pieces(b.columns, share_columns), 1, [&](int64_t share) {
    const int64_t end = std::min(b.columns, (share + 1) * share_columns);
    for (int64_t k = 0; k < a.columns; k += DOWN)
      for (int64_t j = share * share_columns; j < end; j += 32)
        run_strip(a.rows, std::min(DOWN, a.columns - k), left + k / 2 * a.rows, a.rows, at(b, k, j), b.down,
                  std::min<int64_t>(32, end - j), c.data + j, c.down, add || k > 0);
  });
}

}  // namespace

bool has_bf16_dot() {
  static const bool found = isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
  return found;
}

void gemm_bf16(const Operand& a, const Operand& b, Target<float> c, bool add) {
  if (a.rows == 0 || b.columns == 0 || a.columns == 0) return gemm(a, b, c, 1.0f, add);
  // beside a row or two, the tile unit waits for rows of the other operand that the dots read one after another
  const int64_t least = std::min(a.rows, b.columns);
  if (has_amx() && least > FEWEST) return gemm_amx(a, b, c, add);
  if (a.across == 1 && b.down == 1 && least <= DOTS) {
    if (b.columns <= a.rows) return few_dots(a, b.t(), c, add);
    return few_dots(b.t(), a, {c.data, c.across, c.down}, add);
  }
  if (a.across == 1 && b.columns <= std::min(SOME, a.rows)) return some_rows(a, b, c, add);
  if (b.down == 1 && a.rows <= SOME) return some_rows(b.t(), a.t(), {c.data, c.across, c.down}, add);
  if (a.rows <= FEW && b.across == 1 && c.across == 1) return few_rows(a, b, c, add);
  if (c.across == 1) product(a, b, c, add);
  else product(b.t(), a.t(), Target<float>{c.data, c.across, c.down}, add);
}

bool gemm_bf16_rounded(const Operand& a, const Operand& b, Target<uint16_t> c) {
  if (a.dtype != Dtype::bf16 || b.dtype != Dtype::bf16 || !has_bf16_dot()) return false;
  if (has_amx() || c.across != 1 || a.columns > 2 * DEPTH || !a.rows || !b.columns || !a.columns) return false;
  product(a, b, c, false);
  return true;
}

#else

bool has_bf16_dot() { return false; }
bool gemm_bf16_rounded(const Operand&, const Operand&, Target<uint16_t>) { return false; }
void gemm_bf16(const Operand& a, const Operand& b, Target<float> c, bool add) { gemm(a, b, c, 1.0f, add); }

#endif

}  // namespace w2s
