// dispersion: of a row's d = z - max with S = sum e^d, Q = sum e^{2 d}, X = sum d e^d
//   (Q / S^2 - 1 / C) / (1 - 1 / C)  and  1 - (log S - X / S) / log C,
// and their gradient  p (k (e^d - Q / S) / S + l (d - X / S)),  p = e^d / S, k = 2 g0 / (1 - 1 / C), l = g1 / log C.
// Floor: the logits read once; the gradient reads them again and writes one.
#include "cpu/mixture/dispersion.h"

#include "cpu/target_begin.h"

#include "cpu/mixture/rows_kernel.h"

template <class V>
struct Sums {
  V sum, square, product;
};

template <class A, class V>
W2S_INLINE Sums<V> moments(LaneRows<A>& rows, V top) {
  Total<V> sum, square, product;
  rows.each(
      [&](V z, A*) {
        V d;
        const V e = exp_below(z, top, d);
        sum.part = sum.part + e;
        square.part = V::fma(e, e, square.part);
        product.part = V::fma(d, e, product.part);
      },
      [&] { sum.block(), square.block(), product.block(); });
  return {sum.sum, square.sum, product.sum};
}

template <class A>
inline void dispersion_as(const Dispersion& s) {
  using V = Vec<A>;
  A* out = static_cast<A*>(s.out.data);
  const A even = A(1) / A(s.C);
  A log_classes[V::W];  // by the logarithm that rows take: uniform ones give 0 exactly
  V::set(A(s.C)).store(log_classes);
  log_row(log_classes, V::W);
  each_group<A>(s.n, s.C, [&](LaneRows<A>& rows, LaneRows<A>&, int64_t first, int count) {
    const V top = rows.read(s.logits, first, count);
    const Sums<V> of = moments(rows, top);
    A log_sum[V::W], pair[2][V::W];
    of.sum.store(log_sum);
    log_row(log_sum, V::W);
    ((of.square / (of.sum * of.sum) - V::set(even)) / V::set(1 - even)).store(pair[0]);
    (V::set(1) - (V::load(log_sum) - of.product / of.sum) / V::load(log_classes)).store(pair[1]);
    A* to = out + 2 * first;
    if (count == V::W)
      for (int i = 0; i < V::W; ++i) to[2 * i] = pair[0][i], to[2 * i + 1] = pair[1][i];
    else
      for (int i = 0; i < count; ++i) to[2 * i] = pair[0][i], to[2 * i + 1] = pair[1][i];
  });
}

template <class A>
inline void dispersion_backward_as(const Dispersion& s) {
  using V = Vec<A>;
  const A* grad = static_cast<const A*>(s.out.data);
  const A k = A(2) / (1 - A(1) / A(s.C)), l = A(1 / std::log(double(s.C)));
  each_group<A>(s.n, s.C, [&](LaneRows<A>& rows, LaneRows<A>&, int64_t first, int count) {
    A of_variance[V::W] = {}, of_entropy[V::W] = {};
    for (int i = 0; i < count; ++i) {
      of_variance[i] = k * grad[2 * (first + i)];
      of_entropy[i] = l * grad[2 * (first + i) + 1];
    }
    const V top = rows.read(s.logits, first, count), first_slope = V::load(of_variance), second_slope = V::load(of_entropy);
    const Sums<V> of = moments(rows, top);
    const V zero = V::set(0), inverse = V::set(1) / of.sum, square = of.square / of.sum, mean = of.product / of.sum;
    rows.each([&](V z, A* at) {
      V d;
      const V e = exp_below(z, top, d);
      const V slope = V::fma(first_slope * inverse, e - square, second_slope * (d - mean));
      // 0 where e is, unless the row has a NaN
      V::fma(zero, inverse, V::select(V::eq(e, zero), zero, e * inverse * slope)).store(at);
    });
    rows.write(s.dlogits, first, count);
  });
}

W2S_KERNELS(DispersionKernels, dispersion_as<Real>, dispersion_backward_as<Real>)

#include "cpu/target_end.h"
