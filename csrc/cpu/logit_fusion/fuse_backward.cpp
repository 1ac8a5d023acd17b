#include "cpu/logit_fusion/fusion.h"

namespace w2s {
namespace {

std::tuple<Tensor, Tensor, Tensor> fuse_backward(FusionArguments fusion, std::optional<Rowwise> grad, Tensor lse, std::optional<Tensor> row_a,
                                                 std::optional<Tensor> row_b, std::optional<Tensor> index,
                                                 std::optional<Tensor> index_coef, bool subtract_row_sum, bool need_params) {
  const Fusion f(fusion);
  const RowResults rows(fusion.base, f);
  if (grad) expect(*grad, "grad", {f.B, f.V});
  expect(lse, "lse", {f.B}), expect(row_a, "row_a", {f.B}), expect(row_b, "row_b", {f.B});
  if (index) expect(*index, "index", {f.B, index->size(1)}), expect(index_coef, "index_coef", {f.B, index->size(1)});
  Upstream up;
  if (grad) up.grad = Rows(*grad);
  up.has_grad = grad.has_value();
  up.subtract = subtract_row_sum && up.has_grad;
  up.need_params = need_params;
  up.lse = numbers(lse);
  up.row_a = numbers(row_a);
  up.row_b = numbers(row_b);
  if (index && index_coef) {
    up.indices = index->size(1);
    up.coef = numbers(*index_coef);
    const int64_t* at = places(*index, f.V, "index");
    up.index.assign(at, at + f.B * up.indices);
  }
  Tensor dz = rows(fusion.base.scalar_type(), f.V);
  Tensor dweights = need_params ? rows(rows.wide, f.K) : rows.nothing(), dtemperature = need_params ? rows(rows.wide) : rows.nothing();
  with_kernels<FuseBackwardKernels>(f.f64, [&](const auto& kernel) {
    kernel.run(f, up, Rows(dz), Flat(dweights), Flat(dtemperature));
  });
  return {dz, dweights, dtemperature};
}

}  // namespace
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) { m.add<&w2s::fuse_backward>("fuse_backward"); }
