// moe_route: a row of logits is read once, kept in L1, and leaves its k experts, weights, lse and part of psum.
//
// Choice of the k largest of E keys: the maxima of padded(k) interleaved columns hold k keys, so that the k-th largest of
// them bounds the k-th largest of all from below. The few keys above the bound (11 of 128 for k = 8) are packed in the order
// of their numbers, and each finds its place by counting those before it: no sort, hardly a branch. Rows with a NaN or with
// many equal keys take a partial sort.
// psum: float32 over ranges of 64 rows, ranges in double in order. Floor: T E logits read, and read and written in backward.
#include "cpu/routing/moe_route.h"

#include "cpu/target_begin.h"

constexpr int64_t RANGE = 64;   // rows of a range
constexpr double TINY = 1e-20;  // reference/routing/moe_route.py

constexpr int AT_ONCE = 4;      // rows between packing keys and reading them back, which has to wait for the stores

// One row under way: arrays, each of padded(E) and a vector more, and what the second part takes from the first.
template <class A>
struct Room {
  std::vector<A> memory;
  std::vector<int32_t> numbers;
  A *z, *e, *key, *values, *rank;
  int32_t *found, *order;
  const A *row, *by;  // z, and the keys
  A inverse;          // 1 / sum e
  int count;          // of packed keys; 0: the keys are few, -1: they are to be sorted
  explicit Room(int64_t E) {
    const size_t width = size_t(padded(int(E)) + PAD);
    memory.resize(5 * width), numbers.resize(2 * width);
    A** const arrays[] = {&z, &e, &key, &values, &rank};
    for (size_t i = 0; i < 5; ++i) *arrays[i] = memory.data() + i * width;
    found = numbers.data(), order = found + width;
  }
};

// A row of E logits as A with -infinity up to padded(E): in place where it is that already.
template <class A>
W2S_INLINE const A* padded_row(const Rows& rows, int64_t row, int E, A* buffer) {
  if (rows.dtype == own_dtype<A> && E % PAD == 0) return static_cast<const A*>(rows.at(row, 0));
  widen(rows.at(row, 0), rows.dtype, E, -infinity<A>, buffer);
  return buffer;
}

// e = exp(z - top) of a padded row, and its sum. A row without a finite largest has NaN in both, as a softmax has.
template <class A>
W2S_INLINE A exponentials(const A* z, int n, A top, A* e) {
  using V = Vec<A>;
  const V line = V::set(top);
  V even = V::set(0), odd = even;
  const auto next = [&](int i) {
    const V x = vexp(V::load(z + i) - line);
    x.store(e + i);
    return x;
  };
  int i = 0;
  for (; i + 2 * V::W <= padded(n); i += 2 * V::W) {
    even = even + next(i);
    odd = odd + next(i + V::W);
  }
  for (; i < padded(n); i += V::W) even = even + next(i);
  return (even + odd).sum();
}

// s = sigmoid(z) and, where it is wanted, its slope s (1 - s); returns sum s. Padding has 0.
template <class A>
W2S_INLINE A sigmoids(const A* z, int n, A* s, A* slope) {
  using V = Vec<A>;
  const V one = V::set(1), zero = V::set(0);
  V sum = zero;
  for (int i = 0; i < padded(n); i += V::W) {
    const V x = V::load(z + i), t = vexp(zero - x.abs()), d = one / (one + t);
    const V value = V::select(V::ge(x, zero), d, t * d);
    value.store(s + i);
    if (slope) (t * d * d).store(slope + i);
    sum = sum + value;
  }
  return sum.sum();
}

// log sum exp of a row, of its largest and of what `exponentials` returned
template <class A>
inline A log_sum(const A* z, int n, A top, A sum) {
  if (sum == sum) return top + std::log(sum);
  for (int i = 0; i < n; ++i)
    if (z[i] != z[i]) return z[i];
  return top;
}

constexpr int CHAINS = 4;  // counts of one vector that do not wait for each other

// A number no key of which more than k - 1 of `columns` interleaved columns have a larger maximum
template <class A>
W2S_INLINE A bound(const A* key, int n, int columns, int k, A* maxima) {
  using V = Vec<A>;
  if (k == 1) return tile_max(key, n);
  for (int c = 0; c < columns; c += V::W) {
    V m = V::set(-infinity<A>);
    for (int i = c; i < padded(n); i += columns) m = V::max(V::load(key + i), m);
    m.store(maxima + c);
  }
  A least = -infinity<A>;
  const V one = V::set(1), places = V::set(A(k));
  for (int c = 0; c < columns; c += V::W) {
    const V m = V::load(maxima + c);
    V larger[CHAINS] = {V::set(0), V::set(0), V::set(0), V::set(0)};
    for (int j = 0; j < columns; j += CHAINS)
      for (int u = 0; u < CHAINS; ++u) larger[u] = V::select(V::gt(V::set(maxima[j + u]), m), larger[u] + one, larger[u]);
    least = std::max(least, V::select(V::gt(places, (larger[0] + larger[1]) + (larger[2] + larger[3])), V::set(0) - m, V::set(-infinity<A>)).top());
  }
  return -least;
}

