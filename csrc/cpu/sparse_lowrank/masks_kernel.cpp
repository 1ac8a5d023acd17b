// topk_mask and nm_mask: compares of magnitudes, 16 lanes at a time, to a mask of bytes.
//
// topk_mask: one pass compares with a bracket of the k-th largest that a sample gave, writes what is above it and lists what
// is inside (1 % of the entries); selection by digits of 11 bits does the rest. nm_mask: an entry's rank among its m is the
// sum of m - 1 compares with its partners at i ^ 1, ..., i ^ (m - 1), added as planes of bits, 64 entries in a word. Of two
// partners one compare says both ways.
// Floor: scores read once, mask written once.
#include "cpu/sparse_lowrank/masks.h"

#include <cmath>
#include <limits>
#include <utility>

#include "cpu/target_begin.h"

#include "cpu/tiles_kernel.h"

using namespace ::w2s::sparse;

template <class A>
constexpr A INFINITE = std::numeric_limits<A>::infinity();

template <class A>
W2S_INLINE A magnitude(A x) {
  return x != x ? INFINITE<A> : std::fabs(x);
}

template <class A>
W2S_INLINE Vec<A> magnitudes(const A* x, uint32_t& nans) {
  using V = Vec<A>;
  const V value = V::load(x);
  const auto lost = V::nan(value);
  nans = lost.bits();
  return V::select(lost, V::set(INFINITE<A>), value.abs());
}

