// Rows of many classes: one exponential a logit, the rest in cache. Rows of
// two classes: a row a lane, since all is a function of z_1 - z_0.
#include "cpu/linear_loss/confidence.h"

#include "cpu/log_sum_exp.h"

#include "cpu/target_begin.h"

#include "cpu/linear_loss/kd_layout_kernel.h"

// x = z - max z, e = exp(x), both padded; returns the sum of e
template <class A>
W2S_INLINE double softmax_row(const RowSource& z, int64_t V, A* x, A* e) {
  using T = Vec<A>;
  widen<A>(z.data, z.dtype, int(V), -infinity<A>, x);
  const A most = tile_max(x, int(V));
  const T top = T::set(most == -infinity<A> ? A(0) : most);
  double sum[1];
  row_sums_of<A>(padded(int(V)), sum, [&](int64_t i, T* s) {
    const T own = T::load(x + i) - top, mass = vexp(own);
    own.store(x + i);
    mass.store(e + i);
    s[0] = s[0] + mass;
  });
  return sum[0];
}

template <class A>
inline double first_outside(const RowSource& w, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const double x = double(scalar_as<A>(w.data, w.dtype, i));
    if (x < 0 || x > 1) return x;
  }
  return std::numeric_limits<double>::quiet_NaN();
}

template <class A>
inline double labels_outside(const Rows& w, int64_t first, int64_t end, int64_t V) {
  for (int64_t r = first; r < end; ++r) {
    const double found = first_outside<A>({w.at(r, 0), w.dtype, nullptr}, V);
    if (found == found) return found;
  }
  return std::numeric_limits<double>::quiet_NaN();
}

// n columns of a row from c on, with `fill` behind them: in place where they are whole vectors of A already
template <class A>
W2S_INLINE const A* filled_tile(const Rows& rows, int64_t row, int64_t c, int n, A fill, A* buffer) {
  if (rows.dtype == own_dtype<A> && n == padded(n)) return static_cast<const A*>(rows.at(row, c));
  widen<A>(rows.at(row, c), rows.dtype, n, fill, buffer);
  return buffer;
}

template <class A>
inline void confidence_norm(const Rows& z, int64_t row, int64_t V, A* top, A* scale) {
  A buffer[TILE];
  LogSumExp total;
  for (int64_t c = 0; c < V; c += TILE) {
    const int n = int(V - c < TILE ? V - c : TILE);
    const A* x = filled_tile(z, row, c, n, -infinity<A>, buffer);
    const A most = tile_max(x, n);
    total.add(double(most), double(tile_exp_sum(x, n, most)));
  }
  *top = total.max == -std::numeric_limits<double>::infinity() ? A(0) : A(total.max);
  *scale = A(1 / total.sum);
}

// Rows are summed in A a few at a time, and those sums in double: exponentials are made again, which takes less than
// keeping them does once the rows are out of L1.
template <class A>
inline A confidence_shifts(const ConfidenceColumns<A>& s, int64_t first, int n, double least, A* shift) {
  using T = Vec<A>;
  constexpr int64_t ROWS = 16;
  const T one = T::set(1), zero = T::set(0);
  T off = zero;  // how far the farthest label is off [0, 1]; NaN does not count
  double p[SHIFTS], weak[SHIFTS];
  std::fill(p, p + (s.B > ROWS ? n : 0), 0.0), std::fill(weak, weak + (s.B > ROWS ? n : 0), 0.0);
  A p_sum[SHIFTS], w_sum[SHIFTS], one_row[SHIFTS], other[SHIFTS];
  for (int64_t from = 0; from < s.B; from += ROWS) {
    for (int i = 0; i < padded(n); i += T::W) zero.store(p_sum + i), zero.store(w_sum + i);
    for (int64_t r = from; r < s.B && r < from + ROWS; ++r) {
      const T top = T::set(s.top[r]), scale = T::set(s.scale[r]);
      const A* z = filled_tile(s.z, r, first, n, -infinity<A>, one_row);
      const A* w = filled_tile(s.w, r, first, n, A(0), other);
      for (int i = 0; i < padded(n); i += T::W) {
        T::fma(vexp(T::load(z + i) - top), scale, T::load(p_sum + i)).store(p_sum + i);
        const T label = T::load(w + i);
        off = T::max(T::max(zero - label, label - one), off);
        (T::load(w_sum + i) + label).store(w_sum + i);
      }
    }
    if (s.B <= ROWS) break;
    for (int c = 0; c < n; ++c) p[c] += double(p_sum[c]), weak[c] += double(w_sum[c]);
  }
  for (int c = 0; s.B > ROWS && c < n; ++c) p_sum[c] = A(p[c]), w_sum[c] = A(weak[c]);
  const T lowest = T::set(A(least * double(s.B)));  // of both means the number of rows cancels
  A *ratio = one_row, *logs = other;
  for (int i = 0; i < padded(n); i += T::W) {
    const T sum = T::load(p_sum + i), of = T::select(T::nle(sum, lowest), sum, lowest) / T::load(w_sum + i);
    of.store(ratio + i), of.store(logs + i);
  }
  log_row(logs, padded(n));
  for (int c = 0; c < n; ++c) shift[c] = ratio[c] == infinity<A> ? infinity<A> : logs[c];
  return off.top();
}

