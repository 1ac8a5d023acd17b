// dynamic_fusion_weights: alpha with KL(P_alpha || P_L) = T, P_alpha = softmax(z_L + sum_k alpha_k (z_k - z_0)).
//
// Node sweep. At nodes alpha_j = j h, exp(alpha_j x) = t^j with t = exp(h x): two exponentials an element give
//     S_{j,r} = sum_v exp(z_L - m0) t^j x^r,    x = d - c,   c = (m1 - m0) / alpha_max,   m1 = max(z_L + alpha_max d),
// at every node, and no exponent is positive (the maximum is convex in alpha, so it lies below the chord m0 + alpha c).
// The same read forms T = E_{Q_k} d - (lse z_k - lse z_0). dynamic_solve.cpp turns the sums into alpha.
//
// Tiling: item = (row, segment of 8,192). One pass over the segment for the maxima (from memory to L2), one in tiles of
// 1,024 for the sums: exponentials to L1, then four nodes at a time with their moments in registers; tile sums are added
// by lane in float and leave the segment as doubles.
// Floor: (K + 2) V reads; 4 exponentials and 4 (J + 1) FMA (grid: 2 (J + 1)) an element.
#include "cpu/logit_fusion/dynamic.h"

#include "cpu/target_begin.h"

#include "cpu/logit_fusion/dynamic_item_kernel.h"

template <class A, int W, int MOMENTS>
struct NodeLanes {
  A lane[MAX_NODES + 3][MOMENTS][W];
};

// NG nodes from node j of a tile: p = w t^j on entry, w t^(j + NG) on exit.
template <class A, int NG, int MOMENTS>
W2S_INLINE void node_group(A* w, const A* t, const A* x, int n, int j, NodeLanes<A, Vec<A>::W, MOMENTS>& sums) {
  using V = Vec<A>;
  V s[NG][MOMENTS];
#pragma GCC unroll 8
  for (int g = 0; g < NG; ++g)
#pragma GCC unroll 4
    for (int r = 0; r < MOMENTS; ++r) s[g][r] = V::set(0);
  for (int i = 0; i < padded(n); i += V::W) {
    V p = V::load(w + i);
    const V ti = V::load(t + i), x1 = V::load(x + i), x2 = x1 * x1, x3 = x2 * x1;
#pragma GCC unroll 8
    for (int g = 0; g < NG; ++g) {
      s[g][0] = s[g][0] + p;
      s[g][1] = V::fma(p, x1, s[g][1]);
      if constexpr (MOMENTS > 2) {
        s[g][2] = V::fma(p, x2, s[g][2]);
        s[g][3] = V::fma(p, x3, s[g][3]);
      }
      p = p * ti;
    }
    p.store(w + i);
  }
#pragma GCC unroll 8
  for (int g = 0; g < NG; ++g)
#pragma GCC unroll 4
    for (int r = 0; r < MOMENTS; ++r) (V::load(sums.lane[j + g][r]) + s[g][r]).store(sums.lane[j + g][r]);
}

// Nodes at once: as many as their moments fit in registers, in groups of about equal size.
template <class A, int MOMENTS>
inline void all_nodes(A* w, const A* t, const A* x, int n, int count, NodeLanes<A, Vec<A>::W, MOMENTS>& sums) {
  constexpr bool wide = sizeof(A) == 4 && Vec<A>::W == 16;
  // measured: 6 nodes of 4 moments beat 3, 4, 5 by 2 to 4%; 7 of 2 moments beat 8 by 5% and 11, which spills, by 40%
  constexpr int MOST = MOMENTS == 2 ? (wide ? 7 : 5) : (wide ? 6 : 2);
  const int groups = (count + MOST - 1) / MOST;
  for (int g = 0, j = 0; g < groups; ++g) {
    const int size = (count - j) / (groups - g);
    switch (size) {
#define W2S_GROUP(N) \
  case N:            \
    if constexpr (N <= MOST) node_group<A, N, MOMENTS>(w, t, x, n, j, sums); \
    break;
      W2S_GROUP(1) W2S_GROUP(2) W2S_GROUP(3) W2S_GROUP(4) W2S_GROUP(5) W2S_GROUP(6)
      W2S_GROUP(7)
#undef W2S_GROUP
    }
    j += size;
  }
}

template <class A>
struct DynamicSweep {
  const Dynamic& d;
  const int64_t S;
  const int P, L;
  const bool need_terms;
  std::vector<Sums>& sums;
  std::vector<Term>&tuned, &plain;
  std::vector<char>&odd, &up;
  const std::vector<double>& u;

