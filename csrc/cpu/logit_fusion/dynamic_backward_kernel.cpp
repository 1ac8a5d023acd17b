// dynamic_fusion_weights_backward: implicit differentiation of F(t) = T, F(t) = KL(P_t || P_L), x = sum_k u_k d_k.
//
//     dt/dz_L = -(t P (x - m) - P + p) / den       dt/dx = -t^2 P (x - m) / den       dt/dT = 1 / den,  den = t Var_P x
//     dT_k/dz_k = Q_k (D_k - E_Q D_k)              dT_k/dz_0 = Q_0 - Q_k              D_k = log Q_k - log Q_0
// A row to a thread; three passes over it (log-sum-exps; moments of x; gradients). Always in double: den vanishes for
// small shifts, and training calls this once a step. Floor: inputs read three times, gradients written once.
#include "cpu/logit_fusion/dynamic.h"

#include "cpu/target_begin.h"

#include "cpu/logit_fusion/dynamic_item_kernel.h"

template <class A>
struct DynamicBackward {
  const DynamicGradient& g;
  const Dynamic& d;
  int64_t row;
  DynamicItem<A> item;
  int L;
  std::vector<double> tuned, plain;  // log-sum-exp of each model
  std::vector<double> gap;           // E_{Q_k} D_k
  std::vector<double> step, scale, mean, log_sum;  // a problem's t, g / den, m, log sum exp(log p + t x)
  std::vector<double> u;                            // [problems, K]
  double base_lse = 0;
  std::unique_ptr<double[][2]> far;

  DynamicBackward(const DynamicGradient& gradient, int64_t r)
      : g(gradient), d(gradient.d), row(r), item(d, r), L(int(d.anti.size())), tuned(size_t(d.K)), plain(size_t(L)),
        gap(size_t(d.K)), step(size_t(d.problems())), scale(step), mean(step), log_sum(step),
        u(size_t(d.problems() * d.K)), far(new double[size_t(d.K)][2]) {}

  int own(int k) const { return L > 1 ? k : 0; }

  template <class Fetch>
  double lse(Fetch fetch_tile) {
    LogSumExp total;
    for (int64_t c = 0; c < d.V; c += TILE) {
      const int n = int(std::min<int64_t>(TILE, d.V - c));
      const A* z = fetch_tile(c, n);
      const A m = tile_max(z, n);
      total.add(m, tile_exp_sum(z, n, m));
    }
    return total.value();
  }

  void log_sums() {
    base_lse = lse([this](int64_t c, int n) { return item.base(c, n); });
    for (int k = 0; k < d.K; ++k) tuned[size_t(k)] = lse([this, k](int64_t c, int n) { return item.expert(k, c, n); });
    for (int l = 0; l < L; ++l) plain[size_t(l)] = lse([this, l](int64_t c, int n) { return item.anti(l, c, n); });
    for (int k = 0; k < d.K; ++k) {
      far[size_t(k)][0] = tuned[size_t(k)] - plain[size_t(own(k))] - 60;
      far[size_t(k)][1] = tuned[size_t(k)] - plain[size_t(own(k))] + 60;
    }
  }

  void problems() {
    const double share = d.average && d.multi == 1 ? d.K : 1;
    const double *alpha = g.alpha.data() + row * d.K, *up = g.grad.data() + row * d.K;
    if (d.multi == 1) {
      for (int k = 0; k < d.K; ++k) {
        step[size_t(k)] = alpha[k] * share;
        scale[size_t(k)] = g.saturated[size_t(row * d.K + k)] || alpha[k] == 0 ? 0 : up[k] / share;
        u[size_t(k * d.K + k)] = 1;
      }
      return;
    }
    double t = alpha[0], chain = 0;
    bool stuck = false;
    for (int k = 0; k < d.K; ++k) {
      t = std::max(t, alpha[k]);
      stuck |= g.saturated[size_t(row * d.K + k)] != 0;
    }
    for (int k = 0; k < d.K; ++k) {
      u[size_t(k)] = t == 0 ? 0 : alpha[k] / t;
      chain += up[k] * u[size_t(k)];
    }
    step[0] = t;
    scale[0] = stuck || t == 0 ? 0 : chain;
  }

  void moments(int p) {
    using V = Vec<A>;
    const double t = step[size_t(p)];
    LogSumExp total;
    double s1 = 0, s2 = 0, top = NONE;
    for (int64_t c = 0; c < d.V; c += TILE) {
      const int n = int(std::min<int64_t>(TILE, d.V - c));
      const A* zl = item.base(c, n);
      item.shifts(zl, c, n, -1, u.data() + p * d.K, far.get(), item.x);
      for (int v = 0; v < padded(n); v += V::W)
        V::fma(V::set(A(t)), V::load(item.x + v), V::load(zl + v) - V::set(A(base_lse))).store(item.t + v);
      const A m = tile_max(item.t, n);
      if (m == -infinity<A>) continue;
      V a = V::set(0), b = a;
      for (int v = 0; v < padded(n); v += V::W) {
        const V x = V::load(item.x + v), ex = vexp(V::load(item.t + v) - V::set(m)) * x;
        a = a + ex;
        b = V::fma(ex, x, b);
      }
      const double now = std::max(top, double(m)), old = top == NONE ? 0 : std::exp(top - now), f = std::exp(m - now);
      s1 = s1 * old + f * a.sum();
      s2 = s2 * old + f * b.sum();
      top = now;
      total.add(m, tile_exp_sum(item.t, n, m));
    }
    mean[size_t(p)] = s1 / total.sum;
    log_sum[size_t(p)] = total.value();
    const double variance = s2 / total.sum - mean[size_t(p)] * mean[size_t(p)];
    if (scale[size_t(p)] != 0) scale[size_t(p)] /= t * variance;
  }

