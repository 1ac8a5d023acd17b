// Rows of distillation: a few passes over V numbers that stay in L1 or L2, one
// exponential a logit. Logits are shifted by their maximum before anything else, so that the digits of a large offset
// are not lost and equal models give exactly 0.
//
// `L` is how the rows lie: one at a time, padded to 16 (the student's and teacher's masses end in zeros there), or one a
// lane.
#include "cpu/linear_loss/kd.h"

#include "cpu/target_begin.h"

#include "cpu/linear_loss/kd_mass_kernel.h"

constexpr double LOG_FLOOR = -1e4;

// Vectors of a row: log p, p, log q (floored), q.
template <class L>
struct Both {
  using A = typename L::Scalar;
  using T = Vec<A>;
  const A *x, *e, *y, *f;
  typename L::Number p_scale, q_scale;
  T ls, ps, lt, qs, floor, none;
  W2S_INLINE Both(const Mass<L>& s, const Mass<L>& t)
      : x(s.x), e(s.e), y(t.x), f(t.e), p_scale(s.scale), q_scale(t.scale), ls(all<A>(s.log_sum)), ps(all<A>(s.scale)),
        lt(all<A>(t.log_sum)), qs(all<A>(t.scale)), floor(T::set(A(LOG_FLOOR))), none(T::set(0)) {}
  W2S_INLINE T log_p(int64_t i) const { return T::load(x + i) - ls; }
  W2S_INLINE T p(int64_t i) const { return T::load(e + i) * ps; }
  W2S_INLINE T log_q(int64_t i) const { return T::max(floor, T::load(y + i) - lt); }
  W2S_INLINE T q(int64_t i) const { return T::load(f + i) * qs; }
  // p and q without their scale, whose rounding a sum over all classes would only repeat
  W2S_INLINE T mass_p(int64_t i) const { return T::load(e + i); }
  W2S_INLINE T mass_q(int64_t i) const { return T::load(f + i); }
  // b where the mass a is not 0, otherwise 0: 0 times an infinite logarithm
  W2S_INLINE T where(T a, T b) const { return T::select(T::eq(a, none), none, b); }
};

// product's D = -sum t log p with t in proportion to p^beta q^power. r = t without its scale 1 / sum, which is returned in
// `scale`: 0 where no class is possible for both.
template <class L, class A = typename L::Scalar, class Number = typename L::Number>
W2S_INLINE Number product(const L& l, const Both<L>& v, A* r, Number& scale) {
  using T = Vec<A>;
  const KdLoss& loss = l.loss;
  const T own = T::set(A(loss.beta)), theirs = T::set(A(loss.power)), never = T::set(-infinity<A>);
  for (int64_t i = 0; i < l.n; i += T::W) {
    T u = T::set(0);  // a power of 0 leaves its factor out
    if (loss.beta != 0) u = own * v.log_p(i);
    if (loss.power != 0) u = T::fma(theirs, T::select(T::eq(v.log_q(i), v.floor), never, v.log_q(i)), u);
    u.store(r + i);
  }
  for (int64_t i = l.filled(); i < l.n; ++i) r[i] = -infinity<A>;
  const T line = l.top(r);
  Number s[2] = {0.0, 0.0};
  l.sums(s, [&](int64_t i, T* sum) {
    const T t = vexp(T::load(r + i) - line);
    t.store(r + i);
    sum[0] = sum[0] + t;
    sum[1] = T::fma(t, v.where(t, v.log_p(i)), sum[1]);
  });
  scale = unless_zero(s[0], 1.0 / s[0], 0.0);
  return 0.0 - s[1] * scale;
}

constexpr double NORM_FLOOR = 1e-8;

// cosine's D = 1 - z.y / (|z| |y|) of raw logits z in r and y in g, and what its gradient own z - theirs y is made of.
template <class L, class A = typename L::Scalar, class Number = typename L::Number>
W2S_INLINE Number cosine(const L& l, A* r, A* g, Number& own, Number& theirs) {
  using T = Vec<A>;
  l.load(l.student(), A(0), r);
  l.load(l.teacher(0), A(0), g);
  Number s[3] = {0.0, 0.0, 0.0};
  l.template sums<true>(s, [&](int64_t i, T* sum) {
    const T z = T::load(r + i), y = T::load(g + i);
    sum[0] = T::fma(z, y, sum[0]);
    sum[1] = T::fma(z, z, sum[1]);
    sum[2] = T::fma(y, y, sum[2]);
  });
  const Number norm = sqrt_of(s[1]), mine = at_least(norm, NORM_FLOOR);
  theirs = 1.0 / (mine * at_least(sqrt_of(s[2]), NORM_FLOOR));
  const Number similar = s[0] * theirs;
  own = from(norm, NORM_FLOOR, similar / (mine * mine));
  return 1.0 - similar;
}