  explicit DynamicSweep(DynamicSweeps& s)
      : d(s.d), S(s.S), P(s.P), L(s.L), need_terms(s.need_terms), sums(s.sums), tuned(s.tuned), plain(s.plain), odd(s.odd), up(s.up),
        u(s.u) {}

  // sum exp(z - max) of each small model and sum exp(z_k - max) (d - center), for one segment
  void terms(int64_t i) {
    using V = Vec<A>;
    const int64_t row = i / S, begin = i % S * SEGMENT, end = std::min(d.V, begin + SEGMENT);
    DynamicItem<A> item(d, row);
    for (int k = 0; k < d.K; ++k) {
      const bool own = L > 1 || k == 0;
      A mk = -infinity<A>, m0 = mk;
      for (int64_t c = begin; c < end; c += TILE) {
        const int n = int(std::min<int64_t>(TILE, end - c));
        mk = std::max(mk, tile_max(item.expert(k, c, n), n));
        m0 = std::max(m0, tile_max(item.anti(k, c, n), n));
      }
      const A center = mk == -infinity<A> || m0 == -infinity<A> ? A(0) : mk - m0;
      const V rk = V::set(mk == -infinity<A> ? A(0) : mk), r0 = V::set(m0 == -infinity<A> ? A(0) : m0), cc = V::set(center);
      double sk = 0, qk = 0, s0 = 0;
      bool rises = false;
      for (int64_t c = begin; c < end; c += TILE) {
        const int n = int(std::min<int64_t>(TILE, end - c));
        const A *e = item.expert(k, c, n), *a = item.anti(k, c, n);
        std::fill_n(item.base_buffer, TILE, A(0));  // every column counts here, whatever the base masks
        rises |= item.difference(item.base_buffer, e, a, n, nullptr, item.shift).up;
        V vk = V::set(0), vq = vk, v0 = vk;
        for (int v = 0; v < padded(n); v += V::W) {
          const V p = vexp(V::load(e + v) - rk);
          vk = vk + p;
          vq = V::fma(p, V::load(item.shift + v) - cc, vq);
          if (own) v0 = v0 + vexp(V::load(a + v) - r0);
        }
        sk += vk.sum();
        qk += vq.sum();
        s0 += v0.sum();
      }
      tuned[size_t(i * d.K + k)] = {mk, sk, qk, center};
      up[size_t(i * d.K + k)] = rises;
      if (own) plain[size_t(i * L + (L > 1 ? k : 0))] = {m0, s0, 0, 0};
    }
  }

  // The usual case in two passes over the segment, T's sums included: one problem of one expert, no infinite shift.
  // Returns false where there is one.
  template <int MOMENTS>
  bool sweep_one(int64_t i) {
    using V = Vec<A>;
    const int64_t row = i / S, begin = i % S * SEGMENT, end = std::min(d.V, begin + SEGMENT);
    DynamicItem<A> item(d, row);
    const V none = V::set(-infinity<A>), largest = V::set(std::numeric_limits<A>::max()), reach = V::set(A(d.alpha_max));
    V top0 = none, top1 = none, top_k = none, top_l = none;
    auto bad = V::Mask::none();
    for (int64_t c = begin; c < end; c += TILE) {
      const int n = int(std::min<int64_t>(TILE, end - c));
      if (n != padded(n)) return false;
      const A *zl = item.base(c, n), *e = item.expert(0, c, n), *a = item.anti(0, c, n);
      for (int v = 0; v < n; v += V::W) {
        const V z = V::load(zl + v), k = V::load(e + v), l = V::load(a + v), x = k - l;
        bad = bad | V::nle(x.abs(), largest);
        top0 = V::max(z, top0);
        top1 = V::max(V::fma(reach, x, z), top1);
        top_k = V::max(k, top_k);
        top_l = V::max(l, top_l);
      }
    }
    const A m0 = top0.top(), line = (top1.top() - m0) / A(d.alpha_max), mk = top_k.top(), ml = top_l.top();
    if (bad.any() || m0 == -infinity<A>) return false;
    NodeLanes<A, V::W, MOMENTS> lanes;
    std::memset(&lanes, 0, sizeof(lanes));
    Sums& s = sums[size_t(i)];
    Term &q = tuned[size_t(i)], &p = plain[size_t(i)];
    q = {double(mk), 0, 0, double(mk - ml)};
    p = {double(ml), 0, 0, 0};
    A lost = -infinity<A>;
    for (int64_t c = begin; c < end; c += TILE) {
      const int n = int(std::min<int64_t>(TILE, end - c));
      const A *zl = item.base(c, n), *e = item.expert(0, c, n), *a = item.anti(0, c, n);
      tile_terms(zl, e, a, n, m0, line, mk, ml, item, q, p, lost);
      all_nodes<A, MOMENTS>(item.w, item.t, item.x, n, d.nodes + 1, lanes);
    }
    close<MOMENTS>(lanes, m0, line, lost, s);
    return true;
  }

