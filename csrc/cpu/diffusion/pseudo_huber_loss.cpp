#include "cpu/tensors.h"

namespace w2s {
namespace {

// Residuals of pred and target, or of four tensors with coefficients a row (levels).
struct PseudoHuber {
  std::vector<Tensor> kept;  // contiguous
  std::vector<Rows> tensors;
  std::vector<double> levels;  // [B, 4], or none
  int64_t B, D;
  double c;
  bool vector, f64 = false;
  Tensor loss, inverse;       // forward
  std::vector<double> scale;  // backward: a row's factor of r, or of r / sqrt(r^2 + c^2)
  Rows out;

  PseudoHuber(const std::vector<Tensor>& given, std::vector<double> k, double c_, bool vector_)
      : levels(std::move(k)), B(given[0].size(0)), D(given[0].size(1)), c(c_), vector(vector_), loss(given[0]),
        inverse(given[0]) {
    for (const Tensor& t : given) {
      kept.push_back(t);
      tensors.emplace_back(kept.back());
      f64 |= tensors.back().dtype == Dtype::f64;
    }
  }
};

}  // namespace
}  // namespace w2s

#define W2S_KERNEL "cpu/diffusion/pseudo_huber_kernel.h"
#include "cpu/for_each_target.h"

namespace w2s {
namespace {

std::tuple<Tensor, Tensor> forward(PseudoHuber h) {
  const ScalarType acc = h.f64 ? ScalarType::Double : ScalarType::Float;
  h.loss = torch::stable::new_empty(h.kept[0], {h.B}, acc);
  h.inverse = torch::stable::new_empty(h.kept[0], {h.vector ? h.B : 0}, acc);
  W2S_DISPATCH(run_loss)(h);
  return {h.loss, h.inverse};
}

// `column` of the levels multiplies the gradient in r; -1: nothing does
Tensor backward(PseudoHuber h, const Tensor& grad, const Tensor& inverse, int64_t column) {
  h.scale = numbers(grad);
  const std::vector<double> roots = numbers(inverse);
  for (int64_t row = 0; row < h.B; ++row) {
    h.scale[size_t(row)] *= h.vector ? roots[size_t(row)] : 1 / double(h.D);
    if (column >= 0) h.scale[size_t(row)] *= h.levels[size_t(4 * row + column)];
  }
  Tensor out = torch::stable::new_empty(h.kept[column < 0 ? 0 : size_t(column)], {h.B, h.D});
  h.out = Rows(out);
  W2S_DISPATCH(run_gradient)(h);
  return out;
}

std::tuple<Tensor, Tensor> pseudo_huber_loss(Tensor pred, Tensor target, double c, bool vector) {
  return forward(PseudoHuber({pred, target}, {}, c, vector));
}

Tensor pseudo_huber_backward(Tensor grad, Tensor pred, Tensor target, Tensor inverse, double c) {
  return backward(PseudoHuber({pred, target}, {}, c, inverse.size(0) > 0), grad, inverse, -1);
}

std::tuple<Tensor, Tensor> ict_loss(Tensor student, Tensor teacher, Tensor x_student, Tensor x_teacher, Tensor levels,
                                    double c, bool vector) {
  return forward(PseudoHuber({student, teacher, x_student, x_teacher}, numbers(levels), c, vector));
}

Tensor ict_backward(Tensor grad, Tensor student, Tensor teacher, Tensor x_student, Tensor x_teacher, Tensor levels,
                    Tensor inverse, double c, int64_t column) {
  PseudoHuber h({student, teacher, x_student, x_teacher}, numbers(levels), c, inverse.size(0) > 0);
  return backward(std::move(h), grad, inverse, column);
}

}  // namespace
}  // namespace w2s

STABLE_TORCH_LIBRARY_IMPL(w2s_fast, CPU, m) {
  m.impl("pseudo_huber_loss", W2S_BOX(&w2s::pseudo_huber_loss));
  m.impl("pseudo_huber_backward", W2S_BOX(&w2s::pseudo_huber_backward));
  m.impl("ict_loss", W2S_BOX(&w2s::ict_loss));
  m.impl("ict_backward", W2S_BOX(&w2s::ict_backward));
}