// rank[i]: how many of n values come before i: the larger ones, and the equal ones on its left; n is a multiple of CHAINS
template <class A>
W2S_INLINE void places_of(const A* value, int n, A* rank) {
  using V = Vec<A>;
  A lane[V::W];
  for (int i = 0; i < V::W; ++i) lane[i] = A(i);
  const V lanes = V::load(lane), one = V::set(1);
  for (int i = 0; i < n; i += V::W) {
    const V v = V::load(value + i), at = lanes + V::set(A(i));
    V before[CHAINS] = {V::set(0), V::set(0), V::set(0), V::set(0)};
    for (int j = 0; j < n; j += CHAINS)
      for (int u = 0; u < CHAINS; ++u) {
        const V other = V::set(value[j + u]);
        const auto first = V::gt(other, v) | (V::eq(other, v) & V::gt(at, V::set(A(j + u))));
        before[u] = V::select(first, before[u] + one, before[u]);
      }
    ((before[0] + before[1]) + (before[2] + before[3])).store(rank + i);
  }
}

// packs the few of n keys, padded with -infinity, that may be among the k largest
template <class A>
W2S_INLINE void pack(int n, int k, Room<A>& room) {
  using V = Vec<A>;
  const int columns = padded(k);
  room.count = 0;
  if (n <= columns) return;
  const V least = V::set(bound(room.by, n, columns, k, room.rank));
  int count = 0;
  for (int i = 0; i < padded(n); i += V::W) {
    const V x = V::load(room.by + i);
    count += V::compress(room.values + count, room.found + count, x, i, V::ge(x, least));
  }
  for (int i = 0; i < CHAINS; ++i) room.values[count + i] = -infinity<A>;
  room.count = count <= 4 * columns ? count : -1;
}

// order[0, k): the numbers of the k largest of n keys
template <class A>
W2S_INLINE void choose(int n, int k, Room<A>& room) {
  if (room.count < 0) {
    const A* key = room.by;
    std::iota(room.order, room.order + n, 0);
    std::partial_sort(room.order, room.order + k, room.order + n, [key](int32_t a, int32_t b) {
      const bool na = key[a] != key[a], nb = key[b] != key[b];
      if (na != nb) return na;
      return key[a] > key[b] || (!(key[a] < key[b]) && a < b);
    });
    return;
  }
  // lengths that vary less are predicted better; padding comes last
  const int whole = int(round_up(room.count ? room.count : n, CHAINS));
  places_of(room.count ? room.values : room.by, whole, room.rank);
  for (int i = 0; i < whole; ++i) room.order[int(room.rank[i])] = room.count ? room.found[i] : i;
}

// weights of the chosen: what stands there, divided by its sum (and `more`) if `share`
template <class A>
W2S_INLINE void take(const A* from, const int32_t* order, int k, bool share, A more, A factor, A* weights) {
  double sum = double(more);  // one number after another: of many, single precision would lose a digit
  for (int j = 0; j < k; ++j) sum += double(weights[j] = from[order[j]]);
  const A scale = share ? A(1 / sum) : factor;
  for (int j = 0; j < k; ++j) weights[j] *= scale;
}

// Of one row lse, its part of psum, and the keys of the choice. psum: of this range, padded; null where the row is masked.
// bias is padded with -infinity.
template <class A>
W2S_INLINE void read_row(const MoeRoute<A>& s, int64_t row, const A* bias, bool odd_bias, A* psum, Room<A>& room) {
  using V = Vec<A>;
  const int E = int(s.E);
  const A* z = padded_row(s.logits, row, E, room.z);
  const bool sigmoid = s.score == Score::sigmoid;
  const A top = tile_max(z, E), mass = exponentials(z, E, top, room.e);
  s.lse[row] = psum ? log_sum(z, E, top, mass) : A(0);
  const A sum = sigmoid ? sigmoids(z, E, room.e, static_cast<A*>(nullptr)) : mass;
  room.inverse = A(1) / (sigmoid ? sum + A(TINY) : sum);
  const V factor = V::set(room.inverse);
  if (psum)
    for (int i = 0; i < padded(E); i += V::W) V::fma(V::load(room.e + i), factor, V::load(psum + i)).store(psum + i);
  room.row = room.by = z;
  if (bias) {
    const V scale = sigmoid ? V::set(1) : factor;
    for (int i = 0; i < padded(E); i += V::W) V::fma(V::load(room.e + i), scale, V::load(bias + i)).store(room.key + i);
    room.by = room.key;
  }
  if (sum != sum || odd_bias) room.count = -1;
  else pack(E, int(s.k), room);
}