  // Four exponentials an element: w, t and x of a tile, and the sums of the small models.
  W2S_INLINE void tile_terms(const A* zl, const A* e, const A* a, int n, A m0, A line, A mk, A ml, DynamicItem<A>& item,
                             Term& q, Term& p, A& lost) const {
    using V = Vec<A>;
    const V r0 = V::set(m0), rc = V::set(line), rk = V::set(mk), rl = V::set(ml), h = V::set(A(d.step()));
    const V most = V::set(A(sizeof(A) == 8 ? 600 : 80)), small = V::set(A(sizeof(A) == 8 ? -600 : -75));
    auto any = V::Mask::none();
    V sk = V::set(0), qk = sk, sl = sk;
    for (int v = 0; v < n; v += V::W) {
      const V k = V::load(e + v), l = V::load(a + v), z = V::load(zl + v) - r0, yk = k - rk, yl = l - rl;
      const V x = (k - l) - rc;
      any = any | V::gt(small, z);
      vexp(z).store(item.w + v);
      vexp(V::min(most, h * x)).store(item.t + v);
      x.store(item.x + v);
      if (need_terms) {
        const V ek = vexp(yk);
        sk = sk + ek;
        qk = V::fma(ek, yk - yl, qk);
        sl = sl + vexp(yl);
      }
    }
    if (any.any())
      for (int v = 0; v < n; ++v)
        if (zl[v] - m0 < (sizeof(A) == 8 ? -600 : -75)) lost = std::max(lost, zl[v] + A(d.alpha_max) * (item.x[v] + line));
    q.sum += double(sk.sum());
    q.weighted += double(qk.sum());
    p.sum += double(sl.sum());
  }

  template <int MOMENTS>
  void close(const NodeLanes<A, Vec<A>::W, MOMENTS>& lanes, A m0, A line, A lost, Sums& s) const {
    s.m0 = double(m0);
    s.c = double(line);
    s.lost = lost == -infinity<A> ? NONE : double(lost);
    for (int j = 0; j <= d.nodes; ++j)
      for (int r = 0; r < MOMENTS; ++r) {
        double total = 0;
        for (int v = 0; v < Vec<A>::W; ++v) total += double(lanes.lane[j][r][v]);
        s.moment[r][j] = total;
      }
  }

  template <int MOMENTS>
  void sweep(int64_t i) {
    using V = Vec<A>;
    const int64_t row = i / S, begin = i % S * SEGMENT, end = std::min(d.V, begin + SEGMENT);
    DynamicItem<A> item(d, row);
    const double* ur = u.data() + row * d.K;
    const V reach = V::set(A(d.alpha_max));
    for (int p = 0; p < P; ++p) {
      const int k = d.multi == 1 ? p : -1;
      V top0 = V::set(-infinity<A>), top1 = top0;
      for (int64_t c = begin; c < end; c += TILE) {
        const int n = int(std::min<int64_t>(TILE, end - c));
        const A* zl = item.base(c, n);
        odd[size_t(i)] |= item.shifts(zl, c, n, k, ur, nullptr, item.shift).one_sided;
        for (int v = 0; v < padded(n); v += V::W) {
          const V z = V::load(zl + v);
          top0 = V::max(z, top0);
          top1 = V::max(V::fma(reach, V::load(item.shift + v), z), top1);
        }
      }
      Sums& s = sums[size_t(i * P + p)];
      const A m0 = top0.top(), m1 = top1.top();
      if (m0 == -infinity<A>) {  // nothing but masked columns, or NaN
        for (int64_t c = begin; c < end; c += TILE) {
          const int n = int(std::min<int64_t>(TILE, end - c));
          s.moment[0][0] += tile_exp_sum(item.base(c, n), n, A(0));
        }
        continue;
      }
      const A line = (m1 - m0) / A(d.alpha_max);
      NodeLanes<A, V::W, MOMENTS> lanes;
      std::fill_n(&lanes.lane[0][0][0], sizeof(lanes) / sizeof(A), A(0));
      A lost = -infinity<A>;
      for (int64_t c = begin; c < end; c += TILE) {
        const int n = int(std::min<int64_t>(TILE, end - c));
        const A* zl = item.base(c, n);
        item.shifts(zl, c, n, k, ur, nullptr, item.x);
        weights(zl, item, n, m0, line, lost);
        all_nodes<A, MOMENTS>(item.w, item.t, item.x, n, d.nodes + 1, lanes);
      }
      close<MOMENTS>(lanes, m0, line, lost, s);
    }
  }

