#include "cpu/logit_fusion/sample.h"

namespace w2s {
struct Upstream {  // gradients with respect to z, see fuse_backward_kernel.h
  Rows grad;
  bool has_grad = false, subtract = false, need_params = false;
  std::vector<double> lse, row_a, row_b, coef;
  std::vector<int64_t> index;
  int64_t indices = 0;
};
}  // namespace w2s

#define W2S_KERNEL "cpu/logit_fusion/fuse_backward_kernel.h"
#include "cpu/for_each_target.h"

namespace w2s {
namespace {

std::tuple<Tensor, Tensor, Tensor> fuse_backward(W2S_FUSE_PARAMETERS, std::optional<Rowwise> grad, Tensor lse,
                                                 std::optional<Tensor> row_a, std::optional<Tensor> row_b,
                                                 std::optional<Tensor> index, std::optional<Tensor> index_coef,
                                                 bool subtract_row_sum, bool need_params) {
  const Fusion f(W2S_FUSE_ARGUMENTS);
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
    const int64_t* at = integers<int64_t>(*index);
    up.index.assign(at, at + f.B * up.indices);
  }
  Tensor dz = f.rows(base.scalar_type(), f.V);
  Tensor dweights = need_params ? f.rows(f.acc(), f.K) : f.nothing();
  Tensor dtemperature = need_params ? f.rows(f.acc()) : f.nothing();
  W2S_DISPATCH(run_fuse_backward)(f, up, dz, &dweights, &dtemperature);
  return {dz, dweights, dtemperature};
}

}  // namespace
}  // namespace w2s

STABLE_TORCH_LIBRARY_IMPL(w2s_fast, CPU, m) { m.impl("fuse_backward", W2S_BOX(&w2s::fuse_backward)); }
