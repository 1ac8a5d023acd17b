// fuse_backward: the one gradient of fuse_logits, fused_log_softmax and fused_stats.
//
//     g_v = grad_v + P_v (a + b z_v - [subtract] sum_u grad_u) + sum_j c_j [v = index_j],   P = exp(z - lse),
// 0 where z = -inf; dz = g / temperature, dweights_k = sum_v dz_v (experts_k - anti_k), dtemperature = -sum_v dz_v z_v.
// Items (row, segment); z is formed again tile by tile. Floor: inputs and grad read once (grad twice to subtract its
// sum), dz written once; 2 + K FMA and one exponential an element.
#include "cpu/logit_fusion/models.h"

#include "cpu/target_begin.h"

#include "cpu/logit_fusion/fusion_kernel.h"
#include "cpu/logit_fusion/select_kernel.h"

// A sum over a padded tile, of(i, sum) adding a vector at i: as many partial sums, hence as small an error, on every
// target; shorter ones on the portable one, where a product is rounded before it is added.
template <class A, class F>
W2S_INLINE double tile_sum(int n, const F& of) {
  using V = Vec<A>;
  constexpr int U = 16 / V::W > 1 ? 16 / V::W : 1, BLOCK = V::W * sizeof(A) == 16 ? 64 : TILE;
  double total = 0;
  for (int at = 0; at < padded(n); at += BLOCK) {
    V part[U];
    for (V& p : part) p = V::set(0);
    const int end = padded(n) < at + BLOCK ? padded(n) : at + BLOCK;
    for (int i = at; i < end; i += U * V::W)
      for (int u = 0; u < U; ++u) part[u] = of(i + u * V::W, part[u]);
    for (const V& p : part) total += double(p.sum());
  }
  return total;
}

template <class A>
struct BackwardRun {
  const Fusion& f;
  const Upstream& up;
  Rows out;
  int64_t S;
  std::vector<Cut<A>> cut;
  std::vector<double> row_sum;  // [B, S]: sum of grad
  std::vector<double> dweight;  // [B, S, K]
  std::vector<double> dheat;    // [B, S]

  BackwardRun(const Fusion& fusion, const Upstream& u, const Rows& dz)
      : f(fusion), up(u), out(dz), S(segments(f.V)), cut(size_t(f.B)), row_sum(size_t(f.B * S)),
        dweight(size_t(f.B * S * f.K)), dheat(size_t(f.B * S)) {}

  // sum of grad over all columns, those that z masks included
  void sum_item(int64_t i) {
    const int64_t row = i / S, begin = i % S * SEGMENT, end = std::min(f.V, begin + SEGMENT);
    A g[TILE];
    double total = 0;
    for (int64_t c = begin; c < end; c += TILE) {
      const int n = int(std::min<int64_t>(TILE, end - c));
      widen<A>(up.grad.at(row, c), up.grad.dtype, n, A(0), g);
      total += tile_sum<A>(n, [&](int v, Vec<A> sum) { return sum + Vec<A>::load(g + v); });
    }
    row_sum[size_t(i)] = total;
  }

  static void mask(const A* z, A* g, int n) {
    using V = Vec<A>;
    for (int i = 0; i < padded(n); i += V::W)
      V::select(V::eq(V::load(z + i), V::set(-infinity<A>)), V::set(0), V::load(g + i)).store(g + i);
  }

  void gradient(int64_t row, int64_t c, int n, const A* z, A a, A* g) const {
    using V = Vec<A>;
    if (up.has_grad) widen<A>(up.grad.at(row, c), up.grad.dtype, n, A(0), g);
    else std::fill_n(g, padded(n), A(0));
    if (up.row_a.size() || up.row_b.size() || up.subtract) {
      const V lse = V::set(A(up.lse[size_t(row)])), va = V::set(a);
      const V vb = V::set(up.row_b.empty() ? A(0) : A(up.row_b[size_t(row)])), none = V::set(-infinity<A>);
      for (int i = 0; i < padded(n); i += V::W) {
        const V zi = V::load(z + i), p = vexp(zi - lse), finite = V::select(V::eq(zi, none), V::set(0), zi);
        V::fma(p, V::fma(vb, finite, va), V::load(g + i)).store(g + i);
      }
    }
    for (int64_t j = 0; j < up.indices; ++j) {
      const int64_t at = up.index[size_t(row * up.indices + j)] - c;
      if (at >= 0 && at < n) g[at] += A(up.coef[size_t(row * up.indices + j)]);
    }
    mask(z, g, n);
  }

