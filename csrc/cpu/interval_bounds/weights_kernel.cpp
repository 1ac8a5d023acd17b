// products of interval inputs and interval weights. mode 0: nonneg, 1: general,
// 2: midrad; see weights.cpp.
#include "cpu/interval_bounds/boxes.h"

#include "cpu/target_begin.h"

#include "cpu/interval_bounds/blocks_kernel.h"

// longest chain of roundings of an output over k terms: the products of a lane, its sum over the lanes, and the product's own
template <class A>
inline int64_t weight_terms(int64_t k) { return k / Vec<A>::W + Vec<A>::W + 40; }

// l and u of n numbers (whole vectors), moved apart
template <class A>
inline void spread_row(A* l, A* u, int64_t n, const interval::Spread<A>& spread) {
  using V = Vec<A>;
  const V zero = V::set(0), inf = V::set(infinity<A>), nan = V::set(std::numeric_limits<A>::quiet_NaN());
  const V eta = V::set(spread.eta), least = V::set(spread.least);
  for (int64_t i = 0; i < n; i += V::W) {
    const V a = V::load(l + i), b = V::load(u + i);
    const V first = spread.common ? V::max(a.abs(), b.abs()) : a.abs(), second = spread.common ? first : b.abs();
    const auto known = V::gt(inf, a.abs() + b.abs());
    const auto step = [&](V size) __attribute__((always_inline)) {
      return V::select(V::gt(size, zero), V::fma(eta, size, least), zero);
    };
    V::select(known, a - step(first), nan).store(l + i);
    V::select(known, b + step(second), nan).store(u + i);
  }
}

// Sums l and u of n outputs, rounded outward; unbounded where anything overflowed or was NaN. The buffers are padded.
template <class A>
inline void finish_bounds(A* l, A* u, int64_t n, Dtype dtype, void* low, void* high) {
  using V = Vec<A>;
  constexpr A unit = std::numeric_limits<A>::epsilon() / 2;
  const V slack = V::set(4 * unit), tiny = V::set(sizeof(A) == 8 ? A(1e-300) : A(1e-30)), inf = V::set(infinity<A>);
  const int64_t bytes = bytes_of(dtype);
  for (int64_t at = 0; at < n; at += TILE) {
    const int m = int(n - at < TILE ? n - at : TILE);
    for (int64_t i = at; i < at + m; i += V::W) {
      const V a = V::load(l + i), b = V::load(u + i);
      const auto known = V::gt(inf, a.abs() + b.abs());
      V::select(known, a - V::fma(a.abs(), slack, tiny), V::set(0) - inf).store(l + i);
      V::select(known, b + V::fma(b.abs(), slack, tiny), inf).store(u + i);
    }
    narrow_outward<A>(l + at, m, dtype, true, static_cast<char*>(low) + at * bytes);
    narrow_outward<A>(u + at, m, dtype, false, static_cast<char*>(high) + at * bytes);
  }
}

template <class A>
struct Triple {  // lower, middle, upper
  Vec<A> l, m, u;
};

template <class A>
W2S_INLINE Triple<A> load_triple(const A* const* p, int64_t at) {
  return {Vec<A>::load(p[0] + at), Vec<A>::load(p[1] + at), Vec<A>::load(p[2] + at)};
}

template <class V>
W2S_INLINE V least(V a, V b) { return V::select(V::gt(a, b), b, a); }
template <class V>
W2S_INLINE V most(V a, V b) { return V::select(V::gt(b, a), b, a); }

// s += the lower, middle and upper product of one element (midrad: centre, middle, radius)
template <class A, int mode>
W2S_INLINE void add_product(const Triple<A>& x, const Triple<A>& w, Triple<A>& s) {
  using V = Vec<A>;
  const V zero = V::set(0), half = V::set(A(0.5));
  s.m = V::fma(x.m, w.m, s.m);
  if constexpr (mode == 0) {
    s.l = V::fma(w.l, V::select(V::ge(w.l, zero), x.l, x.u), s.l);
    s.u = V::fma(w.u, V::select(V::ge(w.u, zero), x.u, x.l), s.u);
  } else if constexpr (mode == 1) {
    const V a = w.l * x.l, b = w.l * x.u, c = w.u * x.l, d = w.u * x.u;
    s.l = s.l + least(least(a, b), least(c, d));
    s.u = s.u + most(most(a, b), most(c, d));
  } else {
    const V cx = (x.l + x.u) * half, rx = (x.u - x.l) * half, cw = (w.l + w.u) * half, rw = (w.u - w.l) * half;
    s.l = V::fma(cx, cw, s.l);
    s.u = V::fma(cx.abs(), rw, V::fma(rx, cw.abs() + rw, s.u));
  }
}