  // w = exp(z_L - m0), t = exp(h x), x = shift - c of a tile
  W2S_INLINE void weights(const A* zl, DynamicItem<A>& item, int n, A m0, A line, A& lost) const {
    using V = Vec<A>;
    const V r = V::set(m0), c = V::set(line), h = V::set(A(d.step())), most = V::set(A(sizeof(A) == 8 ? 600 : 80));
    const V small = V::set(A(sizeof(A) == 8 ? -600 : -75)), none = V::set(-infinity<A>);
    auto any = V::Mask::none();
    for (int v = 0; v < padded(n); v += V::W) {
      const V z = V::load(zl + v) - r, x = V::load(item.x + v) - c;
      any = any | (V::gt(small, z) & V::gt(z, none));
      vexp(z).store(item.w + v);
      vexp(V::min(most, h * x)).store(item.t + v);
      x.store(item.x + v);
    }
    if (any.any())
      for (int v = 0; v < n; ++v)
        if (zl[v] - m0 < (sizeof(A) == 8 ? -600 : -75)) lost = std::max(lost, zl[v] + A(d.alpha_max) * (item.x[v] + line));
  }

  void item(int64_t i, bool with_terms) {
    const bool plain_case = d.K == 1 && with_terms == need_terms && u[size_t(i / S)] == 1;
    if (plain_case && (d.first >= 0 ? sweep_one<2>(i) : sweep_one<4>(i))) return;
    if (with_terms) terms(i);
    if (d.first >= 0) sweep<2>(i);
    else sweep<4>(i);
  }
};

// By a pass over the row; p: the problem.
template <class A>
inline KlAt evaluate(const DynamicSweeps& s, int64_t row, int p, double t, double center, double base_lse, const double (*far)[2]) {
  const Dynamic& d = s.d;
  using V = Vec<A>;
  DynamicItem<A> item(d, row);
  double top = NONE, s0 = 0, s1 = 0, s2 = 0;
  const V ct = V::set(A(center)), vt = V::set(A(t));
  for (int64_t c = 0; c < d.V; c += TILE) {
    const int n = int(std::min<int64_t>(TILE, d.V - c));
    const A* zl = item.base(c, n);
    item.shifts(zl, c, n, d.multi == 1 ? p : -1, s.u.data() + row * d.K, far, item.x);
    V m = V::set(-infinity<A>);
    for (int v = 0; v < padded(n); v += V::W) {
      const V x = V::load(item.x + v) - ct, y = V::fma(vt, x, V::load(zl + v));
      x.store(item.x + v);
      y.store(item.t + v);
      m = V::max(y, m);
    }
    const A mt = m.top();
    if (mt == -infinity<A>) continue;
    V a = V::set(0), b = a, q = a;
    for (int v = 0; v < padded(n); v += V::W) {
      const V e = vexp(V::load(item.t + v) - V::set(mt)), x = V::load(item.x + v), ex = e * x;
      a = a + e;
      b = b + ex;
      q = V::fma(ex, x, q);
    }
    const double up_to = std::max(top, double(mt)), old = top == NONE ? 0 : std::exp(top - up_to), f = std::exp(mt - up_to);
    s0 = s0 * old + f * a.sum();
    s1 = s1 * old + f * b.sum();
    s2 = s2 * old + f * q.sum();
    top = up_to;
  }
  const double mean = s1 / s0;
  return {std::max(0.0, t * mean - (std::log(s0) + top - base_lse)), std::max(0.0, s2 / s0 - mean * mean)};
}

template <class A>
inline void sweep_item(DynamicSweeps& s, int64_t i, bool with_terms) {
  DynamicSweep<A>(s).item(i, with_terms);
}

template <class A>
inline void sweep_terms(DynamicSweeps& s, int64_t i) {
  DynamicSweep<A>(s).terms(i);
}

W2S_KERNELS(DynamicKernels, sweep_item<Real>, sweep_terms<Real>, evaluate<Real>)

#include "cpu/target_end.h"