// D, and the mean under p that its gradient needs. jsd leaves log p - log m in r; product leaves its target there, and
// the target's scale in mean.
template <class L, class A = typename L::Scalar, class Number = typename L::Number>
W2S_INLINE Number divergence(const L& l, const Both<L>& v, A* r, Number& mean) {
  using T = Vec<A>;
  const double b = l.loss.beta;
  Number one[1] = {0.0}, s[2] = {0.0, 0.0};
  switch (l.loss.kind) {
    case FKL: {
      l.sums(one, [&](int64_t i, T* sum) {
        const T q = v.mass_q(i);
        sum[0] = T::fma(q, v.log_q(i) - v.where(q, v.log_p(i)), sum[0]);
      });
      return one[0] * v.q_scale;
    }
    case CE_SOFT: {
      l.sums(one, [&](int64_t i, T* sum) {
        const T q = v.mass_q(i);
        sum[0] = T::fma(q, v.where(q, v.log_p(i)), sum[0]);
      });
      return 0.0 - one[0] * v.q_scale;
    }
    case RKL: {
      l.sums(one, [&](int64_t i, T* sum) {
        const T p = v.mass_p(i);
        sum[0] = T::fma(p, v.where(p, v.log_p(i)) - v.log_q(i), sum[0]);
      });
      return mean = one[0] * v.p_scale;
    }
    case SCE: {
      l.sums(s, [&](int64_t i, T* sum) {
        const T q = v.mass_q(i);
        sum[0] = T::fma(q, v.where(q, v.log_p(i)), sum[0]);
        sum[1] = T::fma(v.mass_p(i), v.log_q(i), sum[1]);
      });
      mean = s[1] * v.p_scale;
      return (b - 1) * (s[0] * v.q_scale) - b * mean;
    }
    case PRODUCT: return product(l, v, r, mean);
    case COSINE:
    case JSD: break;
  }
  // m / p from the difference of the logarithms
  const T beta = T::set(A(b)), other = T::set(A(1 - b));
  for (int64_t i = 0; i < l.n; i += T::W) {
    const T d = v.log_q(i) - v.log_p(i), u = vexp(T::set(0) - d.abs());
    const auto up = T::gt(d, T::set(0));
    T::fma(T::select(up, other, beta), u, T::select(up, beta, other)).store(r + i);
  }
  log_row(r, l.n);
  l.sums(s, [&](int64_t i, T* sum) {
    const T p = v.mass_p(i), q = v.mass_q(i), d = v.log_q(i) - v.log_p(i), over = T::set(0) - T::load(r + i);
    const T mine = v.where(p, over - T::max(d, T::set(0))), theirs = v.where(q, over + T::min(d, T::set(0)));
    mine.store(r + i);
    sum[0] = T::fma(q, theirs, sum[0]);
    sum[1] = T::fma(p, mine, sum[1]);
  });
  mean = s[1] * v.p_scale;
  return b * (s[0] * v.q_scale) + (1 - b) * mean;
}

// d (c D) / d z into g, c with the chain 1 / tau. cosine: r and g hold the raw logits, mean and total `own` and `theirs`. `one` of the cross-entropy: its softmax at temperature 1 is p itself, or
// exp(tau x) / sum_one
template <class L, class A = typename L::Scalar, class Number = typename L::Number>
W2S_INLINE void gradient_of(const L& l, const Both<L>& v, Number total, const A* r, Number mean, Number sum_one, A* g) {
  using T = Vec<A>;
  const KdLoss& loss = l.loss;
  const double b = loss.beta;
  const Number c = l.coef_kd() * (1 / loss.tau);
  const T mass = all<A>(total * c), scale = all<A>(c), m = all<A>(mean);
  const auto write = [&](const auto& own) {
    if (!loss.hard) {
      for (int64_t i = 0; i < l.n; i += T::W) own(i).store(g + i);
    } else if (loss.tau == 1) {
      const T hard = all<A>(l.coef_ce());
      for (int64_t i = 0; i < l.n; i += T::W) T::fma(hard, v.p(i), own(i)).store(g + i);
    } else {
      const T hard = all<A>(l.coef_ce() / sum_one), heat = T::set(A(loss.tau));
      for (int64_t i = 0; i < l.n; i += T::W) T::fma(hard, vexp(heat * T::load(v.x + i)), own(i)).store(g + i);
    }
  };
  switch (loss.kind) {
    case FKL:
    case CE_SOFT: write([&](int64_t i) { return mass * v.p(i) - scale * v.q(i); }); break;
    case RKL:
      write([&](int64_t i) {
        const T p = v.p(i);
        return scale * p * (v.where(p, v.log_p(i)) - v.log_q(i) - m);
      });
      break;
    case SCE: {
      const T soft = T::set(A(1 - b)), back = all<A>(b * c);
      write([&](int64_t i) {
        const T p = v.p(i);
        return soft * (mass * p - scale * v.q(i)) - back * p * (v.log_q(i) - m);
      });
      break;
    }
    case PRODUCT: {
      const T share = all<A>(mean * c), own = all<A>(unless_zero(mean, c, 0.0));
      write([&](int64_t i) { return own * v.p(i) - share * T::load(r + i); });
      break;
    }
    case COSINE: {
      const T own = all<A>(mean * l.coef_kd()), theirs = all<A>(total * l.coef_kd());
      write([&](int64_t i) { return own * T::load(r + i) - theirs * T::load(g + i); });
      break;
    }
    case JSD: {
      const T share = all<A>((1 - b) * c);
      write([&](int64_t i) { return share * v.p(i) * (T::load(r + i) - m); });
      break;
    }
  }
  if (loss.hard) l.take_target(g);
}

