// Contrastive losses on a tile of scores: statistics of rows and of columns, and the gradient in place of the scores.
// A row (at most SIDE columns) stays in L1; columns go down in strips of STRIP, so nothing is reduced across lanes.
// Cost an element: an exponential a direction in each of the two passes; a sigmoid one exponential and two divisions.
#include "cpu/contrastive/contrastive_loss.h"

#include "cpu/target_begin.h"

#define W2S_BODY __attribute__((always_inline))

template <class V>
W2S_INLINE V with_lane(V a, int64_t lane, typename V::Scalar x) {
  typename V::Scalar lanes[V::W];
  a.store(lanes);
  lanes[lane] = x;
  return V::load(lanes);
}

template <class V>
W2S_INLINE V first_lanes(V a, int64_t n) {  // others 0, whatever they hold
  typename V::Scalar lanes[V::W];
  a.store(lanes);
  return V::load_first(lanes, int(n));
}

// log(1 + e) for e in [0, 1], accurate relative to itself: 2 atanh(e / (2 + e)) by its series, |argument| <= 1/3
template <class V>
W2S_INLINE V log1p_unit(V e) {
  using A = typename V::Scalar;
  constexpr int terms = sizeof(A) == 4 ? 8 : 17;
  const V t = e / (e + V::set(2)), square = t * t;
  V sum = V::set(A(1) / A(2 * terms - 1));
  for (int k = terms - 2; k >= 0; --k) sum = V::fma(sum, square, V::set(A(1) / A(2 * k + 1)));
  return (t + t) * sum;
}

template <class A>
inline ContrastiveRow<A> contrastive_row(const ContrastiveTile<A>& t, int64_t r) {
  using V = Vec<A>;
  A z[SIDE + PAD];
  const A* raw = t.raw + r * t.ld;
  const int n = int(t.columns);
  const V scale = V::set(t.scale), bias = V::set(t.bias);
  for (int c = 0; c < padded(n); c += V::W) V::fma(V::load(raw + c), scale, bias).store(z + c);
  for (int c = n; c < padded(n); ++c) z[c] = -infinity<A>;
  ContrastiveRow<A> found{0, 0, 0, 0};
  const int64_t own = t.own + r;
  const bool here = own >= 0 && own < t.columns;
  if (here) found.own = z[own];
  if (t.column_labels) {
    if (here) z[own] = 0;
    const V label = V::set(t.row_labels[r]);
    V sum = V::set(0);
    for (int c = 0; c < padded(n); c += V::W)
      sum = sum + V::select(V::eq(V::load(t.column_labels + c), label), V::load(z + c), V::set(0));
    found.positives = sum.sum();
    if (here) z[own] = found.own;
  }
  if (here && t.exclude) z[own] = -infinity<A>;
  found.max = tile_max(z, n);
  found.sum = tile_exp_sum(z, n, found.max);
  return found;
}

template <class A>
inline void contrastive_columns(const ContrastiveTile<A>& t, int64_t c, A* max, A* sum, A* positives) {
  using V = Vec<A>;
  const V scale = V::set(t.scale), bias = V::set(t.bias);
  const int64_t end = std::min(c + STRIP, round_up(t.columns, PAD));
  for (; c < end; c += V::W, max += V::W, sum += V::W, positives += V::W) {
    V m = V::set(-infinity<A>), s = V::set(0), p = V::set(0);
    for (int64_t r = 0; r < t.rows; ++r) m = V::max(V::fma(V::load(t.raw + r * t.ld + c), scale, bias), m);
    const V line = V::select(V::gt(m, V::set(-infinity<A>)), m, V::set(0));
    const V labels = t.column_labels ? V::load(t.column_labels + c) : V::set(0);
    for (int64_t r = 0; r < t.rows; ++r) {
      const V z = V::fma(V::load(t.raw + r * t.ld + c), scale, bias);
      s = s + vexp(z - line);
      if (t.column_labels) p = p + V::select(V::eq(labels, V::set(t.row_labels[r])), z, V::set(0));
    }
    m.store(max), s.store(sum), p.store(positives);
  }
}

