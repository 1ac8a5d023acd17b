// interval_linear_iw and its gradient: three products (lower, middle, upper) from one read of the three weights.
//
// 6 to 16 operations an element of [B, N, K] and three sums; the peers' form makes four clamped copies of the weights and
// six products. Inputs are copied to padded rows once (3 (B + N) K). Gradients: a vector of columns is an item, whose
// weights' gradients stay in registers over the batch. All sums have a fixed order.
// Sound rounding only changes how inputs are copied and outputs are stored: see Spread in boxes.h.
//
// From MANY rows on, fast rounding of nonneg and midrad is bound by arithmetic, and their sums are products of halves of the
// weights: 15 and 12 dense products with the gradient, at the rate of gemm.h, instead of 9 an element at a time (measured on
// a Xeon with AMX, two threads, B 128, 1000 x 1000: 49 ms an element at a time, the peers' form 35).
#include <atomic>

#include "cpu/interval_bounds/host.h"

namespace w2s::interval {
namespace {

constexpr int64_t MANY = 32;
enum Mode { nonneg, general, midrad };

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
struct Products {  // of a batch with the rows of the weights, a block of them at a time
  CallMemory memory;
  RowMatrix<A> x[3], w[3];
  int64_t mode, batch, n, k;
  int64_t block = std::min(n, block_rows(k));
  A* part[4];  // of a block's weights: positive and negative of lower and upper; centre, |centre|, radius and |centre| + radius
  A* input[4] = {};  // midrad: the same of the batch, |centre| + radius last

  Products(const Tensor* inputs, const Tensor* weights, int64_t mode)
      : memory{inputs[0], {}}, mode(mode), batch(inputs[0].size(0)), n(weights[0].size(0)), k(inputs[0].size(1)) {
    for (int i = 0; i < 3; ++i) x[i] = widened<A>(inputs[i], memory), w[i] = widened<A>(weights[i], memory);
    for (A*& p : part) p = memory.get<A>(block * k);
    if (mode != midrad) return;
    for (A*& p : input) p = memory.get<A>(batch * k);
    split(x, 0, batch, input);
  }
  Operand batch_of(int i) const { return operand(x[i].data, batch, k, x[i].stride); }
  Operand midrad_of(int i) const { return operand(input[i], batch, k, k); }
  Operand part_of(int i, int64_t rows) const { return operand(part[i], rows, k, k); }
  Operand middle(int64_t first, int64_t rows) const { return operand(w[1].data + first * w[1].stride, rows, k, w[1].stride); }

  void split(const RowMatrix<A>* ends, int64_t first, int64_t rows, A* const* to) const {
    parallel_items(rows, grain_of(k), [&](int64_t i) {
      A* row[4];
      for (int q = 0; q < 4; ++q) row[q] = to[q] + i * k;
      kernels<WeightKernels, A>().split(mode, ends[0].data + (first + i) * ends[0].stride, ends[2].data + (first + i) * ends[2].stride, k, row);
    });
  }
  // with(first row, rows) for every block of the weights, whose parts are then made
  template <class F>
  void blocks(const F& with) {
    for (int64_t first = 0; first < n; first += block) {
      const int64_t rows = std::min(block, n - first);
      split(w, first, rows, part);
      with(first, rows);
    }
  }
  A* result(Tensor& t) { return dtype_of(t.scalar_type()) == own_dtype<A> ? static_cast<A*>(t.data_ptr()) : memory.get<A>(t.size(0) * t.size(1)); }
  void finish(const A* from, Tensor& t) {
    if (from != t.data_ptr()) narrow_rows<A>(from, t);
  }

  void forward(Tensor* out) {
    A* y[3];
    for (int i = 0; i < 3; ++i) y[i] = result(out[i]);
    blocks([&](int64_t first, int64_t rows) {
      const auto put = [&](int i) { return Target<A>{y[i] + first, n, 1}; };
      gemm(batch_of(1), middle(first, rows).t(), put(1), A(1), false);
      if (mode == nonneg) {
        gemm(batch_of(0), part_of(0, rows).t(), put(0), A(1), false);
        gemm(batch_of(2), part_of(1, rows).t(), put(0), A(1), true);
        gemm(batch_of(2), part_of(2, rows).t(), put(2), A(1), false);
        gemm(batch_of(0), part_of(3, rows).t(), put(2), A(1), true);
      } else {
        gemm(midrad_of(0), part_of(0, rows).t(), put(0), A(1), false);
        gemm(midrad_of(1), part_of(2, rows).t(), put(2), A(1), false);
        gemm(midrad_of(2), part_of(3, rows).t(), put(2), A(1), true);
      }
    });
    if (mode == midrad) parallel_items(batch, grain_of(n), [&](int64_t p) { kernels<WeightKernels, A>().ends(y[0] + p * n, y[2] + p * n, n); });
    for (int i = 0; i < 3; ++i) finish(y[i], out[i]);
  }

