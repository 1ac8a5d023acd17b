// n <= TILE entries of rows through a ReLU's two lines, and their gradients.
#include "cpu/interval_bounds/boxes.h"

#include "cpu/target_begin.h"

#include "cpu/interval_bounds/blocks_kernel.h"

// low x <= relu(x) <= slope x + intercept; left <= 0 and top > left are the ends, apart: top is upper, not left's
template <class A>
struct Lines {
  using V = Vec<A>;
  V left, top, slope, low, intercept;
  decltype(V::gt(V::set(0), V::set(0))) apart;
  W2S_INLINE Lines(V lower, V upper) {
    const V zero = V::set(0);
    left = zero - V::max(zero, zero - lower);  // NaN stays NaN
    const V right = V::max(zero, upper), least = left + V::set(A(1e-8));
    apart = V::gt(right, least);
    top = V::max(least, right);
    slope = top / (top - left);
    low = V::select(V::gt(top, zero - left), V::set(1), zero);
    intercept = (zero - left) * slope;
  }
};

template <class A>
inline void relu_lines(const void* lower, const void* upper, Dtype dtype, int n, A* slope, A* low, A* intercept) {
  using V = Vec<A>;
  A l[TILE], u[TILE];
  widen<A>(lower, dtype, n, A(0), l);
  widen<A>(upper, dtype, n, A(0), u);
  for (int i = 0; i < padded(n); i += V::W) {
    const Lines<A> found(V::load(l + i), V::load(u + i));
    found.slope.store(slope + i);
    found.low.store(low + i);
    found.intercept.store(intercept + i);
  }
}

// the entries before the ReLU; returns the sum of max(a, 0) intercept
template <class A>
inline double relu_rows(const void* a, Dtype dtype, const A* slope, const A* low, const A* intercept, int n, void* out) {
  using V = Vec<A>;
  const V zero = V::set(0);
  A x[TILE];
  widen<A>(a, dtype, n, A(0), x);
  V sum[2] = {zero, zero};
  for (int i = 0; i < padded(n); i += V::W) {
    const V v = V::load(x + i);
    V& to = sum[i / V::W % 2];
    to = V::fma(V::max(zero, v), V::load(intercept + i), to);
    (v * V::select(V::gt(v, zero), V::load(slope + i), V::load(low + i))).store(x + i);
  }
  narrow<A>(x, n, dtype, out);
  return double((sum[0] + sum[1]).sum());
}

// gradient of the entries to da, unless it is null; of their lines, added to gs and gi, unless those are
template <class A>
inline void relu_rows_gradient(const void* a, const void* grad, A more, Dtype dtype, const A* slope, const A* low, const A* intercept, int n,
                               void* da, A* gs, A* gi) {
  using V = Vec<A>;
  const V zero = V::set(0), m = V::set(more);
  A x[TILE], g[TILE];
  widen<A>(a, dtype, n, A(0), x);
  widen<A>(grad, dtype, n, A(0), g);
  for (int i = 0; i < padded(n); i += V::W) {
    const V v = V::load(x + i), w = V::load(g + i);
    if (gs) {
      const V up = V::max(zero, v);
      V::fma(up, w, V::load(gs + i)).store(gs + i);
      V::fma(up, m, V::load(gi + i)).store(gi + i);
    }
    V::select(V::gt(v, zero), V::fma(w, V::load(slope + i), m * V::load(intercept + i)), w * V::load(low + i)).store(g + i);
  }
  if (da) narrow<A>(g, n, dtype, da);
}

// gradients of the box from those of its lines
template <class A>
inline void relu_box_gradient(const void* lower, const void* upper, Dtype dtype, const A* gs, const A* gi, int n, void* dl, void* du) {
  using V = Vec<A>;
  const V zero = V::set(0);
  A l[TILE], u[TILE];
  widen<A>(lower, dtype, n, A(0), l);
  widen<A>(upper, dtype, n, A(0), u);
  for (int i = 0; i < padded(n); i += V::W) {
    const V x = V::load(l + i), y = V::load(u + i), s = V::load(gs + i), t = V::load(gi + i);
    const Lines<A> found(x, y);
    const V width = found.top - found.left;
    const V to_top = (t * found.left - s) * found.left / (width * width);
    const V to_left = (s - t * found.left) * found.slope / width - t * found.slope;
    V::select(V::gt(x, zero), zero, V::select(found.apart, to_left, to_left + to_top)).store(l + i);
    V::select(found.apart, V::select(V::gt(zero, y), zero, to_top), zero).store(u + i);
  }
  narrow<A>(l, n, dtype, dl);
  narrow<A>(u, n, dtype, du);
}

using interval::ReluRowsKernels;
W2S_KERNELS(ReluRowsKernels, relu_lines<Real>, relu_rows<Real>, relu_rows_gradient<Real>, relu_box_gradient<Real>)

#include "cpu/target_end.h"
