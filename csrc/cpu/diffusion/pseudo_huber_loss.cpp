#include "cpu/diffusion/pseudo_huber.h"

#include "cpu/tensors.h"

namespace w2s {
namespace {

struct Call : PseudoHuber {
  Tensors given;  // contiguous
  bool f64;

  Call(const Tensors& tensors, std::vector<double> k, double c, bool vector)
      : PseudoHuber{{}, std::move(k), tensors[0].size(0), tensors[0].size(1), c, vector, {}, {}, {}, {}}, given(tensors),
        f64(std::any_of(tensors.begin(), tensors.end(), is_double)) {
    const std::vector<const char*> names = given.size() == 2 ? std::vector{"pred", "target"} : std::vector{"student", "teacher", "x_student", "x_teacher"};
    for (size_t i = 0; i < given.size(); ++i) {
      expect(given[i], names[i], {B, D});
      this->tensors.emplace_back(given[i]);
    }
  }
};

std::tuple<Tensor, Tensor> forward(Call h) {
  const ScalarType type = wide_type(h.f64);
  Tensor loss = fresh(h.given[0], {h.B}, type);
  Tensor inverse = fresh(h.given[0], {h.vector ? h.B : 0}, type);
  h.loss = Flat(loss), h.inverse = Flat(inverse);
  with_kernels<PseudoHuberKernels>(h.f64, [&](const auto& kernel) { kernel.loss(h); });
  return {loss, inverse};
}

// `column` of the levels multiplies the gradient in r; -1: nothing does
Tensor backward(Call h, const Tensor& grad, const Tensor& inverse, int64_t column) {
  expect(grad, "grad", {h.B});
  expect(inverse, "inverse", {h.vector ? h.B : 0});
  h.scale = numbers(grad);
  const std::vector<double> roots = numbers(inverse);
  for (int64_t row = 0; row < h.B; ++row) {
    h.scale[size_t(row)] *= h.vector ? roots[size_t(row)] : 1 / double(h.D);
    if (column >= 0) h.scale[size_t(row)] *= h.levels[size_t(4 * row + column)];
  }
  Tensor out = fresh(h.given[column < 0 ? 0 : size_t(column)], {h.B, h.D});
  h.out = Rows(out);
  with_kernels<PseudoHuberKernels>(h.f64, [&](const auto& kernel) { kernel.gradient(h); });
  return out;
}

std::tuple<Tensor, Tensor> pseudo_huber_loss(Tensor pred, Tensor target, double c, bool vector) {
  return forward(Call({pred, target}, {}, c, vector));
}

Tensor pseudo_huber_backward(Tensor grad, Tensor pred, Tensor target, Tensor inverse, double c) {
  return backward(Call({pred, target}, {}, c, inverse.size(0) > 0), grad, inverse, -1);
}

std::tuple<Tensor, Tensor> ict_loss(Tensor student, Tensor teacher, Tensor x_student, Tensor x_teacher, Tensor levels,
                                    double c, bool vector) {
  return forward(Call({student, teacher, x_student, x_teacher}, numbers(levels), c, vector));
}

Tensor ict_backward(Tensor grad, Tensor student, Tensor teacher, Tensor x_student, Tensor x_teacher, Tensor levels,
                    Tensor inverse, double c, int64_t column) {
  expect(levels, "levels", {student.size(0), 4});
  Call h({student, teacher, x_student, x_teacher}, numbers(levels), c, inverse.size(0) > 0);
  return backward(std::move(h), grad, inverse, column);
}

}  // namespace
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) {
  m.add<&w2s::pseudo_huber_loss>("pseudo_huber_loss");
  m.add<&w2s::pseudo_huber_backward>("pseudo_huber_backward");
  m.add<&w2s::ict_loss>("ict_loss");
  m.add<&w2s::ict_backward>("ict_backward");
}
