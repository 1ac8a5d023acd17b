#include "cpu/logit_fusion/fusion.h"

namespace w2s {
namespace {

struct PseudoHuber {
  int64_t B, D;
  Rows pred, target, out;
  Tensor loss, inverse;  // forward
  std::vector<double> scale;  // backward: factor of a row's residuals, or of r / sqrt(r^2 + c^2)
  double c;
  bool vector, f64;

  PseudoHuber(const Tensor& p, const Tensor& t, double c_, bool vector_)
      : B(p.size(0)), D(p.size(1)), pred(p), target(t), loss(p), inverse(p), c(c_), vector(vector_),
        f64(pred.dtype == Dtype::f64 || target.dtype == Dtype::f64) {}
  ScalarType acc() const { return f64 ? ScalarType::Double : ScalarType::Float; }
};

}  // namespace
}  // namespace w2s

#define W2S_KERNEL "cpu/diffusion/pseudo_huber_kernel.h"
#include "cpu/for_each_target.h"

namespace w2s {
namespace {

std::tuple<Tensor, Tensor> pseudo_huber_loss(Tensor pred, Tensor target, double c, bool vector) {
  pred = torch::stable::contiguous(pred);
  target = torch::stable::contiguous(target);
  PseudoHuber h(pred, target, c, vector);
  h.loss = torch::stable::new_empty(pred, {h.B}, h.acc());
  h.inverse = torch::stable::new_empty(pred, {vector ? h.B : 0}, h.acc());
  W2S_DISPATCH(run_loss)(h);
  return {h.loss, h.inverse};
}

Tensor pseudo_huber_backward(Tensor grad, Tensor pred, Tensor target, Tensor inverse, double c) {
  pred = torch::stable::contiguous(pred);
  target = torch::stable::contiguous(target);
  PseudoHuber h(pred, target, c, inverse.size(0) > 0);
  h.scale = numbers(grad);
  const std::vector<double> roots = numbers(inverse);
  for (int64_t row = 0; row < h.B; ++row) h.scale[size_t(row)] *= h.vector ? roots[size_t(row)] : 1 / double(h.D);
  Tensor out = torch::stable::new_empty(pred, {h.B, h.D});
  h.out = Rows(out);
  W2S_DISPATCH(run_gradient)(h);
  return out;
}

}  // namespace
}  // namespace w2s

STABLE_TORCH_LIBRARY_IMPL(w2s_fast, CPU, m) {
  m.impl("pseudo_huber_loss", TORCH_BOX(&w2s::pseudo_huber_loss));
  m.impl("pseudo_huber_backward", TORCH_BOX(&w2s::pseudo_huber_backward));
}
