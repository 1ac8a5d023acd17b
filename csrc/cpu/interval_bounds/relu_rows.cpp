// relu_rows and its gradient: rows [M, B, N] over boxes [B, N]. An item is a part of one sample's columns for all rows, so
// that its lines are found once and sums have one order. 8 bytes an entry forward, 12 backward.
#include "cpu/interval_bounds/boxes.h"
#include "cpu/tensors.h"

namespace w2s::interval {
namespace {

constexpr int64_t TILE = 1024, PART = 4 * TILE;

struct Tiles {
  int64_t rows, batch, columns, parts, bytes;
  Dtype dtype;
  explicit Tiles(const Tensor& a)
      : rows(a.size(0)), batch(a.size(1)), columns(a.size(2)), parts(pieces(columns, PART)), dtype(dtype_of(a.scalar_type())) {
    bytes = bytes_of(dtype);
  }
  // work(item, sample, first column, count) for tiles of every part of every sample
  template <class F>
  void each(const F& work) const {
    parallel_items(batch * parts, grain_of(std::min(columns, PART) * (rows + 1)), [&](int64_t item) {
      const int64_t b = item / parts, end = std::min(columns, (item % parts + 1) * PART);
      for (int64_t i = item % parts * PART; i < end; i += TILE) work(item, b, i, int(std::min(TILE, end - i)));
    });
  }
  char* at(const Tensor& t, int64_t row, int64_t column) const { return static_cast<char*>(t.data_ptr()) + (row * columns + column) * bytes; }
};

template <class A>
void forward(const Tiles& tiles, const Tensor& a, const Tensor& lower, const Tensor& upper, Tensor& out, Tensor& total) {
  const int64_t M = tiles.rows, B = tiles.batch;
  std::vector<double> sums(static_cast<size_t>(B * tiles.parts * M), 0.0);
  const auto& kernel = kernels<ReluRowsKernels, A>();
  tiles.each([&](int64_t item, int64_t b, int64_t i, int n) {
    A slope[TILE], low[TILE], intercept[TILE];
    kernel.lines(tiles.at(lower, b, i), tiles.at(upper, b, i), tiles.dtype, n, slope, low, intercept);
    for (int64_t m = 0; m < M; ++m)
      sums[size_t(item * M + m)] +=
          kernel.rows(tiles.at(a, m * B + b, i), tiles.dtype, slope, low, intercept, n, tiles.at(out, m * B + b, i));
  });
  A* to = static_cast<A*>(total.data_ptr());
  for (int64_t m = 0; m < M; ++m)
    for (int64_t b = 0; b < B; ++b) {
      double sum = 0;
      for (int64_t p = 0; p < tiles.parts; ++p) sum += sums[size_t((b * tiles.parts + p) * M + m)];
      to[m * B + b] = A(sum);
    }
}

template <class A>
void backward(const Tiles& tiles, const Tensor& grad, const Tensor& more, const Tensor& a, const Tensor& lower, const Tensor& upper,
              bool need_a, bool need_box, Tensor& da, Tensor& dl, Tensor& du) {
  const int64_t M = tiles.rows, B = tiles.batch;
  const A* extra = static_cast<const A*>(more.data_ptr());
  const auto& kernel = kernels<ReluRowsKernels, A>();
  tiles.each([&](int64_t, int64_t b, int64_t i, int n) {
    A slope[TILE], low[TILE], intercept[TILE], gs[TILE], gi[TILE];
    kernel.lines(tiles.at(lower, b, i), tiles.at(upper, b, i), tiles.dtype, n, slope, low, intercept);
    if (need_box) std::fill(gs, gs + TILE, A(0)), std::fill(gi, gi + TILE, A(0));
    for (int64_t m = 0; m < M; ++m)
      kernel.gradient(tiles.at(a, m * B + b, i), tiles.at(grad, m * B + b, i), extra[m * B + b], tiles.dtype, slope, low, intercept, n,
                      need_a ? tiles.at(da, m * B + b, i) : nullptr, need_box ? gs : nullptr, gi);
    if (need_box) kernel.box(tiles.at(lower, b, i), tiles.at(upper, b, i), tiles.dtype, gs, gi, n, tiles.at(dl, b, i), tiles.at(du, b, i));
  });
}

ScalarType accumulate(const Tensor& a) { return a.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

void check(const Tensor& a, const Tensor& lower, const Tensor& upper) {
  expect(lower, "lower", {a.size(1), a.size(2)}, a.scalar_type());
  expect_like(upper, "upper", lower);
}

std::tuple<Tensor, Tensor> relu_rows(Tensor a, Tensor lower, Tensor upper) {
  check(a, lower, upper);
  const Tiles tiles(a);
  Tensor out = empty_of(a), total = fresh(a, {tiles.rows, tiles.batch}, accumulate(a));
  if (tiles.dtype == Dtype::f64) forward<double>(tiles, a, lower, upper, out, total);
  else forward<float>(tiles, a, lower, upper, out, total);
  return {out, total};
}

std::tuple<Tensor, Tensor, Tensor> relu_rows_backward(Tensor grad, Tensor more, Tensor a, Tensor lower, Tensor upper, bool need_a, bool need_box) {
  check(a, lower, upper);
  expect_like(grad, "grad", a), expect(more, "more", {a.size(0), a.size(1)}, accumulate(a));
  const Tiles tiles(a);
  Tensor da = need_a ? empty_of(a) : fresh(a, {0}), dl = need_box ? empty_of(lower) : fresh(a, {0}), du = need_box ? empty_of(lower) : fresh(a, {0});
  if (tiles.dtype == Dtype::f64) backward<double>(tiles, grad, more, a, lower, upper, need_a, need_box, da, dl, du);
  else backward<float>(tiles, grad, more, a, lower, upper, need_a, need_box, da, dl, du);
  return {da, dl, du};
}

}  // namespace
}  // namespace w2s::interval

W2S_IMPLEMENTATIONS(m) {
  m.add<&w2s::interval::relu_rows>("relu_rows");
  m.add<&w2s::interval::relu_rows_backward>("relu_rows_backward");
}
