// The forward of attention on the tile unit (AMX), bfloat16: O = P V / sum P, P = exp(S - top), S = scale Q K^T, for a
// block of QUERIES by KEYS after another.
//
// Both products are two by two tiles. S comes with a query's keys next to each other: after the exponential two vectors
// of it are one of P in bfloat16, which lies where S did and is the left side of P V as it stands. K and V are packed once
// a head. Exponentials are of base 2, to 2e-7 of their size, and summed before they are rounded to bfloat16: the sums are
// what the log-sum-exp is made of, which a caller may ask for.
#include <algorithm>
#include <cmath>
#include <utility>

#include "cpu/amx.h"
#include "cpu/gemm.h"
#include "cpu/kv_compressed_attention/attention_calls.h"
#include "cpu/parallel.h"

namespace w2s {
namespace attention {

#if W2S_HAS_AMX
namespace {

using namespace amx;

constexpr int64_t KEYS = 128;
constexpr int64_t LD = KEYS + 16;        // floats from a row of S to the next: not a power of two
constexpr int64_t TILES = BLOCK * STEP;  // of two tiles, in bfloat16
// Powers of 2 above the first block's largest that P may reach before its reference is moved: a float has room for them
// and for their sums, and P keeps its relative accuracy. With most inputs O is never scaled again.
constexpr float ROOM = 24;

W2S_TARGET_BEGIN(W2S_AVX512 ",avx512bf16,amx-tile,amx-bf16")

// One block of queries: its scores or powers, output, and a row's sums (to be added up), reference and limit.
struct Block {
  uint16_t* q;
  float *s, *o, *sums, top[BLOCK], limit[BLOCK];
};

struct Scratch {
  int64_t M, depth, width, ld;  // keys and head in whole tiles; floats from a row of O to the next
  uint16_t *k, *v;
  Block block;

