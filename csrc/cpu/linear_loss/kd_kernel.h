// Included once a target by for_each_target.h. One row of distillation: a few passes over V numbers that stay in L1 or L2,
// one exponential a logit. Logits are shifted by their maximum before anything else, so that the digits of a large offset
// are not lost and equal models give exactly 0.
//
// Working rows are padded to 16: the student's and teacher's masses end in zeros there.
#include "cpu/linear_loss/chunk_kernel.h"

constexpr double LOG_FLOOR = -1e4, REMAINDER_FLOOR = 1e-12;

// Sums over a padded row, tile by tile: `step(i, sums)` adds a vector at i to N running sums.
template <class A, int N, class Step>
W2S_INLINE void row_sums_of(int64_t n, double (&out)[N], const Step& step) {
  using V = Vec<A>;
  for (int k = 0; k < N; ++k) out[k] = 0;
  for (int64_t at = 0; at < n; at += TILE) {
    constexpr int U = 16 / V::W > 1 ? 16 / V::W : 1;  // as many partial sums, hence as small an error, on every target
    V sums[U][N];
    for (auto& part : sums)
      for (int k = 0; k < N; ++k) part[k] = V::set(0);
    const int64_t end = n < at + TILE ? n : at + TILE;
    for (int64_t i = at; i < end; i += U * V::W)
      for (int u = 0; u < U; ++u) step(i + u * V::W, sums[u]);
    for (auto& part : sums)
      for (int k = 0; k < N; ++k) out[k] += double(part[k].sum());
  }
}

template <class A>
W2S_INLINE A scalar_of(const RowSource& s, int64_t i) {
  A x[PAD];
  widen<A>(static_cast<const char*>(s.data) + i * (s.dtype == Dtype::f64 ? 8 : s.dtype == Dtype::f32 ? 4 : 2), s.dtype, 1, A(0), x);
  return x[0];
}

// log x in place for x >= 0: 0 gives -infinity. s = (m - 1) / (m + 1) of the mantissa in [sqrt(1/2), sqrt 2), then the
// series of 2 atanh s, whose first left-out term is below 2^-28.
inline void log_row(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float y = x[i];
    const bool small = y < 1.17549435e-38f;
    const float scaled = small ? y * 8388608.0f : y;
    int32_t bits;
    __builtin_memcpy(&bits, &scaled, 4);
    const int32_t shifted = bits - 0x3f3504f3, e = shifted >> 23;
    const int32_t mantissa = (shifted & 0x007fffff) + 0x3f3504f3;
    float m;
    __builtin_memcpy(&m, &mantissa, 4);
    const float s = (m - 1.0f) / (m + 1.0f), z = s * s;
    const float tail = z * (0.333333333f + z * (0.2f + z * (0.142857143f + z * 0.111111111f)));
    const float exponent = float(small ? e - 23 : e);
    const float log = exponent * 0.693359375f + (2 * s + (2 * s * tail - exponent * 2.12194440e-4f));
    x[i] = y > 0 ? log : y == 0 ? -std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN();
  }
}
inline void log_row(double* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = std::log(x[i]);
}

// A distribution: log p = x - log_sum, p = e * scale.
template <class A>
struct Mass {
  A *x, *e;
  double log_sum = 0, scale = 1, total = 1;
};

// x = z as A, padded with -infinity; returns the maximum
template <class A>
W2S_INLINE A load_row(const RowSource& s, int64_t V, A* x) {
  using T = Vec<A>;
  widen<A>(s.data, s.dtype, int(V), -infinity<A>, x);
  const A* bias = static_cast<const A*>(s.bias);
  if (bias) {
    int64_t i = 0;
    for (; i + T::W <= V; i += T::W) (T::load(x + i) + T::load(bias + i)).store(x + i);
    for (; i < V; ++i) x[i] += bias[i];
  }
  T top[2] = {T::set(-infinity<A>), T::set(-infinity<A>)};
  const int64_t n = padded(int(V));
  int64_t i = 0;
  for (; i + 2 * T::W <= n; i += 2 * T::W) {
    top[0] = T::max(T::load(x + i), top[0]);
    top[1] = T::max(T::load(x + i + T::W), top[1]);
  }
  for (; i < n; i += T::W) top[0] = T::max(T::load(x + i), top[0]);
  const A found = T::max(top[0], top[1]).top();
  return found == -infinity<A> ? A(0) : found;
}

