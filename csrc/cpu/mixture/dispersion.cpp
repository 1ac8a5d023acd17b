#include "cpu/mixture/dispersion.h"

#include "cpu/recycled.h"
#include "cpu/tensors.h"

namespace w2s {
namespace {

Tensor dispersion(Rowwise logits) {
  Tensor out = fresh(logits, {logits.size(0), 2}, wide_type(logits));
  const Dispersion s{logits.size(0), logits.size(1), Rows(logits), Flat(out), {}};
  with_kernels<DispersionKernels>(is_double(logits), [&](const auto& of) { of.run(s); });
  return out;
}

Tensor dispersion_backward(Tensor grad, Tensor logits) {
  expect(grad, "grad", {logits.size(0), 2}, wide_type(logits));
  Tensor dlogits = recycled_empty(logits, shape_of(logits));
  const Dispersion s{logits.size(0), logits.size(1), Rows(logits), Flat(grad), Rows(dlogits)};
  with_kernels<DispersionKernels>(is_double(logits), [&](const auto& of) { of.backward(s); });
  return dlogits;
}

}  // namespace
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) {
  m.add<&w2s::dispersion>("dispersion");
  m.add<&w2s::dispersion_backward>("dispersion_backward");
}