  void item(int64_t i) {
    using V = Vec<A>;
    const int64_t row = i / S, begin = i % S * SEGMENT, end = std::min(f.V, begin + SEGMENT);
    FusedRow<A> fused;
    const double heat = f.temperature[size_t(row)];
    fused.begin(f, row, heat, cut[size_t(row)]);
    double a = up.row_a.empty() ? 0 : up.row_a[size_t(row)];
    if (up.subtract)
      for (int64_t s = 0; s < S; ++s) a -= row_sum[size_t(row * S + s)];
    A z[TILE], g[TILE], e[TILE], low[TILE];
    for (int64_t c = begin; c < end; c += TILE) {
      const int n = int(std::min<int64_t>(TILE, end - c));
      fused.tile(c, n, z);
      gradient(row, c, n, z, A(a), g);
      const V tau = V::set(A(heat));
      if (heat != 1)
        for (int v = 0; v < padded(n); v += V::W) (V::load(g + v) / tau).store(g + v);
      narrow(g, n, out.dtype, out.at(row, c));
      if (up.need_params) parameters(i, row, c, n, z, g, e, low);
    }
  }

  void parameters(int64_t i, int64_t row, int64_t c, int n, const A* z, const A* g, A* e, A* low) {
    using V = Vec<A>;
    const V none = V::set(-infinity<A>);
    dheat[size_t(i)] -= tile_sum<A>(n, [&](int v, V sum) {
      const V zi = V::load(z + v);
      return V::fma(V::load(g + v), V::select(V::eq(zi, none), V::set(0), zi), sum);
    });
    for (int k = 0; k < f.K; ++k) {
      const Rows* r = f.anti_of(k);
      const A* x = fetch(f.expert[size_t(k)], row, c, n, e);
      const A* y = r ? fetch(*r, row, c, n, low) : nullptr;
      dweight[size_t(i * f.K + k)] += tile_sum<A>(n, [&](int v, V sum) {
        const V ei = V::load(x + v), gi = V::load(g + v);
        V d = ei;
        if (y) {
          const V yi = V::load(y + v);
          d = V::select(V::eq(ei, yi), V::set(0), ei - yi);
        }
        d = V::select(V::eq(V::load(z + v), none), V::set(0), d);
        return V::fma(gi, d, sum);
      });
    }
  }

  // As in the forward pass, a row with NaN is not cut: find out by forming it once.
  void cuts(int64_t row) {
    cut[size_t(row)] = plausible_cut<A>(f, row);
    if (!cut[size_t(row)].active) return;
    FusedRow<A> fused;
    fused.begin(f, row, f.temperature[size_t(row)], cut[size_t(row)]);
    A z[TILE];
    for (int64_t c = 0; c < f.V; c += TILE)
      if (fused.tile(c, int(std::min<int64_t>(TILE, f.V - c)), z).nan) {
        cut[size_t(row)].active = false;
        return;
      }
  }

  void run(const Flat& dweights, const Flat& dtemperature) {
    parallel_items(f.plausible ? f.B : 0, grain_of(f.V), [this](int64_t r) { cuts(r); });
    if (up.subtract) parallel_items(f.B * S, segment_grain(f.V), [this](int64_t i) { sum_item(i); });
    parallel_items(f.B * S, segment_grain(f.V), [this](int64_t i) { item(i); });
    if (!up.need_params) return;
    for (int64_t r = 0; r < f.B; ++r) {
      double heat = 0;
      for (int64_t s = 0; s < S; ++s) heat += dheat[size_t(r * S + s)];
      dtemperature.put(r, heat);
      for (int k = 0; k < f.K; ++k) {
        double total = 0;
        for (int64_t s = 0; s < S; ++s) total += dweight[size_t((r * S + s) * f.K + k)];
        dweights.put(r * f.K + k, total);
      }
    }
  }
};

template <class A>
inline void backward_rows(const Fusion& f, const Upstream& up, const Rows& dz, const Flat& dweights, const Flat& dtemperature) {
  BackwardRun<A>(f, up, dz).run(dweights, dtemperature);
}

W2S_KERNELS(FuseBackwardKernels, backward_rows<Real>)

#include "cpu/target_end.h"