// x = (z - max z) / tau, e = exp(x); `one`, if not null, gets sum exp(z - max z)
template <class A>
W2S_INLINE Mass<A> softmax_row(const RowSource& s, int64_t V, double tau, A* x, A* e, double* one) {
  using T = Vec<A>;
  const T top = T::set(load_row(s, V, x)), heat = T::set(A(1 / tau));
  double sums[2];
  if (one) {
    row_sums_of<A>(padded(int(V)), sums, [&](int64_t i, T* sum) {
      const T z = T::load(x + i) - top, scaled = z * heat, mass = vexp(scaled);
      scaled.store(x + i);
      mass.store(e + i);
      sum[0] = sum[0] + mass;
      sum[1] = sum[1] + vexp(z);
    });
    *one = sums[1];
  } else {
    double sum[1];
    row_sums_of<A>(padded(int(V)), sum, [&](int64_t i, T* acc) {
      const T scaled = (T::load(x + i) - top) * heat, mass = vexp(scaled);
      scaled.store(x + i);
      mass.store(e + i);
      acc[0] = acc[0] + mass;
    });
    sums[0] = sum[0];
  }
  return {x, e, std::log(sums[0]), 1 / sums[0], 1};
}

// q of a teacher that gives probabilities; its logarithm too if wanted
template <class A>
W2S_INLINE Mass<A> given_row(const RowTeacher& t, int64_t V, A* x, A* e, bool logs) {
  using T = Vec<A>;
  const int64_t n = padded(int(V));
  if (t.form == PROBS) {
    widen<A>(t.values.data, t.values.dtype, int(V), A(0), e);
    if (logs) {
      for (int64_t i = 0; i < n; ++i) x[i] = e[i];
      log_row(x, n);
    }
  } else {
    double listed = 0;
    A mass[64];
    for (int64_t k = 0; k < t.K; ++k) listed += double(mass[k] = std::exp(scalar_of<A>(t.values, k)));
    const double left = 1 - listed;
    const A rest = t.K < V ? A((left > REMAINDER_FLOOR ? left : REMAINDER_FLOOR) / double(V - t.K)) : A(0), log_rest = std::log(rest);
    for (int64_t i = 0; i < n; ++i) e[i] = i < V ? rest : A(0);
    for (int64_t k = 0; k < t.K; ++k) e[t.ids[k]] += mass[k] - rest;
    if (logs) {
      for (int64_t i = 0; i < n; ++i) x[i] = i < V ? log_rest : -infinity<A>;
      for (int64_t k = 0; k < t.K; ++k) x[t.ids[k]] = std::log(e[t.ids[k]]);
    }
  }
  double total[1];
  row_sums_of<A>(n, total, [&](int64_t i, T* sum) { sum[0] = sum[0] + T::load(e + i); });
  return {x, e, 0, 1, total[0]};
}

template <class A>
W2S_INLINE Mass<A> one_teacher(const RowTeacher& t, const KdRow& row, A* x, A* e, bool logs) {
  if (t.form == PROBS || t.form == TOPK) return given_row<A>(t, row.V, x, e, logs);
  return softmax_row<A>(t.values, row.V, row.tau, x, e, nullptr);
}