// `rows` <= 4 samples against n rows of the weight; x: [rows][ld], w: [n][ld], both padded with zeros; out: [rows][ldo]
template <class A, int mode, int R>
inline void products(const A* const* x, const A* const* w, int64_t ld, int64_t n, A* const* out, int64_t ldo) {
  using V = Vec<A>;
  for (int64_t j = 0; j < n; ++j) {
    Triple<A> s[R];
    W2S_UNROLL for (int p = 0; p < R; ++p) s[p] = {V::set(0), V::set(0), V::set(0)};
    for (int64_t i = 0; i < ld; i += V::W) {
      const Triple<A> weight = load_triple<A>(w, j * ld + i);
      W2S_UNROLL for (int p = 0; p < R; ++p) add_product<A, mode>(load_triple<A>(x, p * ld + i), weight, s[p]);
    }
    for (int p = 0; p < R; ++p) {
      const A l = s[p].l.sum(), u = s[p].u.sum();
      out[0][p * ldo + j] = mode == 2 ? l - u : l;
      out[1][p * ldo + j] = s[p].m.sum();
      out[2][p * ldo + j] = mode == 2 ? l + u : u;
    }
  }
}

template <class A, int mode>
inline void weight_rows(const A* const* x, const A* const* w, int64_t ld, int64_t rows, int64_t n, A* const* out, int64_t ldo) {
  if (rows == 4) return products<A, mode, 4>(x, w, ld, n, out, ldo);
  for (int64_t p = 0; p < rows; ++p) {
    const A* one[3] = {x[0] + p * ld, x[1] + p * ld, x[2] + p * ld};
    A* to[3] = {out[0] + p * ldo, out[1] + p * ldo, out[2] + p * ldo};
    products<A, mode, 1>(one, w, ld, n, to, ldo);
  }
}

template <class A>
inline void weight_forward(int64_t mode, const A* const* x, const A* const* w, int64_t ld, int64_t rows, int64_t n, A* const* out, int64_t ldo) {
  if (mode == 0) weight_rows<A, 0>(x, w, ld, rows, n, out, ldo);
  else if (mode == 1) weight_rows<A, 1>(x, w, ld, rows, n, out, ldo);
  else weight_rows<A, 2>(x, w, ld, rows, n, out, ldo);
}

// One element's part of the gradients of x and of w; g is (lower, middle, upper)
template <class A, int mode>
W2S_INLINE void add_gradient(const Triple<A>& x, const Triple<A>& w, const Triple<A>& g, Triple<A>& dx, Triple<A>& dw) {
  using V = Vec<A>;
  const V zero = V::set(0), half = V::set(A(0.5));
  dx.m = V::fma(g.m, w.m, dx.m);
  dw.m = V::fma(g.m, x.m, dw.m);
  if constexpr (mode == 0) {
    const auto low = V::ge(w.l, zero), high = V::ge(w.u, zero);
    const V a = g.l * w.l, b = g.u * w.u;
    dx.l = dx.l + V::select(low, a, zero) + V::select(high, zero, b);
    dx.u = dx.u + V::select(low, zero, a) + V::select(high, b, zero);
    dw.l = V::fma(g.l, V::select(low, x.l, x.u), dw.l);
    dw.u = V::fma(g.u, V::select(high, x.u, x.l), dw.u);
  } else if constexpr (mode == 1) {
    const V a = w.l * x.l, b = w.l * x.u, c = w.u * x.l, d = w.u * x.u;
    const auto end = [&](bool smallest, V part) __attribute__((always_inline)) {
      // the first extreme of a, b, c, d
      const V ab = smallest ? least(a, b) : most(a, b), cd = smallest ? least(c, d) : most(c, d);
      const auto second = smallest ? V::gt(ab, cd) : V::gt(cd, ab);
      const auto b_first = smallest ? V::gt(a, b) : V::gt(b, a), d_first = smallest ? V::gt(c, d) : V::gt(d, c);
      const V one = V::set(1), up = V::select(second, V::select(d_first, one, zero), V::select(b_first, one, zero));
      const auto x_up = V::gt(up, zero);
      const V to_x = part * V::select(second, w.u, w.l), to_w = part * V::select(x_up, x.u, x.l);
      dx.l = dx.l + V::select(x_up, zero, to_x);
      dx.u = dx.u + V::select(x_up, to_x, zero);
      dw.l = dw.l + V::select(second, zero, to_w);
      dw.u = dw.u + V::select(second, to_w, zero);
    };
    end(true, g.l);
    end(false, g.u);
  } else {
    const V cx = (x.l + x.u) * half, rx = (x.u - x.l) * half, cw = (w.l + w.u) * half, rw = (w.u - w.l) * half;
    const V gc = g.l + g.u, gr = g.u - g.l;
    const auto turned = [&](V by, V value) __attribute__((always_inline)) {
      return V::select(V::gt(by, zero), value, V::select(V::gt(zero, by), zero - value, zero));
    };
    const V dcx = V::fma(gc, cw, turned(cx, gr * rw)), drx = gr * (cw.abs() + rw);
    const V dcw = V::fma(gc, cx, turned(cw, gr * rx)), drw = gr * (cx.abs() + rx);
    dx.l = V::fma(half, dcx - drx, dx.l);
    dx.u = V::fma(half, dcx + drx, dx.u);
    dw.l = V::fma(half, dcw - drw, dw.l);
    dw.u = V::fma(half, dcw + drw, dw.u);
  }
}

