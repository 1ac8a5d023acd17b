// sums over bounds before a ReLU, and their gradient.
#include "cpu/interval_bounds/boxes.h"

#include "cpu/target_begin.h"

// sums += of n <= TILE entries: w, c, c^2, [a], c [a], c^2 [a], [d], c [d], c^2 [d]; float64 lanes
inline void moments(const void* lower, const void* upper, Dtype dtype, int n, double* sums) {
  using V = Vec<double>;
  double low[TILE], high[TILE];
  widen<double>(lower, dtype, n, 0.0, low);
  widen<double>(upper, dtype, n, 0.0, high);  // the padding is 0: neither active nor dead, and adds nothing
  const V half = V::set(0.5), zero = V::set(0), one = V::set(1);
  V s[9];
  for (V& x : s) x = zero;
  for (int i = 0; i < padded(n); i += V::W) {
    const V l = V::load(low + i), u = V::load(high + i), c = (l + u) * half, c2 = c * c;
    const auto active = V::gt(l, zero), dead = V::gt(zero, u);
    s[0] = s[0] + (u - l);
    s[1] = s[1] + c;
    s[2] = s[2] + c2;
    s[3] = s[3] + V::select(active, one, zero);
    s[4] = s[4] + V::select(active, c, zero);
    s[5] = s[5] + V::select(active, c2, zero);
    s[6] = s[6] + V::select(dead, one, zero);
    s[7] = s[7] + V::select(dead, c, zero);
    s[8] = s[8] + V::select(dead, c2, zero);
  }
  for (int k = 0; k < 9; ++k) sums[k] += s[k].sum();
}

inline void moments_gradient(const double* g, const void* lower, const void* upper, Dtype dtype, int n, void* dl, void* du) {
  using V = Vec<double>;
  double low[TILE], high[TILE];
  widen<double>(lower, dtype, n, 0.0, low);
  widen<double>(upper, dtype, n, 0.0, high);
  const V half = V::set(0.5), zero = V::set(0), width = V::set(g[0]);
  for (int i = 0; i < padded(n); i += V::W) {
    const V l = V::load(low + i), u = V::load(high + i), c = (l + u) * half;
    const auto active = V::gt(l, zero), dead = V::gt(zero, u);
    const V first = V::set(g[1]) + V::select(active, V::set(g[4]), zero) + V::select(dead, V::set(g[7]), zero);
    const V second = V::set(g[2]) + V::select(active, V::set(g[5]), zero) + V::select(dead, V::set(g[8]), zero);
    const V shared = V::fma(c, second, half * first);
    (shared - width).store(low + i);
    (shared + width).store(high + i);
  }
  narrow<double>(low, n, dtype, dl);
  narrow<double>(high, n, dtype, du);
}

using interval::MomentKernels;
W2S_KERNELS(MomentKernels, moments, moments_gradient)

#include "cpu/target_end.h"