// The first class of the largest x - shift
template <class A>
W2S_INLINE int64_t guess_row(const A* x, const A* shift, int64_t V) {
  using T = Vec<A>;
  const int64_t n = padded(int(V));
  T most = T::set(-infinity<A>);
  for (int64_t i = 0; i < n; i += T::W) most = T::max(T::load(x + i) - T::load(shift + i), most);
  const T top = T::set(most.top());
  for (int64_t i = 0; i < n; i += T::W) {
    const auto found = T::eq(T::load(x + i) - T::load(shift + i), top);
    const int64_t at = found.any() ? i + __builtin_ctz(found.bits()) : V;
    if (at < V) return at;  // beyond it lies what fills the last vector
  }
  return 0;  // a row of NaN
}

// w becomes p^beta w^alpha up to the factor that `sum` returns, 0 where all are; returns sum of w log p
template <class A>
W2S_INLINE double product_row(const Mixture& m, int64_t V, const A* x, double log_sum, A* w, double& sum) {
  using T = Vec<A>;
  const int64_t n = padded(int(V));
  if (m.alpha != 0) log_row(w, n);
  const T alpha = T::set(A(m.alpha)), beta = T::set(A(m.beta)), ls = T::set(A(log_sum)), zero = T::set(0);
  for (int64_t i = 0; i < n; i += T::W) {  // an exponent of 0 leaves a factor out, where 0 log 0 would be NaN
    const T weak = m.alpha != 0 ? alpha * T::load(w + i) : zero;
    (m.beta != 0 ? T::fma(beta, T::load(x + i) - ls, weak) : weak).store(w + i);
  }
  for (int64_t i = V; i < n; ++i) w[i] = -infinity<A>;
  const A most = tile_max(w, int(V));
  const T top = T::set(most == -infinity<A> ? A(0) : most);
  double s[2];
  row_sums_of<A>(n, s, [&](int64_t i, T* acc) {
    const T mass = vexp(T::load(w + i) - top);
    mass.store(w + i);
    acc[0] = acc[0] + mass;
    acc[1] = acc[1] + T::select(T::eq(mass, zero), zero, mass * (T::load(x + i) - ls));
  });
  sum = s[0];
  return s[1];
}

// `buffers` holds 3 rows of kd_width(V); the gradient is written to `out`, V elements of `type`.
template <class A>
inline ConfidenceResult confidence_row(const Mixture& m, const ConfidenceRow& row, A* buffers, void* out, Dtype type) {
  using T = Vec<A>;
  const int64_t V = row.V, n = padded(int(V));
  A *x = buffers, *e = x + kd_width(V), *w = e + kd_width(V);
  const double total = softmax_row<A>(row.z, V, x, e), log_sum = std::log(total);
  widen<A>(row.w.data, row.w.dtype, int(V), A(0), w);
  const T ls = T::set(A(log_sum)), zero = T::set(0), one = T::set(1);
  auto bad = T::Mask::none();
  double s[2];
  row_sums_of<A>(n, s, [&](int64_t i, T* acc) {
    const T q = T::load(w + i);
    bad = bad | T::gt(zero, q) | T::gt(q, one);
    acc[0] = acc[0] + q;
    acc[1] = acc[1] + T::select(T::eq(q, zero), zero, q * (T::load(x + i) - ls));
  });
  ConfidenceResult found{0, bad.any() ? first_outside<A>(row.w, V) : std::numeric_limits<double>::quiet_NaN()};
  double mass = 1, weak = 1 - m.coef;  // of the target; factor of w in it
  int64_t guess = -1;
  if (m.product) {
    double sum;
    const double cross = -product_row(m, V, x, log_sum, w, sum);
    const bool none = sum == 0;  // no class is possible for both
    found.loss = none ? 0 : cross / sum;
    weak = none ? 0 : 1 / sum;
    mass = none ? 0 : 1;
  } else {
    mass = weak * s[0] + m.coef;
    found.loss = weak > 0 ? -weak * s[1] : 0;
    if (m.coef > 0) {
      guess = guess_row(x, static_cast<const A*>(row.shift), V);
      found.loss -= m.coef * (double(x[guess]) - log_sum);
    }
  }
  if (!m.gradient) return found;
  const T own = T::set(A(mass * m.share / total)), given = T::set(A(weak * m.share));
  for (int64_t i = 0; i < n; i += T::W) (T::load(e + i) * own - T::load(w + i) * given).store(e + i);
  if (guess >= 0) e[guess] -= A(m.coef * m.share);
  narrow<A>(e, int(V), type, out);
  return found;
}