template <class A>
W2S_INLINE void write_row(const MoeRoute<A>& s, int64_t row, bool biased, Room<A>& room) {
  const int k = int(s.k);
  const bool sigmoid = s.score == Score::sigmoid, whole = !sigmoid && (s.score == Score::topk || s.renormalize);
  choose(int(s.E), k, room);
  A* weights = s.weights + row * k;
  if (whole && biased) {  // the largest chosen need not be the largest of all, whose exponentials may vanish beside it
    take(room.row, room.order, k, false, A(0), A(1), weights);
    std::fill(std::copy(weights, weights + k, room.values), room.values + padded(k), -infinity<A>);
    const A part = exponentials(room.values, k, tile_max(room.values, k), room.values);
    for (int j = 0; j < k; ++j) weights[j] = room.values[j] / part;
  } else {
    take(room.e, room.order, k, whole || s.renormalize, sigmoid ? A(TINY) : A(0), sigmoid ? A(1) : room.inverse, weights);
  }
  std::copy(room.order, room.order + k, s.indices + row * k);
}

template <class A>
inline void moe_route_forward(const MoeRoute<A>& s) {
  const int64_t width = padded(int(s.E)), ranges = pieces(s.T, RANGE);
  std::vector<A> partial(static_cast<size_t>(ranges * width)), bias;
  bool odd_bias = false;
  if (s.bias) {
    bias.resize(size_t(width) + PAD);
    for (int64_t c = 0; c < s.E; c += TILE) {
      const int n = int(std::min<int64_t>(TILE, s.E - c));
      widen(static_cast<const char*>(s.bias.data) + c * bytes_of(s.bias.dtype), s.bias.dtype, n, -infinity<A>, bias.data() + c);
    }
    odd_bias = std::any_of(bias.begin(), bias.begin() + s.E, [](A b) { return !(b > -infinity<A> && b < infinity<A>); });
  }
  parallel_ranges(ranges, grain_of(RANGE * s.E), [&](int64_t begin, int64_t end) {
    std::vector<Room<A>> rooms;
    for (int u = 0; u < AT_ONCE; ++u) rooms.emplace_back(s.E);
    for (int64_t first = begin * RANGE; first < std::min(s.T, end * RANGE); first += AT_ONCE) {
      const int64_t last = std::min(s.T, first + AT_ONCE);  // RANGE is a multiple of it
      A* psum = partial.data() + first / RANGE * width;
      for (int64_t row = first; row < last; ++row)
        read_row(s, row, s.bias ? bias.data() : nullptr, odd_bias, !s.mask || s.mask[row] ? psum : nullptr, rooms[size_t(row - first)]);
      for (int64_t row = first; row < last; ++row) write_row(s, row, bool(s.bias), rooms[size_t(row - first)]);
    }
  });
  for (int64_t i = 0; i < s.E; ++i) {
    double sum = 0;
    for (int64_t range = 0; range < ranges; ++range) sum += double(partial[size_t(range * width + i)]);
    s.psum[i] = A(sum);
  }
  std::fill(s.counts, s.counts + s.E, int64_t(0));
  *s.tokens = 0;
  for (int64_t row = 0; row < s.T; ++row) {
    if (s.mask && !s.mask[row]) continue;
    ++*s.tokens;
    for (int64_t j = 0; j < s.k; ++j) ++s.counts[s.indices[row * s.k + j]];
  }
}

template <class A>
struct Upstream {  // of one row; psum is padded, null where there is none
  const A *weights, *psum;
  A lse, inner;  // inner: sum w g
};

