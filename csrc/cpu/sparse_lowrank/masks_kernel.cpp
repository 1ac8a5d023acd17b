// topk_mask and nm_mask: compares of magnitudes, 16 lanes at a time, to a mask of bytes.
//
// topk_mask: a row that stays in L2 is halved, its numbers' bits taken as numbers, until the k-th largest is parted from the
// next: some ten passes of compares over ever fewer of them. Of a longer one, a pass compares with a bracket of the k-th
// largest that a sample gave, writes what is above it and lists what is inside (1 % of the entries). nm_mask: an entry's rank among its m is the
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
#if W2S_X86
  if constexpr (W == 16) {  // AVX-512
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_maskz_set1_epi8(__mmask16(bits), 1));
    return;
  }
#endif
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

constexpr int PADDING = 16;  // magnitudes behind the last one, below all: whole vectors are read

template <class A>
inline int64_t load_as(const Span& s, A* sizes) {
  using V = Vec<A>;
  int64_t nans = 0;
  span_tiles<A>(s, [&](const A* x, int64_t at, int n) {
    int i = 0;
    for (; i + V::W <= n; i += V::W) {
      uint32_t lost;
      magnitudes(x + i, lost).store(sizes + at + i);
      if (lost) nans += __builtin_popcount(lost);
    }
    for (; i < n; ++i) {
      nans += x[i] != x[i];
      sizes[at + i] = magnitude(x[i]);
    }
  });
  for (int i = 0; i < PADDING; ++i) sizes[s.count + i] = A(-1);
  return nans;
}

// how many of n are at least `level`, which is not negative
template <class A>
W2S_INLINE int64_t count_from(const A* sizes, int64_t n, A level) {
  using V = Vec<A>;
  const V least = V::set(level);
  int64_t even = 0, odd = 0, i = 0;
  for (; i + 2 * V::W <= n; i += 2 * V::W) {
    even += __builtin_popcount(V::ge(V::load(sizes + i), least).bits());
    odd += __builtin_popcount(V::ge(V::load(sizes + i + V::W), least).bits());
  }
  for (; i < n; i += V::W) even += __builtin_popcount(V::ge(V::load(sizes + i), least).bits());
  return even + odd;
}

// Bisection on the bits, which are ordered as the magnitudes are: as many passes as it takes to part the k-th from the next,
// over ever fewer of them. No digit is counted, which takes a store an element.
template <class A>
inline Threshold<A> largest_as(A* sizes, int64_t n, int64_t k, int empty) {
  using V = Vec<A>;
  using Key = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;
  const auto key_of = [empty](A size) {
    Key key;
    std::memcpy(&key, &size, sizeof(A));
    return key >> empty;
  };
  const auto size_of = [empty](Key key) {
    key <<= empty;
    A size;
    std::memcpy(&size, &key, sizeof(A));
    return size;
  };
  A most = 0, least = infinity<A>;
  int64_t i = 0;
  if (n >= V::W) {
    V high = V::load(sizes), low = high;
    for (i = V::W; i + V::W <= n; i += V::W) {
      high = V::max(V::load(sizes + i), high);
      low = V::min(V::load(sizes + i), low);
    }
    most = high.top(), least = A(0) - (V::set(0) - low).top();
  }
  for (; i < n; ++i) most = std::max(most, sizes[i]), least = std::min(least, sizes[i]);
  Key low = key_of(least), high = key_of(most) + 1;  // k or more are at least `low`, fewer than k at least `high`
  int64_t from_low = n, from_high = 0;
  while (high - low > 1) {
    const Key middle = low + (high - low) / 2;
    const A level = size_of(middle);
    const int64_t from = count_from(sizes, n, level);
    if (from == k) return {level, n};  // all of that value, if there are any
    const bool enough = from > k;
    low = enough ? middle : low, from_low = enough ? from : from_low;
    high = enough ? high : middle, from_high = enough ? from_high : from;
    if (n <= 4 * V::W || from_low - from_high > n / 4) continue;
    const V first = V::set(size_of(low)), end = V::set(size_of(high));  // above infinity there is nothing to leave out
    int32_t places[16];
    int64_t kept = 0;
    for (int64_t at = 0; at < n; at += V::W) {
      const V x = V::load(sizes + at);
      const auto inside = from_high ? V::ge(x, first) & V::gt(end, x) : V::ge(x, first);
      kept += V::compress(sizes + kept, places, x, 0, inside);
    }
    for (int at = 0; at < PADDING; ++at) sizes[kept + at] = A(-1);
    k -= from_high, from_low -= from_high, n = kept, from_high = 0;
  }
  return {size_of(low), k - from_high};
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

W2S_KERNELS(MaskKernels, load_as<Real>, largest_as<Real>, sample_as<Real>, histogram_as<Real>, bracket_as<Real>, threshold_as<Real>, groups_as<Real>)

#include "cpu/target_end.h"