// byte i of the result is bit i
W2S_INLINE uint64_t spread(uint32_t bits) {
  return (((bits & 0xffu) * 0x0101010101010101u & 0x8040201008040201u) + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
}
template <int W>
W2S_INLINE void store_mask(uint8_t* out, uint32_t bits) {
  uint64_t bytes[2] = {spread(bits), 0};
  if constexpr (W > 8) bytes[1] = spread(bits >> 8);
  std::memcpy(out, bytes, W);
}

// work(x, at, n) for the tiles of a span, at from its begin
template <class A, class F>
W2S_INLINE void span_tiles(const Span& s, const F& work) {
  A wide[TILE];
  for (int64_t at = 0; at < s.count; at += TILE) {
    const int n = int(std::min<int64_t>(TILE, s.count - at));
    work(read_tile(*s.x, s.row, s.begin + at, n, wide), at, n);
  }
}

template <class A>
inline void sample_as(const Rows& x, int64_t row, int64_t from, int64_t step, int64_t count, A* out) {
  uint32_t state = 1;
  for (int64_t i = 0; i < count; ++i) {
    state = state * 1664525u + 1013904223u;
    A wide[64];  // a tile is widened in whole vectors
    const int64_t moved = int64_t(uint64_t(state) * uint64_t(step) >> 32);
    out[i] = magnitude(*read_tile(x, row, from + i * step + moved, 1, wide));
  }
}

template <class A>
inline void histogram_as(const Span& s, const Digit& digit, uint32_t* counts) {
  using Key = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;
  const Key prefix = Key(digit.prefix), below = (Key(1) << digit.width) - 1;
  const int shift = digit.shift, top = shift + digit.width;
  span_tiles<A>(s, [&](const A* x, int64_t, int n) {
    for (int i = 0; i < n; ++i) {
      const A size = magnitude(x[i]);
      Key key;
      std::memcpy(&key, &size, sizeof(A));
      if (key >> top == prefix) ++counts[key >> shift & below];
    }
  });
}

template <class A>
inline Found bracket_as(const Span& s, A low, A high, uint8_t* mask, A* near, int32_t* places) {
  using V = Vec<A>;
  Found found{0, 0, 0};
  const V vlow = V::set(low), vhigh = V::set(high);
  span_tiles<A>(s, [&](const A* x, int64_t at, int n) {
    int i = 0;
    for (; i + V::W <= n; i += V::W) {
      uint32_t nans;
      const V size = magnitudes(x + i, nans);
      const uint32_t above = V::gt(size, vhigh).bits();
      const auto from = V::ge(size, vlow);
      store_mask<V::W>(mask + at + i, above);
      found.above += __builtin_popcount(above);
      if (nans) found.nans += __builtin_popcount(nans);
      if (from.bits() != above)  // what is above is not below
        found.near += V::compress(near + found.near, places + found.near, size, int32_t(at + i), from & V::ge(vhigh, size));
    }
    for (; i < n; ++i) {
      const A size = magnitude(x[i]);
      mask[at + i] = size > high;
      found.above += size > high;
      found.nans += x[i] != x[i];
      if (size >= low && size <= high) near[found.near] = size, places[found.near++] = int32_t(at + i);
    }
  });
  return found;
}

template <class A>
inline int64_t threshold_as(const Span& s, A threshold, int64_t ties, uint8_t* mask) {
  using V = Vec<A>;
  int64_t nans = 0;
  const V wanted = V::set(threshold);
  span_tiles<A>(s, [&](const A* x, int64_t at, int n) {
    int i = 0;
    for (; i + V::W <= n; i += V::W) {
      uint32_t lost;
      const V size = magnitudes(x + i, lost);
      uint32_t kept = V::gt(size, wanted).bits();
      for (uint32_t equal = ties ? V::eq(size, wanted).bits() : 0; equal && ties; equal &= equal - 1, --ties)
        kept |= equal & (0u - equal);
      store_mask<V::W>(mask + at + i, kept);
      if (lost) nans += __builtin_popcount(lost);
    }
    for (; i < n; ++i) {
      const A size = magnitude(x[i]);
      const bool tie = size == threshold && ties > 0;
      mask[at + i] = tie || size > threshold;
      ties -= tie;
      nans += x[i] != x[i];
    }
  });
  return nans;
}

template <class A>
inline int64_t groups_plain(const A* x, int count, int n, int m, uint8_t* mask) {
  int64_t nans = 0;
  for (int at = 0; at < count; at += m) {
    A size[32];
    for (int i = 0; i < m; ++i) size[i] = magnitude(x[at + i]), nans += x[at + i] != x[at + i];
    for (int i = 0; i < m; ++i) {
      int rank = 0;
      for (int j = 0; j < i; ++j) rank += size[j] >= size[i];
      for (int j = i + 1; j < m; ++j) rank += size[j] > size[i];
      mask[at + i] = rank < n;
    }
  }
  return nans;
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define W2S_SHUFFLES 1

// Lanes whose partner i ^ K is larger.
template <class V, int K, int... I>
W2S_INLINE uint32_t exceeded(V size, std::integer_sequence<int, I...>) {
  return V::gt(V{__builtin_shufflevector(size.v, size.v, (I ^ K)...)}, size).bits();
}
template <class V, int... K>
W2S_INLINE void exceeded_all(V size, int at, uint64_t* planes, std::integer_sequence<int, K...>) {
  ((planes[K] |= uint64_t(exceeded<V, K + 1>(size, std::make_integer_sequence<int, V::W>())) << at), ...);
}

template <int BIT>
constexpr uint64_t LOW = BIT == 0 ? 0x5555555555555555u : BIT == 1 ? 0x3333333333333333u : 0x0f0f0f0f0f0f0f0fu;
template <int K, int BIT>
W2S_INLINE uint64_t exchanged(uint64_t bits) {  // bit i ^ (K's bit BIT) in the place of bit i
  if constexpr (K >> BIT & 1) return (bits & LOW<BIT>) << (1 << BIT) | (bits >> (1 << BIT) & LOW<BIT>);
  else return bits;
}
// Lanes i whose partner i ^ K goes before them: an earlier one does so unless it is smaller, which its own lane says.
template <int K>
W2S_INLINE uint64_t outranked(uint64_t larger) {
  constexpr uint64_t earlier = ~LOW<K >= 4 ? 2 : K >= 2 ? 1 : 0>;
  const uint64_t theirs = exchanged<K, 2>(exchanged<K, 1>(exchanged<K, 0>(larger)));
  return (larger & ~earlier) | (~theirs & earlier);
}

// Adds a bit a lane to the lanes' sums, which stand in planes of bits.
template <int LEVELS>
W2S_INLINE void count(uint64_t carry, uint64_t (&sums)[LEVELS]) {
#pragma GCC unroll 3
  for (int level = 0; level < LEVELS; ++level) {
    const uint64_t both = sums[level] & carry;
    sums[level] ^= carry;
    carry = both;
  }
}
template <int LEVELS, int... K>
W2S_INLINE void count_all(const uint64_t* planes, uint64_t (&sums)[LEVELS], std::integer_sequence<int, K...>) {
  (count(outranked<K + 1>(planes[K]), sums), ...);
}

template <class A, int M>
inline int64_t groups_by_planes(const A* x, int count, int n, uint8_t* mask) {
  using V = Vec<A>;
  constexpr int LEVELS = M == 2 ? 1 : M == 4 ? 2 : 3;
  int64_t nans = 0;
  int at = 0;
  for (; at + 64 <= count; at += 64) {
    uint64_t planes[M - 1] = {};
    auto lost = V::Mask::none();
#pragma GCC unroll 16
    for (int i = 0; i < 64; i += V::W) {
      const V size = V::load(x + at + i).abs();
      lost = lost | V::nan(size);
      exceeded_all(size, i, planes, std::make_integer_sequence<int, M - 1>());
    }
    if (lost.any()) {
      nans += groups_plain(x + at, 64, n, M, mask + at);
      continue;
    }
    uint64_t rank[LEVELS] = {}, less = n == M ? ~uint64_t(0) : 0;
    count_all(planes, rank, std::make_integer_sequence<int, M - 1>());
    if (n < M)
      for (int level = 0; level < LEVELS; ++level) less = n >> level & 1 ? ~rank[level] | less : ~rank[level] & less;
#pragma GCC unroll 8
    for (int i = 0; i < 64; i += 8) {
      const uint64_t bytes = spread(uint32_t(less >> i));
      std::memcpy(mask + at + i, &bytes, 8);
    }
  }
  return nans + groups_plain(x + at, count - at, n, M, mask + at);
}
#endif
#endif

template <class A>
inline int64_t groups_as(const Span& s, int n, int m, uint8_t* mask) {
  A wide[TILE];
  const int step = TILE / m * m;
  int64_t nans = 0;
  for (int64_t at = 0; at < s.count; at += step) {
    const int count = int(std::min<int64_t>(step, s.count - at));
    const A* x = read_tile(*s.x, s.row, s.begin + at, count, wide);
    uint8_t* out = mask + at;
#ifdef W2S_SHUFFLES
    constexpr int W = Vec<A>::W;
    if (m == 2) nans += groups_by_planes<A, 2>(x, count, n, out);
    else if (m == 4) nans += groups_by_planes<A, 4>(x, count, n, out);
    else if constexpr (W >= 8) {
      if (m == 8) nans += groups_by_planes<A, 8>(x, count, n, out);
      else nans += groups_plain(x, count, n, m, out);
    } else
#endif
      nans += groups_plain(x, count, n, m, out);
  }
  return nans;
}

W2S_KERNELS(MaskKernels, sample_as<Real>, histogram_as<Real>, bracket_as<Real>, threshold_as<Real>, groups_as<Real>)

#include "cpu/target_end.h"
