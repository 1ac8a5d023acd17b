// A row's tile of scores, a TILE in L1 at a time: the k largest by insertion past the smallest of them (few elements are),
// (max, sum of exponentials), and the label's score. Equal scores stay in the order of their indices.
#include "cpu/prototypes/prototype_distance.h"

#include "cpu/target_begin.h"

template <class A>
W2S_INLINE void insert(PrototypeRow<A>& r, A z, int64_t index) {
  int64_t at = r.k - 1;
  for (; at > 0 && r.top[at - 1] < z; --at) r.top[at] = r.top[at - 1], r.index[at] = r.index[at - 1];
  r.top[at] = z, r.index[at] = index;
}

template <class A>
W2S_INLINE void keep_largest(PrototypeRow<A>& r, const A* z, int n, A max, int64_t first) {
  using V = Vec<A>;
  A* least = r.top + r.k - 1;
  if (!(max > *least)) return;
  for (int c = 0; c < n; c += V::W) {
    if (!V::gt(V::load(z + c), V::set(*least)).any()) continue;
    for (int i = c; i < std::min(n, c + V::W); ++i)
      if (z[i] > *least) insert(r, z[i], first + i);
    if (r.k == 1 && *least == max) return;
  }
}

template <class A>
inline void prototype_row(const PrototypeTile<A>& t, PrototypeRow<A>& r) {
  using V = Vec<A>;
  A z[TILE];
  const V inverse = V::set(t.inverse);
  r.max = -infinity<A>, r.sum = 0;
  for (int64_t begin = 0; begin < t.columns; begin += TILE) {
    const int n = int(std::min<int64_t>(TILE, t.columns - begin));
    auto lost = V::Mask::none();
    for (int c = 0; c < padded(n); c += V::W) ((V::load(t.raw + begin + c) + V::load(t.offset + begin + c)) * inverse).store(z + c);
    for (int c = n; c < padded(n); ++c) z[c] = -infinity<A>;
    for (int c = 0; c < padded(n); c += V::W) lost = lost | V::nan(V::load(z + c));
    r.nan |= lost.any();
    const A max = tile_max(z, n);
    keep_largest(r, z, n, max, t.first + begin);
    const int64_t label = r.label - t.first - begin;
    if (label >= 0 && label < n) r.at_label = z[label];
    if (!r.lse) continue;
    const A both = std::max(r.max, max), line = both == -infinity<A> ? A(0) : both;
    r.sum = (r.sum == 0 ? A(0) : r.sum * std::exp(r.max - line)) + tile_exp_sum(z, n, line);
    r.max = both;
  }
}

template <class A>
inline double row_square(const void* x, Dtype dtype, int64_t n) {
  using V = Vec<A>;
  A buffer[TILE];
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += TILE) {
    const int m = int(std::min<int64_t>(TILE, n - begin));
    const A* row = static_cast<const A*>(x) + begin;
    if (dtype != own_dtype<A>) {
      widen(static_cast<const char*>(x) + begin * bytes_of(dtype), dtype, m, A(0), buffer);
      row = buffer;
    }
    V sum[4] = {V::set(0), V::set(0), V::set(0), V::set(0)};
    const auto add = [&sum](int u, V x) { sum[u] = V::fma(x, x, sum[u]); };
    int c = 0;
    for (; c + 4 * V::W <= m; c += 4 * V::W)
      for (int u = 0; u < 4; ++u) add(u, V::load(row + c + u * V::W));
    for (; c + V::W <= m; c += V::W) add(0, V::load(row + c));
    if (c < m) add(1, V::load_first(row + c, m - c));  // one after another, the last would wait for each other
    total += double(((sum[0] + sum[1]) + (sum[2] + sum[3])).sum());
  }
  return total;
}

// A lse of -infinity, of a row without a valid class, counts as 0: its scores are -infinity. Scores go through memory, as in
// the forward pass: in one expression the product is not rounded before lse is taken from it, and what is left of the nearest
// prototype's score, 0 there, is a rounding error of it, whose exponential is infinite where the temperature is low.
template <class A>
inline void gradient_row(const PrototypeTile<A>& t, A lse, A coef, A* out) {
  using V = Vec<A>;
  A z[TILE];
  const V inverse = V::set(t.inverse), line = V::set(lse == -infinity<A> ? A(0) : lse), factor = V::set(coef);
  for (int64_t begin = 0; begin < t.columns; begin += TILE) {
    const int n = int(std::min<int64_t>(TILE, t.columns - begin));
    for (int c = 0; c < n; c += V::W) ((V::load(t.raw + begin + c) + V::load(t.offset + begin + c)) * inverse).store(z + c);
    for (int c = 0; c < n; c += V::W) (factor * vexp(V::load(z + c) - line)).store(out + begin + c);
  }
}

W2S_KERNELS(PrototypeKernels, prototype_row<Real>, row_square<Real>, gradient_row<Real>)

#include "cpu/target_end.h"