// Rows [first, first + n) of two classes, n <= PAIRS, padded to 16.
template <class A>
struct PairBlock {
  A d[PAIRS], w0[PAIRS], w1[PAIRS];  // z_1 - z_0 and the labels
  A p0[PAIRS], p1[PAIRS], log1p[PAIRS];  // log(1 + exp(-|d|))
};

template <class A>
W2S_INLINE void split_pairs(const Rows& from, int64_t first, int n, A* a, A* b) {
  A both[2 * PAIRS + PAD];
  if (from.stride == 2 * from.bytes) {
    widen<A>(from.at(first, 0), from.dtype, 2 * n, A(0), both);
  } else {
    for (int i = 0; i < n; ++i) widen<A>(from.at(first + i, 0), from.dtype, 2, A(0), both + 2 * i);
  }
  for (int i = 0; i < n; ++i) a[i] = both[2 * i], b[i] = both[2 * i + 1];
  for (int i = n; i < padded(n); ++i) a[i] = b[i] = 0;
}

// Not inlined: a threshold that is one of the p0 must meet the same bits again.
template <class A>
__attribute__((noinline)) void pair_block(const ConfidencePairs& s, int64_t first, int n, PairBlock<A>& b) {
  using T = Vec<A>;
  const T zero = T::set(0), one = T::set(1);
  if (s.single) {
    widen<A>(s.z.at(first, 0), s.z.dtype, n, A(0), b.d);
    widen<A>(s.w.at(first, 0), s.w.dtype, n, A(0), b.w1);
    for (int i = 0; i < padded(n); i += T::W) (one - T::load(b.w1 + i)).store(b.w0 + i);
  } else {
    split_pairs(s.z, first, n, b.p0, b.p1);
    split_pairs(s.w, first, n, b.w0, b.w1);
    for (int i = 0; i < padded(n); i += T::W) (T::load(b.p1 + i) - T::load(b.p0 + i)).store(b.d + i);
  }
  A sum[PAIRS], u[PAIRS];
  for (int i = 0; i < padded(n); i += T::W) {
    const T d = T::load(b.d + i), small = vexp(zero - d.abs()), all = one + small, large = one / all, rest = small * large;
    const auto up = T::gt(d, zero);
    T::select(up, rest, large).store(b.p0 + i);
    T::select(up, large, rest).store(b.p1 + i);
    small.store(u + i);
    all.store(sum + i);
    all.store(b.log1p + i);
  }
  log_row(b.log1p, padded(n));
  for (int i = 0; i < padded(n); i += T::W) {  // log(1 + u), corrected by what 1 + u rounds off
    const T small = T::load(u + i), all = T::load(sum + i);
    T::select(T::eq(all, one), small, T::load(b.log1p + i) * (small / (all - one))).store(b.log1p + i);
  }
}

// p_0 of rows [first, first + n), and the sum of w_1
template <class A>
inline double pair_scores(const ConfidencePairs& s, int64_t first, int n, A* p0) {
  PairBlock<A> b;
  pair_block(s, first, n, b);
  double sum = 0;
  for (int i = 0; i < n; ++i) {
    p0[i] = b.p0[i];
    sum += double(b.w1[i]);
  }
  return sum;
}

