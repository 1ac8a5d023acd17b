#include "cpu/state_space/s4d_step.h"

#include "cpu/tensors.h"

namespace w2s {
namespace {

std::tuple<Tensor, Tensor> s4d_step(Tensor u, Tensor a, Tensor b, Tensor c, Tensor d, Tensor state) {
  check(u.dim() == 2 && a.dim() == 3, "u must be [B, H] and a [H, M, 2]");
  const int64_t B = u.size(0), H = u.size(1), M = a.size(1);
  expect(a, "a", {H, M, 2}), expect(b, "b", {H, M, 2}), expect(c, "c", {H, M, 2}), expect(d, "d", {H});
  expect(state, "state", {B, H, M, 2});
  const bool wide = is_double(u) || is_double(state);
  Tensor y = empty_of(u), after = fresh(state, {B, H, M, 2}, wide_type(wide));
  const StepCall call{B, H, M, Flat(u), Flat(a), Flat(b), Flat(c), Flat(d), Flat(state), Flat(y), Flat(after)};
  with_kernels<StepKernels>(wide, [&](const auto& kernel) {
    parallel_items(B ? H : 0, grain_of(2 * M * (B + 3)), [&](int64_t h) { kernel.feature(call, h); });
  });
  return {y, after};
}

}  // namespace
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) { m.add<&w2s::s4d_step>("s4d_step"); }