  void gaps() {
    for (int k = 0; k < d.K; ++k) {
      double total = 0;
      for (int64_t c = 0; c < d.V; c += TILE) {
        const int n = int(std::min<int64_t>(TILE, d.V - c));
        const A *e = item.expert(k, c, n), *a = item.anti(k, c, n);
        probabilities(e, n, tuned[size_t(k)], item.w);
        for (int i = 0; i < n; ++i) total += item.w[i] > 0 ? item.w[i] * ratio(e[i], a[i], k) : 0;
      }
      gap[size_t(k)] = total;
    }
  }

  double ratio(A e, A a, int k) const { return (double(e) - tuned[size_t(k)]) - (double(a) - plain[size_t(own(k))]); }

  static void probabilities(const A* z, int n, double log_sum, A* p) {
    using V = Vec<A>;
    for (int i = 0; i < padded(n); i += V::W) vexp(V::load(z + i) - V::set(A(log_sum))).store(p + i);
  }

  // gradients of one tile; ge, ga hold K and L tiles
  void tile(int64_t c, int n, A* gb, A* ge, A* ga) {
    const A* zl = item.base(c, n);
    std::fill_n(gb, TILE, A(0));
    std::fill_n(ge, TILE * d.K, A(0));
    std::fill_n(ga, TILE * L, A(0));
    probabilities(zl, n, base_lse, item.shift);
    for (int p = 0; p < d.problems(); ++p) {
      const double s = scale[size_t(p)], t = step[size_t(p)];
      if (s == 0) continue;
      item.shifts(zl, c, n, -1, u.data() + p * d.K, far.get(), item.x);
      for (int i = 0; i < padded(n); ++i) item.t[i] = zl[i] - A(base_lse) + A(t) * item.x[i];
      probabilities(item.t, n, log_sum[size_t(p)], item.w);
      for (int i = 0; i < n; ++i) {
        const double lean = t * item.w[i] * (item.x[i] - mean[size_t(p)]);
        gb[i] -= A(s * (lean - item.w[i] + item.shift[i]));
        item.x[i] = A(-s * t * lean);
      }
      for (int k = 0; k < d.K; ++k) {
        const double uk = u[size_t(p * d.K + k)];
        if (uk == 0) continue;
        const A *e = item.expert(k, c, n), *a = item.anti(k, c, n);
        for (int i = 0; i < n; ++i) {
          if (std::isinf(e[i]) != std::isinf(a[i])) continue;  // an infinite shift does not move
          ge[k * TILE + i] += A(uk) * item.x[i];
          ga[own(k) * TILE + i] -= A(uk) * item.x[i];
        }
      }
    }
    if (!g.has_target) targets(c, n, ge, ga);
  }

  double share(int k) const { return d.multi == 1 ? scale[size_t(k)] : scale[0] / d.K; }

  void targets(int64_t c, int n, A* ge, A* ga) {
    for (int k = 0; k < d.K; ++k) {
      const double s = share(k);
      if (s == 0) continue;
      const A *e = item.expert(k, c, n), *a = item.anti(k, c, n);
      probabilities(e, n, tuned[size_t(k)], item.w);
      probabilities(a, n, plain[size_t(own(k))], item.t);
      for (int i = 0; i < n; ++i) {
        if (item.w[i] > 0) ge[k * TILE + i] += A(s * item.w[i] * (ratio(e[i], a[i], k) - gap[size_t(k)]));
        ga[own(k) * TILE + i] += A(s * (item.t[i] - item.w[i]));
      }
    }
  }

  void run() {
    log_sums();
    problems();
    for (int p = 0; p < d.problems(); ++p)
      if (scale[size_t(p)] != 0) moments(p);
    if (!g.has_target) gaps();
    for (int k = 0; k < d.K; ++k) g.dtarget.put(row * d.K + k, g.has_target ? share(k) : 0);
    std::vector<A> buffer(size_t(TILE * (1 + d.K + L)));
    A *gb = buffer.data(), *ge = gb + TILE, *ga = ge + TILE * d.K;
    for (int64_t c = 0; c < d.V; c += TILE) {
      const int n = int(std::min<int64_t>(TILE, d.V - c));
      tile(c, n, gb, ge, ga);
      narrow(gb, n, g.base.dtype, g.base.at(row, c));
      for (int k = 0; k < d.K; ++k) narrow(ge + k * TILE, n, g.expert[size_t(k)].dtype, g.expert[size_t(k)].at(row, c));
      for (int l = 0; l < L; ++l) narrow(ga + l * TILE, n, g.anti[size_t(l)].dtype, g.anti[size_t(l)].at(row, c));
    }
  }
};

inline void dynamic_backward_rows(const DynamicGradient& g) {
  parallel_items(g.d.B, 1, [&g](int64_t r) { DynamicBackward<double>(g, r).run(); });
}

W2S_KERNELS(DynamicBackwardKernels, dynamic_backward_rows)

#include "cpu/target_end.h"
