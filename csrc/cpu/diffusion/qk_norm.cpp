#include "cpu/diffusion/qk_norm.h"

#include "cpu/tensors.h"

namespace w2s {
namespace norm {
namespace {

using Shape = std::vector<int64_t>;

Problem problem(const Tensor& x, int64_t first, int64_t last, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                bool rms, double eps) {
  return {x.size(0), x.size(1), x.size(2), x.size(3), first, last, Slots(x), Flat(weight), Flat(bias),
          weight ? weight->size(0) : 1, bias ? bias->size(0) : 1, rms, eps};
}

std::tuple<Tensor, Tensor> qk_norm(Rowwise x, int64_t first, int64_t last, std::optional<Tensor> weight, std::optional<Tensor> bias,
                                   bool rms, double eps) {
  const Problem p = problem(x, first, last, weight, bias, rms, eps);
  Tensor y = fresh(x, {p.B, p.N, p.S, p.C});
  Tensor stats = fresh(x, {p.B, p.N, last - first, 2}, wide_type(x));
  with_kernels<NormKernels>(is_double(x), [&](const auto& kernel) { kernel.forward(p, Slots(y), stats.data_ptr()); });
  return {y, stats};
}

std::tuple<Tensor, Tensor, Tensor> qk_norm_backward(Rowwise grad, Rowwise x, int64_t first, int64_t last, std::optional<Tensor> weight,
                                                    std::optional<Tensor> bias, bool rms, Tensor stats, bool need_params) {
  const Problem p = problem(x, first, last, weight, bias, rms, 0.0);
  expect_like(grad, "grad", x);
  const auto sets = [&](int64_t given) { return given == 1 ? 1 : last - first; };
  expect(weight, "weight", {sets(p.sets), p.C}), expect(bias, "bias", {sets(p.bias_sets), p.C});
  expect(stats, "stats", {p.B, p.N, last - first, 2}, wide_type(x));
  Tensor dx = fresh(x, {p.B, p.N, p.S, p.C});
  Tensor dweight = fresh(x, need_params && weight ? Shape{weight->size(0), p.C} : Shape{0}, wide_type(x));
  Tensor dbias = fresh(x, need_params && bias ? Shape{bias->size(0), p.C} : Shape{0}, wide_type(x));
  with_type(is_double(x), [&]<class A>(A) {
    const auto pointer = [](const Tensor& t) { return t.numel() ? static_cast<A*>(t.data_ptr()) : nullptr; };
    kernels<NormKernels, A>().backward(p, Slots(grad), stats.data_ptr(), Slots(dx), pointer(dweight), pointer(dbias));
  });
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace norm
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) {
  m.add<&w2s::norm::qk_norm>("qk_norm");
  m.add<&w2s::norm::qk_norm_backward>("qk_norm_backward");
}