template <class A>
W2S_INLINE double entropy(const A* x, const A* e, int64_t n, double log_sum, double scale) {
  using T = Vec<A>;
  double s[1];
  row_sums_of<A>(n, s, [&](int64_t i, T* sum) {
    const T p = T::load(e + i);
    sum[0] = T::fma(p, T::select(T::eq(p, T::set(0)), T::set(0), T::load(x + i) - T::set(A(log_sum))), sum[0]);
  });
  return -s[0] * scale;
}

// The first index of the largest of n
template <class A>
W2S_INLINE int64_t first_largest(const A* x, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 1; i < n; ++i)
    if (x[i] > x[best]) best = i;
  return best;
}

// D, the cross-entropy and the gradient of what `l` holds, in working memory of KD_BUFFERS times l.width().
template <class L>
struct Distilled {
  Mass<L> s, t;
  typename L::Number kd, ce;
  typename L::Scalar* g;
};

template <class L, class A = typename L::Scalar, class Number = typename L::Number>
W2S_INLINE Distilled<L> distilled(const L& l, A* buffers) {
  const KdLoss& loss = l.loss;
  const int64_t width = l.width();
  A *x = buffers, *e = x + width, *y = e + width, *f = y + width, *g = f + width, *work = g + width;
  const bool logs = loss.kind != CE_SOFT || loss.statistics;  // of the teacher
  const bool apart = loss.kind == COSINE;                     // of logits: needs no distribution itself
  const bool warm = loss.hard && loss.tau != 1;
  Number sum_one = 1.0, mean = 0.0, ce = 0.0, theirs = 0.0;
  // the mixture first: it needs working rows that the student will take
  Mass<L> t{y, f, 0.0, 1.0, 1.0}, s{x, e, 0.0, 1.0, 1.0};
  if (!apart || loss.statistics) t = l.count() == 1 ? one_teacher(l, 0, y, f, logs) : mixture(l, y, f, x, e, work, logs);
  if (!apart || loss.statistics || loss.hard) s = softmax_of(l, l.student(), x, e, warm ? &sum_one : nullptr);
  const Both<L> v(s, t);
  const Number kd = apart ? cosine(l, work, g, mean, theirs) : divergence(l, v, work, mean);
  if (loss.hard) ce = warm ? log_of(sum_one) - loss.tau * l.at_target(x) : s.log_sum - l.at_target(x);
  if (loss.gradient) gradient_of(l, v, apart ? theirs : t.total, work, mean, sum_one, g);
  return {s, t, kd, ce, g};
}

// The gradient is written to `out` (V elements of `type`), which may be where the student's or a teacher's row is read.
template <class A>
inline KdResult kd_row(const KdRow& row, A* buffers, void* out, Dtype type) {
  const OneRow<A> l(row);
  const auto d = distilled(l, buffers);
  KdResult found{d.kd, d.ce};
  if (row.loss.statistics) {
    found.entropy_student = entropy(d.s.x, d.s.e, l.n, d.s.log_sum, d.s.scale);
    found.entropy_teacher = entropy(d.t.x, d.t.e, l.n, d.t.log_sum, d.t.scale);
    // logits, where there are some: exponentials and logarithms may make two numbers equal
    const bool given = row.count > 1 || row.teachers[0].form == PROBS || row.teachers[0].form == TOPK;
    found.agree = first_largest(d.s.x, row.loss.V) == first_largest(given ? d.t.e : d.t.x, row.loss.V);
  }
  if (row.loss.gradient) narrow<A>(d.g, int(row.loss.V), type, out);
  return found;
}

// Rows [first, end) of the list, short ones: D and cross-entropy into kd and ce.
template <class A>
inline void kd_short_rows(const KdRows& rows, int64_t first, int64_t end, A* buffers, A* kd, A* ce) {
  constexpr int W = Vec<A>::W;
  for (; first < end; first += W) {
    const Lanes<A> l(rows, first, end);
    const auto d = distilled(l, buffers);
    const int lanes = end - first < W ? int(end - first) : W;
    A own[W], hard[W];
    d.kd.v.store(own);
    d.ce.v.store(hard);
    for (int i = 0; i < lanes; ++i) {
      kd[l.index[i]] = own[i];
      ce[l.index[i]] = hard[i];
    }
    if (rows.loss.gradient) l.store(d.g, rows.gradient, lanes);
  }
}

W2S_KERNELS(KdKernels, kd_row<Real>, kd_short_rows<Real>)

#include "cpu/target_end.h"
