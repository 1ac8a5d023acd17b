// Included once a target by kd_kernel.cpp (no include guard). The student's and the teachers' distributions in working memory,
// `L` how their rows lie.
#include "cpu/linear_loss/kd_layout_kernel.h"

constexpr double REMAINDER_FLOOR = 1e-12;

// A distribution: log p = x - log_sum, p = e * scale.
template <class L>
struct Mass {
  typename L::Scalar *x, *e;
  typename L::Number log_sum, scale, total;
};

// x = (z - max z) / tau, e = exp(x); `one`, if not null, gets sum exp(z - max z)
template <class L, class Source, class Number = typename L::Number, class A = typename L::Scalar>
W2S_INLINE Mass<L> softmax_of(const L& l, const Source& s, A* x, A* e, Number* one) {
  using T = Vec<A>;
  l.load(s, -infinity<A>, x);
  const T top = l.top(x), heat = T::set(A(1 / l.loss.tau));
  Number sum[1] = {0.0};
  if (one) {
    Number both[2] = {0.0, 0.0};
    l.template sums<true>(both, [&](int64_t i, T* acc) {
      const T z = T::load(x + i) - top, scaled = z * heat, mass = vexp(scaled);
      scaled.store(x + i);
      mass.store(e + i);
      acc[0] = acc[0] + mass;
      acc[1] = acc[1] + vexp(z);
    });
    sum[0] = both[0];
    *one = both[1];
  } else {
    l.template sums<true>(sum, [&](int64_t i, T* acc) {
      const T scaled = (T::load(x + i) - top) * heat, mass = vexp(scaled);
      scaled.store(x + i);
      mass.store(e + i);
      acc[0] = acc[0] + mass;
    });
  }
  return {x, e, log_of(sum[0]), 1.0 / sum[0], 1.0};
}

// q of a top-k teacher; its logarithm too if wanted
template <class A>
W2S_INLINE void topk_row(const RowTeacher& t, int64_t V, int64_t n, A* x, A* e, bool logs) {
  double listed = 0;
  A mass[64];
  for (int64_t k = 0; k < t.K; ++k) listed += double(mass[k] = std::exp(scalar_as<A>(t.values.data, t.values.dtype, k)));
  const double left = 1 - listed;
  const A rest = t.K < V ? A((left > REMAINDER_FLOOR ? left : REMAINDER_FLOOR) / double(V - t.K)) : A(0), log_rest = std::log(rest);
  for (int64_t i = 0; i < n; ++i) e[i] = i < V ? rest : A(0);
  for (int64_t k = 0; k < t.K; ++k) e[t.ids[k]] += mass[k] - rest;
  if (!logs) return;
  for (int64_t i = 0; i < n; ++i) x[i] = i < V ? log_rest : -infinity<A>;
  for (int64_t k = 0; k < t.K; ++k) x[t.ids[k]] = std::log(e[t.ids[k]]);
}

template <class L, class A = typename L::Scalar>
W2S_INLINE Mass<L> one_teacher(const L& l, int m, A* x, A* e, bool logs) {
  using T = Vec<A>;
  using Number = typename L::Number;
  const KdForm form = l.form(m);
  if (form != PROBS && form != TOPK) return softmax_of(l, l.teacher(m), x, e, static_cast<Number*>(nullptr));
  if (form == PROBS) {
    l.load(l.teacher(m), A(0), e);
    if (logs) {
      for (int64_t i = 0; i < l.n; ++i) x[i] = e[i];
      log_row(x, l.n);
    }
  } else if constexpr (L::alone) {
    topk_row<A>(l.row.teachers[m], l.loss.V, l.n, x, e, logs);
  }
  Number total[1] = {0.0};
  l.sums(total, [&](int64_t i, T* sum) { sum[0] = sum[0] + T::load(e + i); });
  return {x, e, 0.0, 1.0, total[0]};
}

// The mixture sum_m share_m q_m into x, e; y, f and work are three more rows. log q is a log-sum-exp of the parts'
// logarithms: q itself may be too small for a float.
template <class L, class A = typename L::Scalar>
W2S_INLINE Mass<L> mixture(const L& l, A* x, A* e, A* y, A* f, A* work, bool logs) {
  using T = Vec<A>;
  const int64_t n = l.n;
  typename L::Number total = 0.0;
  for (int m = 0; m < l.count(); ++m) {
    const double share = l.share(m);
    const Mass<L> part = one_teacher(l, m, m ? y : x, m ? f : e, logs);
    total = total + share * part.total;
    const T scale = all<A>(part.scale * share), shift = all<A>(std::log(share) - part.log_sum);
    A* mass = part.e;
    for (int64_t i = 0; i < n; i += T::W) {
      const T own = T::load(mass + i) * scale;
      (m ? T::load(e + i) + own : own).store(e + i);
    }
    if (!logs) continue;
    if (m == 0) {
      for (int64_t i = 0; i < n; i += T::W) (T::load(x + i) + shift).store(x + i);
      continue;
    }
    for (int64_t i = 0; i < n; i += T::W) {
      const T a = T::load(x + i), b = T::load(y + i) + shift, gap = T::select(T::eq(a, b), T::set(0), (a - b).abs());
      (T::set(1) + vexp(T::set(0) - gap)).store(work + i);
      T::max(a, b).store(x + i);
    }
    log_row(work, n);
    for (int64_t i = 0; i < n; i += T::W) (T::load(x + i) + T::load(work + i)).store(x + i);
  }
  return {x, e, 0.0, 1.0, total};
}
