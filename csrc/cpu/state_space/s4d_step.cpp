#include "cpu/state_space/s4d_step.h"

#include "cpu/convert.h"
#include "cpu/tensors.h"

namespace w2s {
namespace {

// The numbers of a contiguous tensor as A: where they lie, or widened.
template <class A>
const A* numbers_of(const Tensor& t, CallMemory& memory) {
  if (dtype_of(t) == own_dtype<A>) return static_cast<const A*>(t.data_ptr());
  A* found = memory.get<A>(round_up(t.numel(), 16));
  kernels<ConvertKernels, A>().widen(t.data_ptr(), dtype_of(t), t.numel(), found);
  return found;
}

std::tuple<Tensor, Tensor> s4d_step(Tensor u, Tensor a, Tensor b, Tensor c, Tensor d, Tensor state) {
  check(u.dim() == 2 && a.dim() == 3, "u must be [B, H] and a [H, M, 2]");
  const int64_t B = u.size(0), H = u.size(1), M = a.size(1);
  expect(a, "a", {H, M, 2}), expect(b, "b", {H, M, 2}), expect(c, "c", {H, M, 2}), expect(d, "d", {H});
  expect(state, "state", {B, H, M, 2});
  const bool wide = is_double(u) || is_double(state);
  Tensor y = empty_of(u), after = fresh(state, {B, H, M, 2}, wide_type(wide));
  with_type(wide, [&]<class A>(A) {
    CallMemory memory{u, {}};
    const bool direct = dtype_of(y) == own_dtype<A>;
    A* out = direct ? static_cast<A*>(y.data_ptr()) : memory.get<A>(B * H);
    const auto of = [&](const Tensor& t) { return numbers_of<A>(t, memory); };
    const StepCall<A> call{H, M, of(u), of(a), of(b), of(c), of(d), of(state), out, static_cast<A*>(after.data_ptr())};
    const auto& kernel = kernels<StepKernels, A>();
    parallel_ranges(B * H, grain_of(2 * M), [&](int64_t begin, int64_t end) { kernel.rows(call, begin, end); });
    if (!direct) kernels<ConvertKernels, A>().narrow(out, B * H, dtype_of(y), y.data_ptr());
  });
  return {y, after};
}

}  // namespace
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) { m.add<&w2s::s4d_step>("s4d_step"); }