  void backward(const Tensor* grads, Tensor* dx, Tensor* dw) {
    A *to_x[3], *to_w[3], *g[3];
    for (int i = 0; i < 3; ++i) to_x[i] = result(dx[i]), to_w[i] = result(dw[i]);
    RowMatrix<A> up[3];
    for (int i = 0; i < 3; ++i) up[i] = widened<A>(grads[i], memory), g[i] = const_cast<A*>(up[i].data);
    int64_t ld[3] = {up[0].stride, up[1].stride, up[2].stride};
    if (mode == midrad) {  // of centre and of radius instead
      A *sum = memory.get<A>(batch * n), *difference = memory.get<A>(batch * n);
      parallel_items(batch, grain_of(n), [&](int64_t p) {
        kernels<WeightKernels, A>().sum_and_difference(g[0] + p * ld[0], g[2] + p * ld[2], n, sum + p * n, difference + p * n);
      });
      g[0] = sum, g[2] = difference, ld[0] = ld[2] = n;
    }
    A *turned = memory.get<A>(block * k), *signed_x = mode == midrad ? memory.get<A>(batch * k) : nullptr;
    blocks([&](int64_t first, int64_t rows) {
      const auto grad = [&](int i) { return operand(g[i] + first, batch, rows, ld[i]); };
      const bool add = first > 0;
      const auto x_target = [&](A* p) { return Target<A>{p, k, 1}; };
      const auto w_target = [&](int i) { return Target<A>{to_w[i] + first * k, k, 1}; };
      const Target<A> other{turned, k, 1};
      gemm(grad(1), middle(first, rows), x_target(to_x[1]), A(1), add);
      gemm(grad(1).t(), batch_of(1), w_target(1), A(1), false);
      if (mode == nonneg) {
        gemm(grad(0), part_of(0, rows), x_target(to_x[0]), A(1), add);
        gemm(grad(2), part_of(3, rows), x_target(to_x[0]), A(1), true);
        gemm(grad(0), part_of(1, rows), x_target(to_x[2]), A(1), add);
        gemm(grad(2), part_of(2, rows), x_target(to_x[2]), A(1), true);
        for (const int i : {0, 2}) {
          gemm(grad(i).t(), batch_of(i), w_target(i), A(1), false);
          gemm(grad(i).t(), batch_of(2 - i), other, A(1), false);
          parallel_items(rows, grain_of(k), [&](int64_t j) {
            kernels<WeightKernels, A>().choose(w[i].data + (first + j) * w[i].stride, turned + j * k, k, to_w[i] + (first + j) * k);
          });
        }
      } else {
        gemm(grad(0), part_of(0, rows), x_target(to_x[0]), A(1), add);
        gemm(grad(2), part_of(2, rows), x_target(signed_x), A(1), add);
        gemm(grad(2), part_of(3, rows), x_target(to_x[2]), A(1), add);
        gemm(grad(0).t(), midrad_of(0), w_target(0), A(1), false);
        gemm(grad(2).t(), midrad_of(2), other, A(1), false);
        gemm(grad(2).t(), midrad_of(3), w_target(2), A(1), false);
        parallel_items(rows, grain_of(k), [&](int64_t j) {
          kernels<WeightKernels, A>().from_centre(part[0] + j * k, turned + j * k, k, to_w[0] + (first + j) * k, to_w[2] + (first + j) * k);
        });
      }
    });
    if (mode == midrad)
      parallel_items(batch, grain_of(k), [&](int64_t p) {
        kernels<WeightKernels, A>().from_centre(input[0] + p * k, signed_x + p * k, k, to_x[0] + p * k, to_x[2] + p * k);
      });
    for (int i = 0; i < 3; ++i) finish(to_x[i], dx[i]), finish(to_w[i], dw[i]);
  }
};

// nonneg: an end of the batch that is not finite times the 0 of the weight's other half would be NaN.
template <class A>
bool finite(const RowMatrix<A>& m) {
  std::atomic<bool> all{true};
  parallel_items(m.rows, grain_of(m.columns), [&](int64_t i) {
    if (!kernels<WeightKernels, A>().finite(m.data + i * m.stride, m.columns)) all = false;
  });
  return all;
}

template <class A>
bool by_products(const Products<A>& p) { return p.mode == midrad || (finite(p.x[0]) && finite(p.x[2])); }
inline bool worth_products(int64_t batch, int64_t mode, bool sound) { return batch >= MANY && mode != general && !sound; }

template <class A>
void forward(const Tensor* x, const Tensor* w, int64_t mode, bool sound, Tensor* out) {
  if (worth_products(x[0].size(0), mode, sound)) {
    Products<A> products(x, w, mode);
    if (by_products(products)) return products.forward(out);
  }
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
  if (worth_products(x[0].size(0), mode, false)) {
    Products<A> products(x, w, mode);
    if (by_products(products)) return products.backward(g, dx, dw);
  }
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
