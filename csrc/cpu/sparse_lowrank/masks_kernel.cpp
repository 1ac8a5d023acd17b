// topk_mask and nm_mask: compares of magnitudes, 16 lanes at a time, to a mask of bytes.
//
// topk_mask: one pass compares with a bracket of the k-th largest that a sample gave, writes what is above it and lists what
// is inside (1 % of the entries); selection by digits of 11 bits does the rest. nm_mask: an entry's rank among its m is the
// number of its partners at i ^ 1, ..., i ^ (m - 1) that go before it: signs of differences of the magnitudes' bits, as
// integers of the scores' own width, added in planes.
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

template <class Bits>
constexpr int LANES = int(Vec<float>::W * sizeof(float) / sizeof(Bits));
template <class Bits>
using Lanes [[gnu::vector_size(LANES<Bits> * sizeof(Bits))]] = Bits;

// What the lanes' partners i ^ K hold, and 1 in the lanes whose partner comes earlier.
template <int K, class V, int... I>
W2S_INLINE V partners(V s, std::integer_sequence<int, I...>) { return __builtin_shufflevector(s, s, (I ^ K)...); }
template <int K, class V, int... I>
W2S_INLINE V later(std::integer_sequence<int, I...>) {
  constexpr int top = K >= 4 ? 4 : K >= 2 ? 2 : 1;
  return V{((I & top) != 0)...};
}

constexpr int WHOLE = 32;  // entries of the longest vector

template <class V>
W2S_INLINE V majority(V a, V b, V c) { return (a & b) | (c & (a | b)); }

// Adds a bit a lane, the sign, to the lanes' sums, which stand in planes of signs.
template <int LEVELS, class V>
W2S_INLINE void count(V carry, V (&sums)[LEVELS]) {
#pragma GCC unroll 3
  for (int level = 0; level < LEVELS; ++level) {
    const V both = sums[level] & carry;
    sums[level] ^= carry;
    carry = both;
  }
}
template <class V, int LEVELS, class Places, int... K>
W2S_INLINE void count_all(V s, V (&rank)[LEVELS], Places places, std::integer_sequence<int, K...>) {
  (count(s - later<K + 1, V>(places) - partners<K + 1>(s, places), rank), ...);
}

// n < M of every M of `count` numbers, whole vectors of them, by their magnitudes' bits, which are ordered as they are: a
// partner goes before an entry where the difference, less one for an earlier partner, is negative. False, and no mask,
// if one is above `infinity`.
template <class Bits, int M>
inline bool groups_by_signs(const void* x, Bits infinity, int count, int n, uint8_t* mask) {
  constexpr int W = LANES<Bits>, LEVELS = M == 2 ? 1 : M == 4 ? 2 : 3;
  using V = Lanes<Bits>;
  using Unsigned = Lanes<std::make_unsigned_t<Bits>>;
  using Bytes [[gnu::vector_size(W)]] = uint8_t;
  V wanted[LEVELS], most = {};
  for (int level = 0; level < LEVELS; ++level) {
    const Bits bit = Bits(n >> level & 1);
    wanted[level] = V{} - bit;
  }
  for (int at = 0; at < count; at += W) {
    V s, rank[LEVELS] = {}, less = {};
    std::memcpy(&s, static_cast<const Bits*>(x) + at, sizeof(V));
    s &= std::numeric_limits<Bits>::max();
    most = s > most ? s : most;
    count_all(s, rank, std::make_integer_sequence<int, W>(), std::make_integer_sequence<int, M - 1>());
#pragma GCC unroll 3
    for (int level = 0; level < LEVELS; ++level) less = majority(~rank[level], less, wanted[level]);
    Bytes kept = __builtin_convertvector(Unsigned(less) >> (8 * sizeof(Bits) - 1), Bytes);
#if W2S_X86
    asm("" : "+x"(kept));  // in a register first: narrowing straight to memory is microcode on Zen 4
#endif
    std::memcpy(mask + at, &kept, W);
  }
  for (int i = 0; i < W; ++i)
    if (most[i] > infinity) return false;
  return true;
}

template <int M>
W2S_INLINE bool groups_in_place(const void* x, Dtype dtype, int count, int n, uint8_t* mask) {
  if (dtype == Dtype::f32) {
    if constexpr (LANES<int32_t> >= M) return groups_by_signs<int32_t, M>(x, 0x7f800000, count, n, mask);
  } else if (dtype == Dtype::f64) {
    if constexpr (LANES<int64_t> >= M) return groups_by_signs<int64_t, M>(x, 0x7ff0000000000000, count, n, mask);
  } else {
    return groups_by_signs<int16_t, M>(x, dtype == Dtype::bf16 ? 0x7f80 : 0x7c00, count, n, mask);
  }
  return false;  // a group is longer than a vector
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
    int done = 0;
#ifdef W2S_SHUFFLES
    if (n < m && (m == 2 || m == 4 || m == 8)) {
      const auto run = m == 2 ? groups_in_place<2> : m == 4 ? groups_in_place<4> : groups_in_place<8>;
      const int whole = count / WHOLE * WHOLE;
      if (run(s.x->at(s.row, s.begin + at), s.x->dtype, whole, n, mask + at)) done = whole;
    }
#endif
    if (done == count) continue;
    const A* x = read_tile(*s.x, s.row, s.begin + at + done, count - done, wide);
    nans += groups_plain(x, count - done, n, m, mask + at + done);
  }
  return nans;
}

W2S_KERNELS(MaskKernels, sample_as<Real>, histogram_as<Real>, bracket_as<Real>, threshold_as<Real>, groups_as<Real>)

#include "cpu/target_end.h"