// dz of a softmax's row less p `shift`, but for what reaches the chosen through their own weights: of one of them it is
// e[i] scale (q[i] - mean + lse), without the shift, which would cancel.
template <class A>
struct Spread {
  A scale, mean;
};
template <class A>
W2S_INLINE Spread<A> softmax_gradient(const A* z, int E, const Upstream<A>& up, A shift, Room<A>& room, A* dz) {
  using V = Vec<A>;
  const V line = V::set(tile_max(z, E)), zero = V::set(0);
  V sum = zero, dot = zero;
  for (int i = 0; i < padded(E); i += V::W) {
    const V x = vexp(V::load(z + i) - line);
    x.store(room.e + i);
    sum = sum + x;
    if (up.psum) dot = V::fma(x, V::load(up.psum + i), dot);
  }
  const A scale = A(1) / sum.sum(), mean = up.psum ? dot.sum() * scale : A(0);
  const V offset = V::set(up.lse - shift), factor = V::set(scale), middle = V::set(mean);
  for (int i = 0; i < padded(E); i += V::W)
    (V::load(room.e + i) * factor * (up.psum ? V::load(up.psum + i) - middle + offset : offset)).store(dz + i);
  return {scale, mean};
}

template <class A>
W2S_INLINE void sigmoid_gradient(const MoeRoute<A>& s, const A* z, const int64_t* chosen, const Upstream<A>& up, Room<A>& room, A* dz) {
  using V = Vec<A>;
  const int E = int(s.E);
  A *score = room.key, *slope = room.values;
  const A total = sigmoids(z, E, score, slope) + A(TINY);
  if (up.lse != 0) {
    Upstream<A> alone = up;
    alone.psum = nullptr;
    softmax_gradient(z, E, alone, A(0), room, dz);
  } else {
    std::fill(dz, dz + padded(E), A(0));
  }
  if (up.psum) {
    V dot = V::set(0);
    for (int i = 0; i < padded(E); i += V::W) dot = V::fma(V::load(score + i), V::load(up.psum + i), dot);
    const V mean = V::set(dot.sum() / total), factor = V::set(A(1) / total);
    for (int i = 0; i < padded(E); i += V::W)
      V::fma(V::load(slope + i) * factor, V::load(up.psum + i) - mean, V::load(dz + i)).store(dz + i);
  }
  if (!up.weights) return;
  A part = A(TINY);
  for (int64_t j = 0; j < s.k; ++j) part += score[chosen[j]];
  for (int64_t j = 0; j < s.k; ++j)
    dz[chosen[j]] += slope[chosen[j]] * (s.renormalize ? (up.weights[j] - up.inner) / part : up.weights[j]);
}

template <class A>
W2S_INLINE void gradient_row(const MoeRoute<A>& s, const A* z, int64_t row, const Upstream<A>& up, Room<A>& room, A* dz) {
  const int64_t* chosen = s.indices + row * s.k;
  if (s.score == Score::sigmoid) return sigmoid_gradient(s, z, chosen, up, room, dz);
  const bool whole = s.score == Score::softmax && !s.renormalize, spread = whole || up.psum || up.lse != 0;
  Spread<A> all{0, 0};
  if (spread) all = softmax_gradient(z, int(s.E), up, whole ? up.inner : A(0), room, dz);
  else std::fill(dz, dz + s.E, A(0));
  for (int64_t j = 0; up.weights && j < s.k; ++j) {
    const int64_t i = chosen[j];
    const A base = spread ? room.e[i] * all.scale * ((up.psum ? up.psum[i] - all.mean : A(0)) + up.lse) : A(0);
    dz[i] = base + s.weights[row * s.k + j] * (up.weights[j] - up.inner);
  }
}

template <class A>
inline void moe_route_backward(const MoeRoute<A>& s, const MoeRouteGradient<A>& grad) {
  const int E = int(s.E);
  const bool direct = grad.dlogits.dtype == own_dtype<A> && E % PAD == 0;
  std::vector<A> psum(size_t(padded(E)));
  if (grad.psum) std::copy(grad.psum, grad.psum + E, psum.begin());
  parallel_ranges(s.T, grain_of(E), [&](int64_t begin, int64_t end) {
    Room<A> room(E);
    for (int64_t row = begin; row < end; ++row) {
      const bool real = !s.mask || s.mask[row];
      Upstream<A> up{grad.weights ? grad.weights + row * s.k : nullptr, grad.psum && real ? psum.data() : nullptr,
                     grad.lse && real ? grad.lse[row] : A(0), A(0)};
      for (int64_t j = 0; up.weights && j < s.k; ++j) up.inner += s.weights[row * s.k + j] * up.weights[j];
      A* dz = direct ? static_cast<A*>(grad.dlogits.at(row, 0)) : room.rank;
      gradient_row(s, padded_row(s.logits, row, E, room.z), row, up, room, dz);
      if (!direct) narrow(dz, E, grad.dlogits.dtype, grad.dlogits.at(row, 0));
    }
  });
}

W2S_KERNELS(MoeRouteKernels, moe_route_forward<Real>, moe_route_backward<Real>)

#include "cpu/target_end.h"
