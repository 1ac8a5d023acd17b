// margin_logits, margin_cross_entropy and their gradient: the last layer's worst-case margins without [B, C, d].
//
// Floor: 4 B C d FLOPs forward, 10 B C d backward; W and its gradient stay in cache. Deterministic: a sample's margins
// are one item, and gradients are summed over samples in order, a block of columns an item.
#include "cpu/interval_bounds/host.h"

namespace w2s::interval {
namespace {

template <class A>
void margins(const Tensor& a, const Tensor& b, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& y, bool bounds,
             bool sound, double spread, Tensor& z, Tensor* loss, Tensor* worst) {
  const int64_t batch = a.size(0), classes = weight.size(0), d = weight.size(1);
  CallMemory memory{a, {}};
  const int64_t terms = kernels<LinearKernels, A>().chain(d) + d / 512 + 2;  // + 2: the rounding of D
  const Box<A> box = centered<A>(a, b, bounds, sound, terms, memory);
  const RowMatrix<A> w = widened<A>(weight, memory);
  const A* shift = widened_bias<A>(bias, classes, memory);
  A *out = static_cast<A*>(z.data_ptr()), *radius = memory.get<A>(batch * classes);
  A* size = sound && spread > 0 ? memory.get<A>(batch * classes) : nullptr;
  const int64_t* label = places(y, classes, "y");
  parallel_items(pieces(batch, 2), grain_of(classes * d / 2), [&](int64_t item) {
    const int64_t i = 2 * item;
    const int rows = int(std::min<int64_t>(2, batch - i));
    kernels<MarginKernels, A>().rows(box.c + i * box.ld, box.r + i * box.ld, box.ld, rows, label + i, w.data, w.stride, classes, d, shift, sound,
                                 terms, spread, out + i * classes, radius + i * classes, size ? size + i * classes : nullptr);
    for (int64_t p = i; loss && p < i + rows; ++p)
      kernels<MarginKernels, A>().loss(out + p * classes, classes, label[p], static_cast<A*>(loss->data_ptr()) + p,
                                   static_cast<A*>(worst->data_ptr()) + p);
  });
}

ScalarType accumulate(const Tensor& a) { return a.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

Tensor margin_logits(Rowwise a, Rowwise b, Rowwise weight, std::optional<Tensor> bias, Tensor y, bool bounds, bool sound,
                     double spread) {
  Tensor z = fresh(a, {a.size(0), weight.size(0)}, accumulate(a));
  if (accumulate(a) == ScalarType::Double) margins<double>(a, b, weight, bias, y, bounds, sound, spread, z, nullptr, nullptr);
  else margins<float>(a, b, weight, bias, y, bounds, sound, spread, z, nullptr, nullptr);
  return z;
}

std::tuple<Tensor, Tensor, Tensor> margin_cross_entropy(Rowwise a, Rowwise b, Rowwise weight, std::optional<Tensor> bias, Tensor y, bool bounds,
                                                        bool sound, double spread) {
  Tensor z = fresh(a, {a.size(0), weight.size(0)}, accumulate(a));
  Tensor loss = fresh(a, {a.size(0)}, accumulate(a)), worst = fresh(a, {a.size(0)}, accumulate(a));
  if (accumulate(a) == ScalarType::Double) margins<double>(a, b, weight, bias, y, bounds, sound, spread, z, &loss, &worst);
  else margins<float>(a, b, weight, bias, y, bounds, sound, spread, z, &loss, &worst);
  return {loss, worst, z};
}

template <class A>
void backward(const Tensor& grad, const Tensor& a, const Tensor& b, const Tensor& weight, const Tensor& y, bool bounds, bool need_x,
              bool need_w, bool need_b, Tensor& da, Tensor& db, Tensor& dw, Tensor& dbias) {
  const int64_t batch = a.size(0), classes = weight.size(0), d = weight.size(1);
  CallMemory memory{a, {}};
  const Box<A> box = centered<A>(a, b, bounds, false, 0, memory);
  const RowMatrix<A> w = widened<A>(weight, memory);
  const A* g = static_cast<const A*>(grad.data_ptr());
  const int64_t* label = places(y, classes, "y");
  const bool direct = dtype_of(weight.scalar_type()) == own_dtype<A>;
  A* out = !need_w ? nullptr : direct ? static_cast<A*>(dw.data_ptr()) : memory.get<A>(classes * d);
  A *dm = need_x ? memory.get<A>(batch * box.ld) : nullptr, *dr = need_x ? memory.get<A>(batch * box.ld) : nullptr;
  const int64_t columns = kernels<MarginKernels, A>().columns();
  parallel_items(need_x || need_w ? pieces(d, columns) : 0, 1, [&](int64_t i) {
    const int64_t j = i * columns;
    kernels<MarginKernels, A>().gradient(g, label, batch, classes, box.c + j, box.r + j, box.ld, w.data + j, w.stride, std::min(columns, d - j),
                                     dm ? dm + j : nullptr, dr ? dr + j : nullptr, box.ld, out ? out + j : nullptr, d);
  });
  if (need_w && !direct) narrow_rows<A>(out, dw);
  if (need_x) {
    const Rows first(da), second(db);
    parallel_items(batch, 16, [&](int64_t p) {
      kernels<LinearKernels, A>().input_gradients(dm + p * box.ld, dr + p * box.ld, d, bounds, first.dtype, first.at(p, 0), second.at(p, 0));
    });
  }
  if (!need_b) return;
  std::vector<A> sum(static_cast<size_t>(classes), A(0));
  for (int64_t i = 0; i < batch; ++i)
    for (int64_t k = 0; k < classes; ++k)
      if (k != label[i]) {
        sum[size_t(k)] += g[i * classes + k];
        sum[size_t(label[i])] -= g[i * classes + k];
      }
  kernels<ConvertKernels, A>().narrow(sum.data(), classes, dtype_of(dbias.scalar_type()), dbias.data_ptr());
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Gradients margin_logits_backward(Tensor grad, Rowwise a, Rowwise b, Rowwise weight, Tensor y, bool bounds, bool need_x, bool need_w, bool need_b) {
  const int64_t batch = a.size(0), classes = weight.size(0), d = weight.size(1);
  expect(grad, "grad", {batch, classes}, accumulate(a)), expect(a, "first", {batch, d}), expect_like(b, "second", a);
  expect(y, "y", {batch}), expect(weight, "weight", {classes, d}, a.scalar_type());
  const auto made = [&](bool wanted, std::vector<int64_t> shape) {
    return fresh(a, wanted ? shape : std::vector<int64_t>{0});
  };
  Tensor da = made(need_x, {batch, d}), db = made(need_x, {batch, d}), dw = made(need_w, {classes, d}), dbias = made(need_b, {classes});
  if (accumulate(a) == ScalarType::Double) backward<double>(grad, a, b, weight, y, bounds, need_x, need_w, need_b, da, db, dw, dbias);
  else backward<float>(grad, a, b, weight, y, bounds, need_x, need_w, need_b, da, db, dw, dbias);
  return {da, db, dw, dbias};
}

}  // namespace
}  // namespace w2s::interval

W2S_IMPLEMENTATIONS(m) {
  m.add<&w2s::interval::margin_logits>("margin_logits");
  m.add<&w2s::interval::margin_cross_entropy>("margin_cross_entropy");
  m.add<&w2s::interval::margin_logits_backward>("margin_logits_backward");
}
