// pseudo_huber_loss and ict_loss with their gradients. r is pred - target, or a combination of four tensors with
// coefficients k of the row: r = k0 student + k1 teacher + k2 x_student + k3 x_teacher.
//   vector:       loss_b = s / (sqrt(s + c^2) + c), s = sum r^2;    dr = grad_b r / sqrt(s + c^2)
//   elementwise:  loss_b = mean r^2 / (sqrt(r^2 + c^2) + c);        dr = grad_b / D r / sqrt(r^2 + c^2)
// Items are (row, segment of 8,192); sums of segments are added in order, in double, so that a result does not depend on
// the number of threads. Floor: every tensor read once; backward reads them again and writes one.
#include "cpu/diffusion/pseudo_huber.h"

#include "cpu/target_begin.h"

#include "cpu/tiles_kernel.h"

template <class V>
W2S_INLINE V root(V x) {
  typename V::Scalar lanes[V::W];
  x.store(lanes);
  for (int i = 0; i < V::W; ++i) lanes[i] = std::sqrt(lanes[i]);
  return V::load(lanes);
}

// residuals of a tile into r
template <class A>
W2S_INLINE void residual_tile(const PseudoHuber& h, int64_t row, int64_t at, int n, A* buffer, A* r) {
  using V = Vec<A>;
  const A* p = read_tile(h.tensors[0], row, at, n, buffer);
  const A* t = read_tile(h.tensors[1], row, at, n, buffer + TILE);
  int i = 0;
  if (h.levels.empty()) {
    for (; i + V::W <= n; i += V::W) (V::load(p + i) - V::load(t + i)).store(r + i);
    for (; i < n; ++i) r[i] = p[i] - t[i];
    return;
  }
  const A* x = read_tile(h.tensors[2], row, at, n, buffer + 2 * TILE);
  const A* y = read_tile(h.tensors[3], row, at, n, buffer + 3 * TILE);
  const double* level = h.levels.data() + 4 * row;
  const A a = A(level[0]), b = A(level[1]), c = A(level[2]), d = A(level[3]);
  const V va = V::set(a), vb = V::set(b), vc = V::set(c), vd = V::set(d);
  for (; i + V::W <= n; i += V::W) {
    // student and teacher apart first: the two are close, and each rounds as it would alone
    const V student = V::fma(vc, V::load(x + i), va * V::load(p + i));
    (student + V::fma(vd, V::load(y + i), vb * V::load(t + i))).store(r + i);
  }
  for (; i < n; ++i) r[i] = (a * p[i] + c * x[i]) + (b * t[i] + d * y[i]);
}

// sum over a tile of r^2, or of the entries' losses
template <class A>
W2S_INLINE A tile_sum(const A* r, int n, A c, bool vector) {
  using V = Vec<A>;
  V sum[2] = {V::set(0), V::set(0)};
  const V vc = V::set(c), cc = V::set(c * c);
  int i = 0, turn = 0;
  for (; i + V::W <= n; i += V::W, turn ^= 1) {
    const V x = V::load(r + i);
    if (vector) {
      sum[turn] = V::fma(x, x, sum[turn]);
    } else {
      const V square = x * x;
      sum[turn] = sum[turn] + square / (root(square + cc) + vc);
    }
  }
  A total = (sum[0] + sum[1]).sum();
  for (; i < n; ++i) {
    const A square = r[i] * r[i];
    total += vector ? square : square / (std::sqrt(square + c * c) + c);
  }
  return total;
}

template <class A>
inline void loss_as(const PseudoHuber& h) {
  const int64_t S = segments(h.D);
  std::vector<double> part(size_t(h.B * S));
  parallel_items(h.B * S, segment_grain(h.D), [&](int64_t item) {
    A buffer[4 * TILE], r[TILE];
    double sum = 0;
    segment_tiles(h.D, item % S, [&](int64_t at, int n) {
      residual_tile(h, item / S, at, n, buffer, r);
      sum += tile_sum(r, n, A(h.c), h.vector);
    });
    part[size_t(item)] = sum;
  });
  for (int64_t row = 0; row < h.B; ++row) {
    double s = 0;
    for (int64_t i = 0; i < S; ++i) s += part[size_t(row * S + i)];
    const double top = std::sqrt(s + h.c * h.c);
    h.loss.put(row, h.vector ? s / (top + h.c) : s / double(h.D));
    if (h.vector) h.inverse.put(row, 1 / top);
  }
}

template <class A>
inline void gradient_as(const PseudoHuber& h) {
  using V = Vec<A>;
  const int64_t S = segments(h.D);
  parallel_items(h.B * S, segment_grain(h.D), [&](int64_t item) {
    const int64_t row = item / S;
    const A scale = A(h.scale[size_t(row)]), cc = A(h.c * h.c);
    A buffer[4 * TILE], r[TILE], bo[TILE];
    segment_tiles(h.D, item % S, [&](int64_t at, int n) {
      residual_tile(h, row, at, n, buffer, r);
      write_tile(h.out, row, at, n, bo, [&](A* out) {
        int i = 0;
        for (; i + V::W <= n; i += V::W) {
          const V x = V::load(r + i), scaled = x * V::set(scale);
          (h.vector ? scaled : scaled / root(V::fma(x, x, V::set(cc)))).store(out + i);
        }
        for (; i < n; ++i) out[i] = h.vector ? r[i] * scale : r[i] * scale / std::sqrt(r[i] * r[i] + cc);
      });
    });
  });
}

W2S_KERNELS(PseudoHuberKernels, loss_as<Real>, gradient_as<Real>)

#include "cpu/target_end.h"