// Target of the rows into t0, t1.
template <class A>
W2S_INLINE void pair_targets(const Mixture& m, int n, PairBlock<A>& b, double line, A* t0, A* t1) {
  using T = Vec<A>;
  const T zero = T::set(0), one = T::set(1);
  if (!m.product) {
    const T weak = T::set(A(1 - m.coef)), own = T::set(A(m.coef)), level = T::set(A(line));
    for (int i = 0; i < padded(n); i += T::W) {
      const auto first = T::ge(T::load(b.p0 + i), level);
      T::fma(weak, T::load(b.w0 + i), T::select(first, own, zero)).store(t0 + i);
      T::fma(weak, T::load(b.w1 + i), T::select(first, zero, own)).store(t1 + i);
    }
    return;
  }
  if (m.alpha != 0) {
    log_row(b.w0, padded(n));
    log_row(b.w1, padded(n));
  }
  const T alpha = T::set(A(m.alpha)), beta = T::set(A(m.beta)), least = T::set(-infinity<A>), most = T::set(infinity<A>);
  const auto power = [&](T log_p, T log_w) {
    const T weak = m.alpha != 0 ? alpha * log_w : zero;
    return m.beta != 0 ? T::fma(beta, log_p, weak) : weak;
  };
  for (int i = 0; i < padded(n); i += T::W) {
    const T d = T::load(b.d + i), l = T::load(b.log1p + i);
    const T u0 = power(zero - (T::max(d, zero) + l), T::load(b.w0 + i));
    const T u1 = power(zero - (T::max(zero - d, zero) + l), T::load(b.w1 + i));
    const T odds = T::select(T::eq(u0, most) | T::eq(u1, most), most - most, u1 - u0);  // as exp(inf) / exp(inf)
    const T small = vexp(zero - odds.abs()), large = one / (one + small), rest = small * large;
    const auto up = T::gt(odds, zero), none = T::eq(u0, least) & T::eq(u1, least);
    T::select(none, zero, T::select(up, rest, large)).store(t0 + i);
    T::select(none, zero, T::select(up, large, rest)).store(t1 + i);
  }
}

// Sum of the losses of rows [first, first + n); the gradient, [., 2] or [.], goes to `out`, where row `first` is.
template <class A>
inline ConfidenceResult pair_rows(const Mixture& m, const ConfidencePairs& s, int64_t first, int n, double line, void* out, Dtype type) {
  using T = Vec<A>;
  PairBlock<A> b;
  pair_block(s, first, n, b);
  const T zero = T::set(0), one = T::set(1), share = T::set(A(m.share));
  auto bad = T::Mask::none();
  for (int i = 0; i < padded(n); i += T::W)
    for (const A* w : {b.w0, b.w1}) bad = bad | T::gt(zero, T::load(w + i)) | T::gt(T::load(w + i), one);
  ConfidenceResult found{0, std::numeric_limits<double>::quiet_NaN()};
  for (int i = 0; bad.any() && i < n && std::isnan(found.outside); ++i)
    found.outside = first_outside<A>({s.w.at(first + i, 0), s.w.dtype, nullptr}, s.single ? 1 : 2);
  A t0[PAIRS], t1[PAIRS], rows[PAIRS], g[2 * PAIRS + PAD];
  pair_targets(m, n, b, line, t0, t1);
  for (int i = 0; i < padded(n); i += T::W) {
    const T a = T::load(t0 + i), c = T::load(t1 + i), d = T::load(b.d + i), l = T::load(b.log1p + i);
    const T first_loss = T::select(T::eq(a, zero), zero, a * (T::max(d, zero) + l));
    const T second_loss = T::select(T::eq(c, zero), zero, c * (T::max(zero - d, zero) + l));
    (first_loss + second_loss).store(rows + i);
    ((T::load(b.p0 + i) * (a + c) - a) * share).store(t0 + i);
    ((T::load(b.p1 + i) * (a + c) - c) * share).store(t1 + i);
  }
  for (int i = 0; i < n; ++i) found.loss += double(rows[i]);
  if (!m.gradient) return found;
  if (s.single) {
    narrow<A>(t1, n, type, out);
    return found;
  }
  for (int i = 0; i < n; ++i) g[2 * i] = t0[i], g[2 * i + 1] = t1[i];
  narrow<A>(g, 2 * n, type, out);
  return found;
}

W2S_KERNELS(ConfidenceKernels, pair_scores<Real>, pair_rows<Real>, confidence_norm<Real>, confidence_shifts<Real>,
            labels_outside<Real>, confidence_row<Real>)

#include "cpu/target_end.h"
