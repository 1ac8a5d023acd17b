// adaln_modulate, gate_residual and gate_residual_adaln.
#include "cpu/diffusion/modulation.h"

#include "cpu/tensors.h"

namespace w2s {
namespace modulation {
namespace {

using Shape = std::vector<int64_t>;
using Optional = std::optional<Tensor>;
using OptionalRows = std::optional<Rowwise>;

std::tuple<Tensor, Tensor, Tensor> modulate(Rowwise x, OptionalRows y, OptionalRows gate, Optional gate_row, OptionalRows shift,
                                            Optional shift_row, OptionalRows scale, Optional scale_row, double eps) {
  const int64_t B = x.size(0), N = x.size(1), C = x.size(2);
  const bool norm = shift.has_value();
  Tensor added = fresh(x, y ? Shape{B, N, C} : Shape{0});
  Tensor h = fresh(x, norm ? Shape{B, N, C} : Shape{0});
  Tensor stats = fresh(x, norm ? Shape{B, N, 2} : Shape{0}, wide_type(x));
  const Forward f{B, N, C, Slots(x), Slots(y), y ? Slots(added) : Slots(), norm ? Slots(h) : Slots(),
                  {gate, gate_row}, {shift, shift_row}, {scale, scale_row}, eps, stats.data_ptr()};
  with_kernels<ModulationKernels>(is_double(x), [&](const auto& kernel) { kernel.forward(f, f.x.dtype); });
  return {added, h, stats};
}

// A vector of C a sample, a token or for all, and a row that is added to it.
void fits(const OptionalRows& vector, const Optional& row, const char* name, int64_t B, int64_t N, int64_t C) {
  if (vector) expect(*vector, name, {vector->size(0) == 1 ? 1 : B, vector->dim() > 1 && vector->size(1) == 1 ? 1 : N, C});
  expect(row, name, {C});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> modulate_backward(OptionalRows grad_added, OptionalRows grad_h, Rowwise added, OptionalRows y,
                                                                     OptionalRows gate, Optional gate_row, OptionalRows scale,
                                                                     Optional scale_row, Tensor stats, bool need_x, bool need_y,
                                                                     bool need_gate, bool need_modulation) {
  const int64_t B = added.size(0), N = added.size(1), C = added.size(2);
  if (grad_added) expect_like(*grad_added, "grad_added", added);
  if (grad_h) expect_like(*grad_h, "grad_h", added);
  if (y) expect_like(*y, "y", added);
  fits(gate, gate_row, "gate", B, N, C);
  fits(scale, scale_row, "scale", B, N, C);
  if (scale) expect(stats, "stats", {B, N, 2}, wide_type(added));
  Tensor dx = fresh(added, need_x ? Shape{B, N, C} : Shape{0}), dy = fresh(added, need_y ? Shape{B, N, C} : Shape{0});
  // a gradient a token for a vector a token, else their sum; dshift is a sum always: a token's is grad_h itself
  const auto sums = [&](bool need, const Optional& vector) {
    return fresh(added, need ? Shape{B, vector ? vector->size(1) : 1, C} : Shape{0}, wide_type(added));
  };
  Tensor dgate = sums(need_gate, gate), dshift = sums(need_modulation, {}), dscale = sums(need_modulation, scale);
  const Backward f{B, N, C, Slots(grad_added), Slots(grad_h), Slots(added), Slots(y), need_x ? Slots(dx) : Slots(),
                   need_y ? Slots(dy) : Slots(), {gate, gate_row}, {scale, scale_row}, stats.data_ptr(), dgate.data_ptr(),
                   dshift.data_ptr(), dscale.data_ptr(), need_x, need_y, need_gate, need_modulation};
  with_kernels<ModulationKernels>(is_double(added), [&](const auto& kernel) { kernel.backward(f, f.added.dtype); });
  return {dx, dy, dgate, dshift, dscale};
}

}  // namespace
}  // namespace modulation
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) {
  m.add<&w2s::modulation::modulate>("modulate");
  m.add<&w2s::modulation::modulate_backward>("modulate_backward");
}
