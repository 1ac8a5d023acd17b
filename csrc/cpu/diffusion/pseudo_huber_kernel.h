// pseudo_huber_loss and its gradient, r = pred - target.
//   vector:       loss_b = s / (sqrt(s + c^2) + c), s = sum r^2;    dpred = grad_b r / sqrt(s + c^2)
//   elementwise:  loss_b = mean r^2 / (sqrt(r^2 + c^2) + c);        dpred = grad_b / D r / sqrt(r^2 + c^2)
// Items are (row, segment of 8,192); sums of segments are added in order, in double, so that a result does not depend on
// the number of threads. Floor: both tensors read once; backward reads them again and writes one.
#include "cpu/diffusion/tiles.h"

template <class V>
W2S_INLINE V root(V x) {
  typename V::Scalar lanes[V::W];
  x.store(lanes);
  for (int i = 0; i < V::W; ++i) lanes[i] = std::sqrt(lanes[i]);
  return V::load(lanes);
}

// sum over a tile of r^2, or of the entries' losses
template <class A>
W2S_INLINE A tile_sum(const A* p, const A* t, int n, A c, bool vector) {
  using V = Vec<A>;
  V sum[2] = {V::set(0), V::set(0)};
  const V vc = V::set(c), cc = V::set(c * c);
  int i = 0, turn = 0;
  for (; i + V::W <= n; i += V::W, turn ^= 1) {
    const V r = V::load(p + i) - V::load(t + i);
    if (vector) {
      sum[turn] = V::fma(r, r, sum[turn]);
    } else {
      const V square = r * r;
      sum[turn] = sum[turn] + square / (root(square + cc) + vc);
    }
  }
  A total = (sum[0] + sum[1]).sum();
  for (; i < n; ++i) {
    const A square = (p[i] - t[i]) * (p[i] - t[i]);
    total += vector ? square : square / (std::sqrt(square + c * c) + c);
  }
  return total;
}

template <class A>
inline void loss_as(const PseudoHuber& h) {
  const int64_t S = segments(h.D);
  std::vector<double> part(size_t(h.B * S));
  parallel_items(h.B * S, 1, [&](int64_t item) {
    A bp[TILE], bt[TILE];
    double sum = 0;
    segment_tiles(h.D, item % S, [&](int64_t at, int n) {
      const A* p = read_tile(h.pred, item / S, at, n, bp);
      sum += tile_sum(p, read_tile(h.target, item / S, at, n, bt), n, A(h.c), h.vector);
    });
    part[size_t(item)] = sum;
  });
  for (int64_t row = 0; row < h.B; ++row) {
    double s = 0;
    for (int64_t i = 0; i < S; ++i) s += part[size_t(row * S + i)];
    const double top = std::sqrt(s + h.c * h.c);
    put(h.loss, h.f64, row, h.vector ? s / (top + h.c) : s / double(h.D));
    if (h.vector) put(h.inverse, h.f64, row, 1 / top);
  }
}

template <class A>
inline void gradient_as(const PseudoHuber& h) {
  using V = Vec<A>;
  const int64_t S = segments(h.D);
  parallel_items(h.B * S, 1, [&](int64_t item) {
    const int64_t row = item / S;
    const A scale = A(h.scale[size_t(row)]), cc = A(h.c * h.c);
    A bp[TILE], bt[TILE], bo[TILE];
    segment_tiles(h.D, item % S, [&](int64_t at, int n) {
      const A* p = read_tile(h.pred, row, at, n, bp);
      const A* t = read_tile(h.target, row, at, n, bt);
      write_tile(h.out, row, at, n, bo, [&](A* out) {
        int i = 0;
        for (; i + V::W <= n; i += V::W) {
          const V r = V::load(p + i) - V::load(t + i), scaled = r * V::set(scale);
          (h.vector ? scaled : scaled / root(V::fma(r, r, V::set(cc)))).store(out + i);
        }
        for (; i < n; ++i) {
          const A r = p[i] - t[i];
          out[i] = h.vector ? r * scale : r * scale / std::sqrt(r * r + cc);
        }
      });
    });
  });
}

inline void run_loss(const PseudoHuber& h) { h.f64 ? loss_as<double>(h) : loss_as<float>(h); }
inline void run_gradient(const PseudoHuber& h) { h.f64 ? gradient_as<double>(h) : gradient_as<float>(h); }
