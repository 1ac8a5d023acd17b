// interval_linear_iw and its gradient: three products (lower, middle, upper) from one read of the three weights.
//
// 6 to 16 operations an element of [B, N, K] and three sums; the peers' form makes four clamped copies of the weights and
// six products. Inputs are copied to padded rows once (3 (B + N) K). Gradients: a vector of columns is an item, whose
// weights' gradients stay in registers over the batch. All sums have a fixed order.
// Sound rounding only changes how inputs are copied and outputs are stored: see Spread in boxes.h.
#include "cpu/interval_bounds/host.h"

namespace w2s::interval {
namespace {

template <class A>
struct Three {  // [rows][ld] of lower, middle, upper; zeros past the columns
  A* data[3];
  int64_t rows, ld;

  Three(int64_t rows, int64_t columns, CallMemory& memory) : rows(rows), ld(round_up(columns, 16) + 16) {
    for (A*& p : data) p = memory.get<A>(rows * ld);
  }
  void load(const Tensor* tensors, const Spread<A>& spread) {
    const Rows from[] = {Rows(tensors[0]), Rows(tensors[1]), Rows(tensors[2])};
    const int64_t columns = tensors[0].size(1);
    parallel_items(rows, 16, [&](int64_t p) {
      for (int i = 0; i < 3; ++i) {
        A* to = data[i] + p * ld;
        kernels<ConvertKernels, A>().widen(from[i].at(p, 0), from[i].dtype, columns, to);
        std::fill(to + columns, to + ld, A(0));
      }
      if (spread.sound) kernels<WeightKernels, A>().spread_row(data[0] + p * ld, data[2] + p * ld, ld, spread);
    });
  }
  void store(int i, Tensor& t) const {
    const Rows to(t);
    const int64_t columns = t.size(1);
    parallel_items(rows, 16, [&](int64_t p) {
      kernels<ConvertKernels, A>().narrow(data[i] + p * ld, columns, to.dtype, static_cast<char*>(t.data_ptr()) + p * columns * to.bytes);
    });
  }
};

template <class A>
Three<A> loaded(const Tensor* tensors, CallMemory& memory, const Spread<A>& spread = {}) {
  Three<A> found(tensors[0].size(0), tensors[0].size(1), memory);
  found.load(tensors, spread);
  return found;
}

template <class A>
void forward(const Tensor* x, const Tensor* w, int64_t mode, bool sound, Tensor* out) {
  CallMemory memory{x[0], {}};
  const int64_t batch = x[0].size(0), n = w[0].size(0), terms = kernels<WeightKernels, A>().terms(x[0].size(1));
  const Three<A> a = loaded<A>(x, memory, sound ? Spread<A>(mode, terms, true) : Spread<A>());
  const Three<A> b = loaded<A>(w, memory, sound ? Spread<A>(mode, terms, false) : Spread<A>());
  const Three<A> sums(batch, n, memory);
  constexpr int64_t WIDE = 32;  // rows of the weights that stay in L2 while all samples pass
  parallel_items(pieces(n, WIDE), 1, [&](int64_t block) {
    const int64_t j = block * WIDE;
    for (int64_t p = 0; p < batch; p += 4) {
      const A *left[3], *right[3];
      A* to[3];
      for (int i = 0; i < 3; ++i) {
        left[i] = a.data[i] + p * a.ld;
        right[i] = b.data[i] + j * b.ld;
        to[i] = sums.data[i] + p * sums.ld + j;
      }
      kernels<WeightKernels, A>().forward(mode, left, right, a.ld, std::min<int64_t>(4, batch - p), std::min(WIDE, n - j), to, sums.ld);
    }
  });
  sums.store(1, out[1]);
  if (!sound) {
    sums.store(0, out[0]);
    sums.store(2, out[2]);
    return;
  }
  const Rows low(out[0]), high(out[2]);
  parallel_items(batch, 16, [&](int64_t p) {
    kernels<WeightKernels, A>().finish_bounds(sums.data[0] + p * sums.ld, sums.data[2] + p * sums.ld, n, low.dtype,
                                   static_cast<char*>(out[0].data_ptr()) + p * n * low.bytes,
                                   static_cast<char*>(out[2].data_ptr()) + p * n * high.bytes);
  });
}

using Tensor3 = std::tuple<Tensor, Tensor, Tensor>;
using Tensor6 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensor3 interval_linear_iw(Rowwise xl, Rowwise xm, Rowwise xu, Rowwise wl, Rowwise wm, Rowwise wu, int64_t mode, bool sound) {
  const Tensor x[] = {xl, xm, xu}, w[] = {wl, wm, wu};
  const auto made = [&] { return fresh(xl, {xl.size(0), wl.size(0)}); };
  Tensor out[] = {made(), made(), made()};
  if (xl.size(0) && wl.size(0)) {
    if (xl.scalar_type() == ScalarType::Double) forward<double>(x, w, mode, sound, out);
    else forward<float>(x, w, mode, sound, out);
  }
  return {out[0], out[1], out[2]};
}

template <class A>
void backward(const Tensor* g, const Tensor* x, const Tensor* w, int64_t mode, Tensor* dx, Tensor* dw) {
  CallMemory memory{x[0], {}};
  const int64_t batch = x[0].size(0), n = w[0].size(0), k = x[0].size(1), wide = kernels<WeightKernels, A>().vector_width();
  const Three<A> a = loaded<A>(x, memory), b = loaded<A>(w, memory), up = loaded<A>(g, memory);
  const Three<A> da(batch, k, memory), db(n, k, memory);
  A* packed = memory.get<A>(n * batch * 3);  // [n][batch][lower, middle, upper], in the order of use
  parallel_items(n, 16, [&](int64_t j) {
    for (int64_t p = 0; p < batch; ++p)
      for (int i = 0; i < 3; ++i) packed[(j * batch + p) * 3 + i] = up.data[i][p * up.ld + j];
  });
  parallel_items(pieces(k, wide), 1, [&](int64_t item) {
    const int64_t j = item * wide;
    const A *left[3], *right[3];
    A *to_x[3], *to_w[3];
    for (int i = 0; i < 3; ++i) left[i] = a.data[i] + j, right[i] = b.data[i] + j, to_x[i] = da.data[i] + j, to_w[i] = db.data[i] + j;
    kernels<WeightKernels, A>().gradient(mode, packed, batch, n, left, right, a.ld, to_x, to_w);
  });
  for (int i = 0; i < 3; ++i) {
    da.store(i, dx[i]);
    db.store(i, dw[i]);
  }
}

Tensor6 interval_linear_iw_backward(Rowwise gl, Rowwise gm, Rowwise gu, Rowwise xl, Rowwise xm, Rowwise xu, Rowwise wl, Rowwise wm, Rowwise wu,
                                    int64_t mode) {
  const Tensor g[] = {gl, gm, gu}, x[] = {xl, xm, xu}, w[] = {wl, wm, wu};
  for (const auto& [t, name] : {std::pair(gl, "grad_lower"), {gm, "grad_middle"}, {gu, "grad_upper"}})
    expect(t, name, {xl.size(0), wl.size(0)}, xl.scalar_type());
  expect(wl, "w_lower", {wl.size(0), xl.size(1)});
  expect_like(xm, "x_middle", xl), expect_like(xu, "x_upper", xl), expect_like(wm, "w_middle", wl), expect_like(wu, "w_upper", wl);
  const auto made = [&](const Tensor& t) { return fresh(t, {t.size(0), t.size(1)}); };
  Tensor dx[] = {made(xl), made(xl), made(xl)}, dw[] = {made(wl), made(wl), made(wl)};
  if (xl.size(0) == 0 || wl.size(0) == 0) {
    for (Tensor& t : dx) torch::stable::zero_(t);
    for (Tensor& t : dw) torch::stable::zero_(t);
  } else if (xl.scalar_type() == ScalarType::Double) {
    backward<double>(g, x, w, mode, dx, dw);
  } else {
    backward<float>(g, x, w, mode, dx, dw);
  }
  return {dx[0], dx[1], dx[2], dw[0], dw[1], dw[2]};
}

}  // namespace
}  // namespace w2s::interval

W2S_IMPLEMENTATIONS(m) {
  m.add<&w2s::interval::interval_linear_iw>("interval_linear_iw");
  m.add<&w2s::interval::interval_linear_iw_backward>("interval_linear_iw_backward");
}