  Scratch(int64_t keys, int64_t D) : M(round_up(keys, STEP)), depth(round_up(D, STEP)), width(round_up(D, BLOCK)), ld(width + 16) {
    float* free = scratch_of<float>(2, BLOCK * (LD + ld + 16) + (M * (depth + width) + BLOCK * depth) / 2);
    const auto take = [&](int64_t n) { return std::exchange(free, free + n); };
    const auto narrow = [&](int64_t n) { return reinterpret_cast<uint16_t*>(take(n / 2)); };
    block.s = take(BLOCK * LD), block.o = take(BLOCK * ld), block.sums = take(BLOCK * 16), block.q = narrow(BLOCK * depth);
    k = narrow(M * depth), v = narrow(M * width);
  }
};

int64_t elements(int64_t bytes) { return bytes / int64_t(sizeof(uint16_t)); }

const uint16_t* start(const Heads& x, int64_t b, int64_t n, int64_t h) { return reinterpret_cast<const uint16_t*>(x.at(b, n, h)); }

void pack_head(const Problem& p, int64_t b, int64_t h, const Scratch& s) {
  for (int64_t m = 0; m < p.M; m += BLOCK)
    pack_columns(start(p.k, b, m, h), 1, elements(p.k.token), p.D, std::min(BLOCK, p.M - m), s.k + m * s.depth);
  for (int64_t d = 0; d < p.D; d += BLOCK)
    pack_columns(start(p.v, b, 0, h) + d, elements(p.v.token), 1, p.M, std::min(BLOCK, p.D - d), s.v + d * s.M);
}

// c = a b, or c += a b, of two by two tiles, or of two by one
template <bool second, int64_t known = 0>
W2S_INLINE void tiles(int64_t given, const uint16_t* a, int64_t down, int64_t a_step, const uint16_t* b, float* c, int64_t ld, bool add) {
  const int64_t stride = ld * int64_t(sizeof(float)), a_stride = down * int64_t(sizeof(uint16_t));
  float* low = c + 16 * ld;
  if (add) {
    _tile_loadd(0, c, stride);
    _tile_loadd(2, low, stride);
    if (second) {
      _tile_loadd(1, c + 16, stride);
      _tile_loadd(3, low + 16, stride);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const int64_t steps = known ? known : given;
#pragma GCC unroll 8
  for (int64_t t = 0; t < steps; ++t, a += a_step, b += TILES) {
    _tile_loadd(4, a, a_stride);
    _tile_loadd(6, b, 2 * LINE);
    _tile_loadd(5, a + 16 * down, a_stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if (second) {
      _tile_loadd(7, b + 32, 2 * LINE);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, stride);
  _tile_stored(2, low, stride);
  if (second) {
    _tile_stored(1, c + 16, stride);
    _tile_stored(3, low + 16, stride);
  }
}

// 2^x for x at most some tens: x = n + r with 0 <= r < 1. What is below 2^-100 counts as that: a subnormal result takes the
// CPU a hundred times as long.
W2S_INLINE __m512 power(__m512 y) {
  const __m512 x = _mm512_max_ps(_mm512_set1_ps(-100.0f), y);
  const __m512 r = _mm512_reduce_ps(x, 1);
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.00187757646f), r, _mm512_set1_ps(0.00898934063f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.0558263175f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.240153611f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.693153083f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.99999994f));
  return _mm512_scalef_ps(p, x);
}

// The reference of row i becomes the largest score of `high`; what was summed above the old one is scaled.
__attribute__((noinline)) void move_reference(Block& x, int64_t i, __m512 high, float factor, int64_t D, int64_t ld) {
  const float now = _mm512_reduce_max_ps(high);
  if (x.top[i] != -INFINITY) {
    const __m512 shrink = _mm512_set1_ps(std::exp2((x.top[i] - now) * factor));
    for (float *o = x.o + i * ld, *end = o + D; o < end; o += 16) _mm512_store_ps(o, _mm512_mul_ps(_mm512_load_ps(o), shrink));
    _mm512_store_ps(x.sums + 16 * i, _mm512_mul_ps(_mm512_load_ps(x.sums + 16 * i), shrink));
  }
  x.top[i] = now, x.limit[i] = now + ROOM / factor;
}

// The block's `n` scores a row to powers above its reference, in bfloat16 at the same place.
template <int64_t known>
void exponentials(Block& x, int64_t given, float factor, int64_t D, int64_t ld) {
  const int64_t n = known ? known : given;
  const __m512 f = _mm512_set1_ps(factor);
  // subtracted first: the largest score gives exactly 1, of scores of any size, and the backward's powers are these
  const auto above = [&](const float* at, __m512 top) { return _mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(at), top), f); };
  for (int64_t i = 0; i < BLOCK; ++i) {
    float* s = x.s + i * LD;
    __m512 high = _mm512_max_ps(_mm512_load_ps(s), _mm512_load_ps(s + 16));
    for (int64_t j = 32; j < n; j += 32) high = _mm512_max_ps(high, _mm512_max_ps(_mm512_load_ps(s + j), _mm512_load_ps(s + j + 16)));
    if (_mm512_cmp_ps_mask(high, _mm512_set1_ps(x.limit[i]), _CMP_GT_OQ)) move_reference(x, i, high, factor, D, ld);
    const __m512 top = _mm512_set1_ps(x.top[i]);
    __m512 sum = _mm512_load_ps(x.sums + 16 * i);
#pragma GCC unroll 4
    for (int64_t j = 0; j < n; j += 32) {
      const __m512 low = power(above(s + j, top));
      const __m512 high = power(above(s + j + 16, top));
      sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
      _mm512_storeu_si512(reinterpret_cast<uint16_t*>(s) + j, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    _mm512_store_ps(x.sums + 16 * i, sum);
  }
}

template <int64_t known>
void scores(const Problem& p, const Scratch& s, int64_t k0, int64_t n) {
  for (int64_t key = 0; key < n; key += BLOCK)
    tiles<true, known>(s.depth / STEP, s.block.q, STEP, TILES, s.k + (k0 + key) * s.depth, s.block.s + key, LD, false);
}

template <int64_t known>
void add_values(const Problem& p, const Scratch& s, int64_t k0, int64_t steps) {
  const auto* left = reinterpret_cast<const uint16_t*>(s.block.s);
  for (int64_t d = 0; d < p.D; d += BLOCK) {
    const uint16_t* right = s.v + d * s.M + k0 * BLOCK;
    if (p.D - d > 16) tiles<true, known>(steps, left, 2 * LD, STEP, right, s.block.o + d, s.ld, k0 > 0);
    else tiles<false, known>(steps, left, 2 * LD, STEP, right, s.block.o + d, s.ld, k0 > 0);
  }
}

void finish(const Problem& p, int64_t b, int64_t h, int64_t first, const Block& x, int64_t ld) {
  float* kept = static_cast<float*>(p.softmax) + (b * p.H + h) * p.N + first;
  for (int64_t i = 0; i < std::min(BLOCK, p.N - first); ++i) {
    const float total = _mm512_reduce_add_ps(_mm512_load_ps(x.sums + 16 * i));
    const __m512 inverse = _mm512_set1_ps(1.0f / total);
    uint16_t* out = reinterpret_cast<uint16_t*>(p.out.at(b, first + i, h));
    for (int64_t d = 0; d < p.D; d += 16) {
      const __mmask16 there = __mmask16((1u << std::min<int64_t>(16, p.D - d)) - 1);
      _mm256_mask_storeu_epi16(out + d, there, (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_load_ps(x.o + i * ld + d), inverse)));
    }
    kept[i] = x.top[i] * float(p.scale);
    kept[i + p.B * p.H * p.N] = total;
  }
}

// Rows of x from `first` on are asked for: their lines lie one below the other, which hardware does not follow.
void ask(const Heads& x, int64_t b, int64_t h, int64_t first, int64_t end, int64_t D) {
  for (int64_t i = first; i < end; ++i)
    for (int64_t d = 0; d < D; d += 32) __builtin_prefetch(start(x, b, i, h) + d);
}

void queries(const Problem& p, int64_t b, int64_t h, int64_t first, Scratch& s) {
  constexpr float LOG2E = 1.44269504f;
  const float factor = float(p.scale) * LOG2E;
  Block& x = s.block;
  pack_rows(start(p.q, b, first, h), 1, elements(p.q.token), p.D, std::min(BLOCK, p.N - first), x.q);
  ask(p.q, b, h, first + BLOCK, std::min(p.N, first + 2 * BLOCK), p.D);
  std::fill(x.top, x.top + BLOCK, -INFINITY);
  std::fill(x.limit, x.limit + BLOCK, -INFINITY);
  std::fill(x.sums, x.sums + 16 * BLOCK, 0.0f);
  for (int64_t k0 = 0; k0 < p.M; k0 += KEYS) {
    const int64_t n = std::min(KEYS, p.M - k0), whole = round_up(n, STEP);
    if (s.depth == 2 * STEP) scores<2>(p, s, k0, n);
    else if (s.depth == 3 * STEP) scores<3>(p, s, k0, n);
    else if (s.depth == 4 * STEP) scores<4>(p, s, k0, n);
    else scores<0>(p, s, k0, n);
    if (n < whole)
      for (int64_t i = 0; i < BLOCK; ++i) std::fill(x.s + i * LD + n, x.s + i * LD + whole, -INFINITY);
    if (n == KEYS) {
      exponentials<KEYS>(x, n, factor, p.D, s.ld);
      add_values<KEYS / STEP>(p, s, k0, n / STEP);
    } else {
      exponentials<0>(x, whole, factor, p.D, s.ld);
      add_values<0>(p, s, k0, whole / STEP);
    }
  }
  finish(p, b, h, first, x, s.ld);
}

W2S_TARGET_END

}  // namespace

bool forward_by_tiles(const Problem& p) {
  for (const Heads* x : {&p.q, &p.k, &p.v, &p.out})
    if (x->dtype != Dtype::bf16) return false;
  if (!has_amx() || !(p.scale > 0) || p.M == 0) return false;
  const int64_t blocks = pieces(p.N, BLOCK);
  parallel_ranges(p.B * p.H * blocks, 1, [&](int64_t begin, int64_t end) {
    Scratch s(p.M, p.D);
    const Unit unit;
    for (int64_t i = begin, packed = -1; i < end; ++i) {
      const int64_t head = i / blocks;
      if (head != packed) pack_head(p, head / p.H, head % p.H, s), packed = head;
      queries(p, head / p.H, head % p.H, i % blocks * BLOCK, s);
    }
  });
  return true;
}

#else

bool forward_by_tiles(const Problem&) { return false; }

#endif

}  // namespace attention
}  // namespace w2s