// One vector of columns (offset already applied): dx of all samples, dw of all rows of the weight. A sample's columns of
// x and of its gradient are gathered first: where they lie, every access would touch a page of its own.
template <class A, int mode>
inline void gradient_columns(const A* g, int64_t batch, int64_t n, const A* const* x, const A* const* w, int64_t ld,
                             A* const* dx, A* const* dw) {
  using V = Vec<A>;
  constexpr int W = V::W;
  A* panel = workspace<A, 0>(batch * 6 * W);
  for (int64_t p = 0; p < batch; ++p)
    for (int i = 0; i < 3; ++i) {
      V::load(x[i] + p * ld).store(panel + (p * 6 + i) * W);
      V::set(0).store(panel + (p * 6 + 3 + i) * W);
    }
  for (int64_t j = 0; j < n; ++j) {
    const Triple<A> weight = load_triple<A>(w, j * ld);
    Triple<A> total{V::set(0), V::set(0), V::set(0)};
    A* at = panel;
    for (int64_t p = 0; p < batch; ++p, at += 6 * W) {
      const A* part = g + (j * batch + p) * 3;
      const Triple<A> input{V::load(at), V::load(at + W), V::load(at + 2 * W)};
      Triple<A> sum{V::load(at + 3 * W), V::load(at + 4 * W), V::load(at + 5 * W)};
      add_gradient<A, mode>(input, weight, {V::set(part[0]), V::set(part[1]), V::set(part[2])}, sum, total);
      sum.l.store(at + 3 * W);
      sum.m.store(at + 4 * W);
      sum.u.store(at + 5 * W);
    }
    total.l.store(dw[0] + j * ld);
    total.m.store(dw[1] + j * ld);
    total.u.store(dw[2] + j * ld);
  }
  for (int64_t p = 0; p < batch; ++p)
    for (int i = 0; i < 3; ++i) V::load(panel + (p * 6 + 3 + i) * W).store(dx[i] + p * ld);
}

template <class A>
inline void weight_gradient(int64_t mode, const A* g, int64_t batch, int64_t n, const A* const* x, const A* const* w, int64_t ld,
                            A* const* dx, A* const* dw) {
  if (mode == 0) gradient_columns<A, 0>(g, batch, n, x, w, ld, dx, dw);
  else if (mode == 1) gradient_columns<A, 1>(g, batch, n, x, w, ld, dx, dw);
  else gradient_columns<A, 2>(g, batch, n, x, w, ld, dx, dw);
}

// What products need besides. Plain loops over a row, which the compiler makes vectors of.

// nonneg: positive and negative part of l, then of u; midrad: centre, |centre|, radius, |centre| + radius
template <class A>
inline void split_row(int64_t mode, const A* l, const A* u, int64_t n, A* const* to) {
  A *a = to[0], *b = to[1], *c = to[2], *d = to[3];
  if (mode == 0) {
    for (int64_t i = 0; i < n; ++i) {
      a[i] = l[i] >= 0 ? l[i] : A(0), b[i] = l[i] >= 0 ? A(0) : l[i];
      c[i] = u[i] >= 0 ? u[i] : A(0), d[i] = u[i] >= 0 ? A(0) : u[i];
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const A centre = (l[i] + u[i]) * A(0.5), radius = (u[i] - l[i]) * A(0.5);
      a[i] = centre, b[i] = std::abs(centre), c[i] = radius, d[i] = std::abs(centre) + radius;
    }
  }
}

// centre and radius to lower and upper, in place
template <class A>
inline void ends_of(A* a, A* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const A centre = a[i], radius = b[i];
    a[i] = centre - radius, b[i] = centre + radius;
  }
}

template <class A>
inline void choose_row(const A* by, const A* negative, int64_t n, A* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = by[i] >= 0 ? out[i] : negative[i];
}

template <class A>
inline void sum_and_difference(const A* l, const A* u, int64_t n, A* sum, A* difference) {
  for (int64_t i = 0; i < n; ++i) sum[i] = l[i] + u[i], difference[i] = u[i] - l[i];
}

// a: the centre's gradient, less what |centre| has of it (turned), b: the radius's; to those of the ends
template <class A>
inline void from_centre(const A* centre, const A* turned, int64_t n, A* a, A* b) {
  for (int64_t i = 0; i < n; ++i) {
    const A sign = centre[i] > 0 ? A(1) : centre[i] < 0 ? A(-1) : A(0), c = a[i] + sign * turned[i], r = b[i];
    a[i] = (c - r) * A(0.5), b[i] = (c + r) * A(0.5);
  }
}

template <class A>
inline bool finite_row(const A* x, int64_t n) {
  bool known = true;
  for (int64_t i = 0; i < n; ++i) known &= x[i] - x[i] == A(0);
  return known;
}

template <class A>
inline int64_t vector_width() { return Vec<A>::W; }

W2S_KERNELS(WeightKernels, weight_terms<Real>, spread_row<Real>, weight_forward<Real>, finish_bounds<Real>,
            vector_width<Real>, weight_gradient<Real>, split_row<Real>, ends_of<Real>, choose_row<Real>, sum_and_difference<Real>,
            from_centre<Real>, finite_row<Real>)

#include "cpu/target_end.h"
