// The product of two bfloat16 matrices with the machine's own dot instruction: two neighbours along the depth lie in one
// word, so a word of a times a vector of words of b is two multiply-adds a lane, in float32. Twice the rate of widening
// (Zen 5, Sapphire Rapids). Blocking as in gemm.cpp.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

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

W2S_TARGET_BEGIN(W2S_DOT)

// dst[w * width + j] = the pair (x[2w, j], x[2w + 1, j]) for x[k, j] = src[k * sk + j * sj], zero past `depth` and `columns`
void pack_words(const uint16_t* src, int64_t sk, int64_t sj, int64_t depth, int64_t columns, int64_t width, uint32_t* dst) {
  const int64_t whole = depth / 2;
  int64_t first = 0;
  if (sk == 1)
    for (; first + 16 <= whole; first += 16)  // a word is two neighbours in memory: squares of words, turned
      for (int64_t j = 0; j < width; j += 16) {
        const int64_t room = std::min<int64_t>(16, width - j);
        const __mmask16 fits = __mmask16((1u << room) - 1);
        avx512::Float square[16];
        for (int64_t i = 0; i < 16; ++i) {
          const uint16_t* p = src + 2 * first + (j + i) * sj;
          square[i] = j + i < columns ? avx512::Float::load(reinterpret_cast<const float*>(p)) : avx512::Float::set(0);
          __builtin_prefetch(p + width * sj);  // the next panel's
        }
        avx512::Float::transpose(square);
        for (int64_t i = 0; i < 16; ++i) _mm512_mask_storeu_ps(dst + (first + i) * width + j, fits, square[i].v);
      }
  for (int64_t w = first; w < pieces(depth, 2); ++w)
    for (int64_t j = 0; j < width; j += 16) {
      const int64_t n = std::clamp<int64_t>(columns - j, 0, 16), room = std::min<int64_t>(16, width - j);
      const __mmask16 mask = __mmask16((1u << n) - 1), fits = __mmask16((1u << room) - 1);
      const uint16_t* p = src + 2 * w * sk + j * sj;
      __m512i words = _mm512_setzero_si512();
      if (sj == 1) {
        __builtin_prefetch(p + AHEAD * sk);
        __builtin_prefetch(p + (AHEAD + 1) * sk);
        words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
        if (w < whole) words = _mm512_or_si512(words, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p + sk)), 16));
      } else {
        alignas(64) uint32_t pair[16] = {};
        for (int64_t i = 0; i < n; ++i) pair[i] = p[i * sj] | (w < whole ? uint32_t(p[sk + i * sj]) << 16 : 0u);
        words = _mm512_load_si512(pair);
      }
      _mm512_mask_storeu_epi32(dst + w * width + j, fits, words);
    }
}

template <int M>
void tile(int64_t depth, const uint32_t* a, const uint32_t* b, int64_t rows, int64_t columns, Target<float> c, bool add) {
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
  if (c.across == 1) {
#pragma GCC unroll 14
    for (int i = 0; i < M; ++i) {
      if (i >= rows) return;
#pragma GCC unroll 2
      for (int n = 0; n < 2; ++n) {
        const int64_t left = std::clamp<int64_t>(columns - n * 16, 0, 16);
        const __mmask16 mask = __mmask16((1u << left) - 1);
        float* p = c.data + i * c.down + n * 16;
        const __m512 x = add ? _mm512_add_ps(_mm512_maskz_loadu_ps(mask, p), sum[i][n]) : sum[i][n];
        _mm512_mask_storeu_ps(p, mask, x);
      }
    }
    return;
  }
  float lanes[M][WIDTH];
  for (int i = 0; i < M; ++i)
    for (int n = 0; n < 2; ++n) _mm512_storeu_ps(&lanes[i][n * 16], sum[i][n]);
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t i = 0; i < rows; ++i) {
      float& p = c.data[i * c.down + j * c.across];
      p = add ? p + lanes[i][j] : lanes[i][j];
    }
}

void run_tile(int height, int64_t depth, const uint32_t* a, const uint32_t* b, int64_t rows, int64_t columns, Target<float> c, bool add) {
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

W2S_TARGET_END

const uint16_t* at(const Operand& x, int64_t i, int64_t j) {
  return static_cast<const uint16_t*>(x.data) + i * x.down + j * x.across;
}

void product(const Operand& a, const Operand& b, Target<float> c, bool add) {
  const int64_t M = a.rows, N = b.columns, K = a.columns;
  const int height = int(pieces(pieces(M, pieces(M, HEIGHT)), 2) * 2);
  const int64_t tiles = pieces(M, height), workers = threads();
  const int64_t cuts = pieces(K, 2 * DEPTH), depth0 = 2 * pieces(pieces(K, cuts), 2);  // even
  const int64_t blocks = std::min(tiles, pieces(pieces(tiles, std::max<int64_t>(1, ROWS / height)), workers) * workers);
  uint32_t* right = scratch_of<uint32_t>(0, depth0 / 2 * std::min(pieces(N, WIDTH) * WIDTH, COLUMNS) + 64);
  for (int64_t j0 = 0; j0 < N; j0 += COLUMNS) {
    const int64_t columns = std::min(COLUMNS, N - j0), panels = pieces(columns, WIDTH);
    for (int64_t k0 = 0; k0 < K; k0 += depth0) {
      const int64_t depth = std::min(depth0, K - k0), words = pieces(depth, 2);
      parallel_items(panels, 1, [&](int64_t p) {
        pack_words(at(b, k0, j0 + p * WIDTH), b.down, b.across, depth, std::min<int64_t>(WIDTH, columns - p * WIDTH), WIDTH,
                   right + p * WIDTH * words);
      });
      parallel_items(blocks, 1, [&](int64_t block) {
        const int64_t t0 = block * tiles / blocks, t1 = (block + 1) * tiles / blocks;
        uint32_t* left = scratch_of<uint32_t>(1, (t1 - t0) * height * words + 64);
        for (int64_t t = t0; t < t1; ++t)
          pack_words(at(a, t * height, k0), a.across, a.down, depth, std::min<int64_t>(height, M - t * height), height,
                     left + (t - t0) * height * words);
        for (int64_t p = 0; p < panels; ++p)
          for (int64_t t = t0; t < t1; ++t)
            run_tile(height, words, left + (t - t0) * height * words, right + p * WIDTH * words,
                     std::min<int64_t>(height, M - t * height), std::min<int64_t>(WIDTH, columns - p * WIDTH),
                     {c.data + t * height * c.down + (j0 + p * WIDTH) * c.across, c.down, c.across}, add || k0 > 0);
      });
    }
  }
}

}  // namespace

bool has_bf16_dot() {
  static const bool found = isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
  return found;
}

void gemm_bf16(const Operand& a, const Operand& b, Target<float> c, bool add) {
  if (a.rows == 0 || b.columns == 0 || a.columns == 0) return gemm(a, b, c, 1.0f, add);
  if (has_amx()) return gemm_amx(a, b, c, add);
  if (c.across == 1) product(a, b, c, add);
  else product(b.t(), a.t(), {c.data, c.across, c.down}, add);
}

#else

bool has_bf16_dot() { return false; }
void gemm_bf16(const Operand& a, const Operand& b, Target<float> c, bool add) { gemm(a, b, c, 1.0f, add); }

#endif

}  // namespace w2s
