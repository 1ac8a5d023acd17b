#include "cpu/state_space/vandermonde_log.h"

#include "cpu/state_space/values.h"

// A feature is an item of work. Floor: 4 M operations a position.
namespace w2s {
namespace {

void look(const Tensor& c, const Tensor& x, int64_t length) {
  check(c.dim() == 4 && x.dim() == 3, "c must be [C, H, M, 2] and x [H, M, 2]");
  check(length >= 1 && length <= LONGEST, "length must be in [1, 2^31)");
  expect(x, "x", {c.size(1), c.size(2), 2}), expect(c, "c", {c.size(0), c.size(1), c.size(2), 2});
}

int64_t grain(const VandermondeCall& call, int64_t times) { return grain_of(call.M * (64 + times * call.C * call.L / 16)); }

Tensor vandermonde_log(Tensor c, Tensor x, int64_t length) {
  look(c, x, length);
  const std::vector<double> weights = values(c), logs = values(x);
  const VandermondeCall call{c.size(1), c.size(2), c.size(0), length, weights.data(), logs.data()};
  Tensor out = fresh(c, {call.C, call.H, length}, wide_type(c));
  with_type(is_double(c), [&]<class A>(A) {
    const auto& kernel = kernels<VandermondeKernels, A>();
    parallel_items(call.H, grain(call, 1), [&](int64_t h) { kernel.forward(call, h, static_cast<A*>(out.data_ptr())); });
  });
  return out;
}

std::tuple<Tensor, Tensor> vandermonde_log_backward(Tensor grad, Tensor c, Tensor x, int64_t length) {
  look(c, x, length);
  const std::vector<double> weights = values(c), logs = values(x);
  const VandermondeCall call{c.size(1), c.size(2), c.size(0), length, weights.data(), logs.data()};
  expect(grad, "grad", {call.C, call.H, length}, wide_type(c));
  std::vector<double> dc(weights.size()), dx(logs.size());
  with_type(is_double(c), [&]<class A>(A) {
    const auto& kernel = kernels<VandermondeKernels, A>();
    const A* from = static_cast<const A*>(grad.data_ptr());
    parallel_items(call.H, grain(call, 2), [&](int64_t h) { kernel.backward(call, h, from, dc.data(), dx.data()); });
  });
  return {narrowed(dc, c), narrowed(dx, x)};
}

}  // namespace
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) {
  m.add<&w2s::vandermonde_log>("vandermonde_log");
  m.add<&w2s::vandermonde_log_backward>("vandermonde_log_backward");
}