// Goes over row r: work(z, c, own) is the gradient of columns c on, and own the lane of the own column or -1.
template <class A, class F>
W2S_INLINE ContrastiveSums over_row(const ContrastiveTile<A>& t, int64_t r, Dtype dtype, const F& work) {
  using V = Vec<A>;
  A narrow_row[SIDE + PAD];
  A* raw = t.raw + r * t.ld;
  A* out = dtype == own_dtype<A> ? raw : narrow_row;
  const V scale = V::set(t.scale), bias = V::set(t.bias);
  V sum = V::set(0), product = V::set(0);
  for (int64_t c = 0; c < t.columns; c += V::W) {
    const int64_t left = t.columns - c, lane = t.own + r - c;
    V x = V::load(raw + c);
    if (left < V::W) x = first_lanes(x, left);
    V g = work(V::fma(x, scale, bias), c, lane >= 0 && lane < V::W && lane < left ? lane : -1);
    if (left < V::W) g = first_lanes(g, left);
    sum = sum + g;
    product = V::fma(g, x, product);
    (g * scale).store(out + c);
  }
  if (out != raw) narrow(narrow_row, int(t.columns), dtype, raw);
  return {double(sum.sum()), double(product.sum()), 0};
}

template <class A, bool columns>
W2S_INLINE ContrastiveSums softmax_row(const ContrastiveTile<A>& t, const ContrastiveWeights<A>& w, int64_t r, Dtype dtype) {
  using V = Vec<A>;
  const V max = V::set(w.row_max[r]), coef = V::set(w.row_coef[r]);
  const V label = V::set(t.row_labels ? t.row_labels[r] : A(0)), share = V::set(w.row_share ? w.row_share[r] : A(0));
  return over_row(t, r, dtype, [&](V z, int64_t c, int64_t own) W2S_BODY {
    if (own >= 0 && t.exclude) z = with_lane(z, own, -infinity<A>);
    V g = coef * vexp(z - max);
    if (columns) g = V::fma(V::load(w.column_coef + c), vexp(z - V::load(w.column_max + c)), g);
    if (w.row_share) {
      const V both = columns ? share + V::load(w.column_share + c) : share;
      g = g - V::select(V::eq(V::load(t.column_labels + c), label), both, V::set(0));
    }
    if (own < 0) return g;
    A lanes[V::W];
    g.store(lanes);
    return with_lane(g, own, t.exclude ? A(0) : lanes[own] - w.own);
  });
}

template <class A>
inline ContrastiveSums contrastive_gradient(const ContrastiveTile<A>& t, const ContrastiveWeights<A>& w, int64_t r, Dtype dtype) {
  return w.column_coef ? softmax_row<A, true>(t, w, r, dtype) : softmax_row<A, false>(t, w, r, dtype);
}

template <class A>
inline ContrastiveSums contrastive_sigmoid(const ContrastiveTile<A>& t, A share, int64_t r, Dtype dtype) {
  using V = Vec<A>;
  V loss = V::set(0);
  const V one = V::set(1);
  ContrastiveSums found = over_row(t, r, dtype, [&](V z, int64_t c, int64_t own) W2S_BODY {
    const V e = vexp(V::set(0) - z.abs()), q = one / (one + e);
    V softplus = V::max(V::set(0), z), g = V::select(V::gt(z, V::set(0)), q, e * q);
    if (own >= 0) {  // softplus(-z) and -sigmoid(-z), which keep their digits where they are small
      const auto on = V::gt(with_lane(V::set(0), own, A(1)), V::set(0));
      softplus = V::select(on, V::max(V::set(0), V::set(0) - z), softplus);
      g = V::select(on, V::set(0) - V::select(V::gt(z, V::set(0)), e * q, q), g);
    }
    softplus = softplus + log1p_unit(e);
    if (t.columns - c < V::W) softplus = first_lanes(softplus, t.columns - c);
    loss = loss + softplus;
    return V::set(share) * g;
  });
  found.loss = double(loss.sum());
  return found;
}

W2S_KERNELS(ContrastiveKernels, contrastive_row<Real>, contrastive_columns<Real>, contrastive_gradient<Real>, contrastive_sigmoid<Real>)

#include "cpu/target_end.h"
