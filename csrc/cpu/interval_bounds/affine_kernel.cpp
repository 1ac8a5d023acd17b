// an affine map of n <= TILE entries of a box, one scale and shift an entry.
#include "cpu/interval_bounds/boxes.h"

#include "cpu/target_begin.h"

#include "cpu/interval_bounds/blocks_kernel.h"

template <class A>
inline void affine(const void* lower, const void* upper, Dtype dtype, const A* s, const A* t, int n, bool relu, bool sound, void* low, void* high) {
  using V = Vec<A>;
  constexpr A u = std::numeric_limits<A>::epsilon() / 2;
  A x[TILE], y[TILE];
  widen<A>(lower, dtype, n, A(0), x);
  widen<A>(upper, dtype, n, A(0), y);
  const V zero = V::set(0), inf = V::set(infinity<A>), slack = V::set(4 * u), tiny = V::set(sizeof(A) == 8 ? A(1e-300) : A(1e-30));
  for (int i = 0; i < padded(n); i += V::W) {
    const V scale = V::load(s + i), shift = V::load(t + i), a = V::load(x + i), b = V::load(y + i);
    const auto turned = V::gt(zero, scale);
    const V first = V::select(turned, b, a), second = V::select(turned, a, b);
    V p = V::fma(scale, first, shift), q = V::fma(scale, second, shift);
    if (sound) {
      const V m = (scale * first).abs() + shift.abs(), r = (scale * second).abs() + shift.abs();
      p = V::select(V::gt(inf, m), p - V::fma(m, slack, tiny), zero - inf);
      q = V::select(V::gt(inf, r), q + V::fma(r, slack, tiny), inf);
    }
    if (relu) {
      p = V::max(zero, p);
      q = V::max(zero, q);
    }
    p.store(x + i);
    q.store(y + i);
  }
  if (sound) {
    narrow_outward<A>(x, n, dtype, true, low);
    narrow_outward<A>(y, n, dtype, false, high);
  } else {
    narrow<A>(x, n, dtype, low);
    narrow<A>(y, n, dtype, high);
  }
}

// gradients of n entries; ds, dt get each entry's part of those of scale and shift
template <class A>
inline void affine_gradient(const void* gl, const void* gu, const void* lower, const void* upper, const void* low, const void* high,
                            Dtype dtype, const A* s, int n, bool relu, void* dl, void* du, A* ds, A* dt) {
  using V = Vec<A>;
  A x[TILE], y[TILE], g[TILE], h[TILE];
  gradient_row<A>(gl, gu, low, high, dtype, {false, relu}, n, g, h);
  widen<A>(lower, dtype, n, A(0), x);
  widen<A>(upper, dtype, n, A(0), y);
  for (int i = 0; i < padded(n); i += V::W) {
    const V scale = V::load(s + i), p = V::load(g + i), q = V::load(h + i), zero = V::set(0);
    const auto turned = V::gt(zero, scale);
    const V first = V::select(turned, q, p), second = V::select(turned, p, q);
    V::fma(first, V::load(x + i), second * V::load(y + i)).store(ds + i);
    (p + q).store(dt + i);
    (first * scale).store(x + i);
    (second * scale).store(y + i);
  }
  narrow<A>(x, n, dtype, dl);
  narrow<A>(y, n, dtype, du);
}

// dx = g + h (x - mean)
template <class A>
inline void stats_gradient(const void* in, Dtype dtype, const A* g, const A* h, const A* mean, int n, void* out) {
  using V = Vec<A>;
  A x[TILE];
  widen<A>(in, dtype, n, A(0), x);
  for (int i = 0; i < padded(n); i += V::W)
    V::fma(V::load(h + i), V::load(x + i) - V::load(mean + i), V::load(g + i)).store(x + i);
  narrow<A>(x, n, dtype, out);
}

W2S_KERNELS(AffineKernels, affine<Real>, affine_gradient<Real>, stats_gradient<Real>)

#include "cpu/target_end.h"