// The mixture sum_m share_m q_m into x, e; y, f and work are three more rows. log q is a log-sum-exp of the parts'
// logarithms: q itself may be too small for a float.
template <class A>
W2S_INLINE Mass<A> mixture(const KdRow& row, A* x, A* e, A* y, A* f, A* work, bool logs) {
  using T = Vec<A>;
  const int64_t n = padded(int(row.V));
  double total = 0;
  for (int m = 0; m < row.count; ++m) {
    const double share = row.teachers[m].share;
    const Mass<A> part = one_teacher<A>(row.teachers[m], row, m ? y : x, m ? f : e, logs);
    total += share * part.total;
    const T scale = T::set(A(part.scale * share)), shift = T::set(A(std::log(share) - part.log_sum));
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
  return {x, e, 0, 1, total};
}

// Vectors of a row: log p, p, log q (floored), q.
template <class A>
struct Both {
  using T = Vec<A>;
  const A *x, *e, *y, *f;
  T ls, ps, lt, qs, floor, none;
  W2S_INLINE Both(const Mass<A>& s, const Mass<A>& t)
      : x(s.x), e(s.e), y(t.x), f(t.e), ls(T::set(A(s.log_sum))), ps(T::set(A(s.scale))), lt(T::set(A(t.log_sum))),
        qs(T::set(A(t.scale))), floor(T::set(A(LOG_FLOOR))), none(T::set(0)) {}
  W2S_INLINE T log_p(int64_t i) const { return T::load(x + i) - ls; }
  W2S_INLINE T p(int64_t i) const { return T::load(e + i) * ps; }
  W2S_INLINE T log_q(int64_t i) const { return T::max(floor, T::load(y + i) - lt); }
  W2S_INLINE T q(int64_t i) const { return T::load(f + i) * qs; }
  // b where the mass a is not 0, otherwise 0: 0 times an infinite logarithm
  W2S_INLINE T where(T a, T b) const { return T::select(T::eq(a, none), none, b); }
};

// product's D = -sum t log p with t in proportion to p^beta q^power. r = t without its scale 1 / sum, which is returned in
// `scale`: 0 where no class is possible for both.
template <class A>
W2S_INLINE double product(const KdRow& row, const Both<A>& v, A* r, double& scale) {
  using T = Vec<A>;
  const int64_t n = padded(int(row.V));
  const T own = T::set(A(row.beta)), theirs = T::set(A(row.power)), never = T::set(-infinity<A>);
  T top = never;
  for (int64_t i = 0; i < n; i += T::W) {
    T u = T::set(0);  // a power of 0 leaves its factor out
    if (row.beta != 0) u = own * v.log_p(i);
    if (row.power != 0) u = T::fma(theirs, T::select(T::eq(v.log_q(i), v.floor), never, v.log_q(i)), u);
    u.store(r + i);
  }
  for (int64_t i = row.V; i < n; ++i) r[i] = -infinity<A>;
  for (int64_t i = 0; i < n; i += T::W) top = T::max(T::load(r + i), top);
  scale = 0;
  const A most = top.top();
  const T line = T::set(most == -infinity<A> ? A(0) : most);
  double s[2];
  row_sums_of<A>(n, s, [&](int64_t i, T* sum) {
    const T t = vexp(T::load(r + i) - line);
    t.store(r + i);
    sum[0] = sum[0] + t;
    sum[1] = T::fma(t, v.where(t, v.log_p(i)), sum[1]);
  });
  if (s[0] == 0) return 0;
  scale = 1 / s[0];
  return -s[1] * scale;
}

// D, and the mean under p that its gradient needs. jsd leaves log p - log m in r; product leaves its target there, and
// the target's scale in mean.
template <class A>
W2S_INLINE double divergence(const KdRow& row, const Both<A>& v, double total, A* r, double& mean) {
  using T = Vec<A>;
  const int64_t n = padded(int(row.V));
  const double b = row.beta;
  double s[2];
  switch (row.kind) {
    case FKL: {
      row_sums_of<A>(n, s, [&](int64_t i, T* sum) {
        const T q = v.q(i);
        sum[0] = T::fma(q, v.log_q(i) - v.where(q, v.log_p(i)), sum[0]);
      });
      return s[0];
    }
    case CE_SOFT: {
      row_sums_of<A>(n, s, [&](int64_t i, T* sum) {
        const T q = v.q(i);
        sum[0] = T::fma(q, v.where(q, v.log_p(i)), sum[0]);
      });
      return -s[0];
    }
    case RKL: {
      row_sums_of<A>(n, s, [&](int64_t i, T* sum) {
        const T p = v.p(i);
        sum[0] = T::fma(p, v.where(p, v.log_p(i)) - v.log_q(i), sum[0]);
      });
      return mean = s[0];
    }
    case SCE: {
      row_sums_of<A>(n, s, [&](int64_t i, T* sum) {
        const T q = v.q(i);
        sum[0] = T::fma(q, v.where(q, v.log_p(i)), sum[0]);
        sum[1] = T::fma(v.p(i), v.log_q(i), sum[1]);
      });
      mean = s[1];
      return -(1 - b) * s[0] - b * s[1];
    }
    case PRODUCT: return product<A>(row, v, r, mean);
    case JSD: break;
  }
  // m / p from the difference of the logarithms
  const T beta = T::set(A(b)), other = T::set(A(1 - b));
  for (int64_t i = 0; i < n; i += T::W) {
    const T d = v.log_q(i) - v.log_p(i), u = vexp(T::set(0) - d.abs());
    const auto up = T::gt(d, T::set(0));
    T::fma(T::select(up, other, beta), u, T::select(up, beta, other)).store(r + i);
  }
  log_row(r, n);
  row_sums_of<A>(n, s, [&](int64_t i, T* sum) {
    const T p = v.p(i), q = v.q(i), d = v.log_q(i) - v.log_p(i), over = T::set(0) - T::load(r + i);
    const T mine = v.where(p, over - T::max(d, T::set(0))), theirs = v.where(q, over + T::min(d, T::set(0)));
    mine.store(r + i);
    sum[0] = T::fma(q, theirs, sum[0]);
    sum[1] = T::fma(p, mine, sum[1]);
  });
  mean = s[1];
  return b * s[0] + (1 - b) * s[1];
}

// d (c D) / d z into g, c with the chain 1 / tau. `one` of the cross-entropy: its softmax at temperature 1 is p itself, or
// exp(tau x) / sum_one
template <class A>
W2S_INLINE void gradient_row(const KdRow& row, const Both<A>& v, double total, const A* r, double mean, double sum_one, A* g) {
  using T = Vec<A>;
  const int64_t n = padded(int(row.V));
  const double b = row.beta, c = row.coef_kd / row.tau;
  const T mass = T::set(A(total * c)), scale = T::set(A(c)), m = T::set(A(mean));
  const auto write = [&](const auto& own) {
    if (row.target < 0) {
      for (int64_t i = 0; i < n; i += T::W) own(i).store(g + i);
    } else if (row.tau == 1) {
      const T hard = T::set(A(row.coef_ce));
      for (int64_t i = 0; i < n; i += T::W) T::fma(hard, v.p(i), own(i)).store(g + i);
    } else {
      const T hard = T::set(A(row.coef_ce / sum_one)), heat = T::set(A(row.tau));
      for (int64_t i = 0; i < n; i += T::W) T::fma(hard, vexp(heat * T::load(v.x + i)), own(i)).store(g + i);
    }
  };
  switch (row.kind) {
    case FKL:
    case CE_SOFT: write([&](int64_t i) { return mass * v.p(i) - scale * v.q(i); }); break;
    case RKL:
      write([&](int64_t i) {
        const T p = v.p(i);
        return scale * p * (v.where(p, v.log_p(i)) - v.log_q(i) - m);
      });
      break;
    case SCE: {
      const T soft = T::set(A(1 - b)), back = T::set(A(b * c));
      write([&](int64_t i) {
        const T p = v.p(i);
        return soft * (mass * p - scale * v.q(i)) - back * p * (v.log_q(i) - m);
      });
      break;
    }
    case PRODUCT: {
      const T share = T::set(A(mean * c)), own = T::set(A(mean == 0 ? 0 : c));
      write([&](int64_t i) { return own * v.p(i) - share * T::load(r + i); });
      break;
    }
    case JSD: {
      const T share = T::set(A((1 - b) * c));
      write([&](int64_t i) { return share * v.p(i) * (T::load(r + i) - m); });
      break;
    }
  }
  if (row.target >= 0) g[row.target] -= A(row.coef_ce);
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

// `buffers` holds KD_BUFFERS rows of kd_width(V); the gradient is written to `out` (V elements of `type`), which may be
// where the student's or a teacher's row is read.
template <class A>
inline KdResult kd_row(const KdRow& row, A* buffers, void* out, Dtype type) {
  const int64_t width = kd_width(row.V), n = padded(int(row.V));
  A *x = buffers, *e = x + width, *y = e + width, *f = y + width, *g = f + width, *work = g + width;
  const bool logs = row.kind != CE_SOFT || row.statistics;  // of the teacher
  double sum_one = 1;
  // the mixture first: it needs working rows that the student will take
  const Mass<A> t = row.count == 1 ? one_teacher<A>(row.teachers[0], row, y, f, logs) : mixture<A>(row, y, f, x, e, work, logs);
  const bool warm = row.target >= 0 && row.tau != 1;
  const Mass<A> s = softmax_row<A>(row.student, row.V, row.tau, x, e, warm ? &sum_one : nullptr);
  const Both<A> v(s, t);
  KdResult found;
  double mean = 0;
  found.kd = divergence<A>(row, v, t.total, work, mean);
  if (row.target >= 0) found.ce = warm ? std::log(sum_one) - row.tau * double(x[row.target]) : s.log_sum - double(x[row.target]);
  if (row.statistics) {
    found.entropy_student = entropy(x, e, n, s.log_sum, s.scale);
    found.entropy_teacher = entropy(t.x, t.e, n, t.log_sum, t.scale);
    // logits, where there are some: exponentials and logarithms may make two numbers equal
    const bool given = row.count > 1 || row.teachers[0].form == PROBS || row.teachers[0].form == TOPK;
    found.agree = first_largest(x, row.V) == first_largest(given ? t.e : t.x, row.V);
  }
  if (!row.gradient) return found;
  gradient_row<A>(row, v, t.total, work, mean, sum_one, g);
  narrow<A>(g, int(row.V), type, out);
  return found;
}
