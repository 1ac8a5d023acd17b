// ddim_step: y = a x + b m, m = u + w (c - u) or the one prediction there is. One pass over (row, segment of 8,192) items.
// Floor: x and one or two predictions read once, y written once; 3 FMA an element.
#include "cpu/diffusion/ddim_step.h"

#include "cpu/target_begin.h"

#include "cpu/tiles_kernel.h"

template <class A>
W2S_INLINE void step_tile(const A* x, const A* c, const A* u, int n, A a, A b, A w, A* y) {
  using V = Vec<A>;
  const V va = V::set(a), vb = V::set(b), vw = V::set(w);
  int i = 0;
  if (u) {
    for (; i + V::W <= n; i += V::W) {
      const V low = V::load(u + i), m = V::fma(vw, V::load(c + i) - low, low);
      V::fma(vb, m, va * V::load(x + i)).store(y + i);
    }
    for (; i < n; ++i) y[i] = a * x[i] + b * (u[i] + w * (c[i] - u[i]));
  } else {
    for (; i + V::W <= n; i += V::W) V::fma(vb, V::load(c + i), va * V::load(x + i)).store(y + i);
    for (; i < n; ++i) y[i] = a * x[i] + b * c[i];
  }
}

template <class A>
inline void step_as(const DdimStep& s) {
  each_tile(s.B, s.D, [&s](int64_t row, int64_t at, int n) {
    const double* level = s.levels.data() + (s.levels.size() > 2 ? 2 * row : 0);
    A bx[TILE], bc[TILE], bu[TILE], by[TILE];
    const A* x = read_tile(s.x, row, at, n, bx);
    const A* c = read_tile(s.first, row, at, n, bc);
    const A* u = s.both ? read_tile(s.second, row, at, n, bu) : nullptr;
    write_tile(s.out, row, at, n, by, [&](A* y) { step_tile(x, c, u, n, A(level[0]), A(level[1]), A(s.guidance), y); });
  });
}

W2S_KERNELS(DdimKernels, step_as<Real>)

#include "cpu/target_end.h"
