#include "cpu/state_space/s4d_conv.h"

#include "cpu/state_space/values.h"

// A feature is an item of work: its tables serve all samples, and its sums have one order. Floor: u read and y written once.
namespace w2s {
namespace {

constexpr int64_t WORK = 64;  // multiply-adds that weigh as much as one element of other kernels

struct Parameters {
  std::vector<double> z, b, c, d, state;
};

Parameters parameters(const Tensor& u, const Tensor& z, const Tensor& b, const Tensor& c, const Tensor& d, const std::optional<Tensor>& state) {
  check(u.dim() == 3 && z.dim() == 3, "u must be [B, H, L] and z [H, M, 2]");
  const int64_t H = u.size(1), M = z.size(1);
  expect(z, "z", {H, M, 2}), expect(b, "b", {H, M, 2}), expect(c, "c", {H, M, 2}), expect(d, "d", {H});
  expect(state, "state", {u.size(0), H, M, 2});
  return {values(z), values(b), values(c), values(d), values(state)};
}

SpaceCall call_of(const Tensor& u, const Tensor& z, const Parameters& p) {
  return {u.size(0), u.size(1), u.size(2), z.size(1), Flat(u), p.z.data(), p.b.data(), p.c.data(), p.d.data(),
          p.state.empty() ? nullptr : p.state.data()};
}

int64_t grain(const SpaceCall& call) { return grain_of(call.B * call.L * (4 * call.M + WORK) / WORK + 8 * call.M); }

std::tuple<Tensor, Tensor> s4d_conv(Tensor u, Tensor z, Tensor b, Tensor c, Tensor d, std::optional<Tensor> state, bool need_state) {
  const Parameters p = parameters(u, z, b, c, d, state);
  const SpaceCall call = call_of(u, z, p);
  Tensor y = empty_of(u);
  Tensor after = fresh(u, need_state ? std::vector<int64_t>{call.B, call.H, call.M, 2} : std::vector<int64_t>{0}, wide_type(u));
  const Flat behind = need_state ? Flat(after) : Flat();
  if (call.B == 0) return {y, after};
  check(call.L >= 1, "u must have a position");
  with_kernels<SpaceKernels>(is_double(u), [&](const auto& kernel) {
    parallel_items(call.H, grain(call), [&](int64_t h) { kernel.forward(call, h, Flat(y), behind); });
  });
  return {y, after};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients s4d_conv_backward(Tensor grad, std::optional<Tensor> grad_after, Tensor u, Tensor z, Tensor b, Tensor c, Tensor d,
                            std::optional<Tensor> state) {
  const Parameters p = parameters(u, z, b, c, d, state);
  const SpaceCall call = call_of(u, z, p);
  expect_like(grad, "grad", u);
  expect(grad_after, "grad_after", {call.B, call.H, call.M, 2});
  const std::vector<double> after = values(grad_after);
  const size_t each = size_t(call.H * call.M * 2);
  std::vector<double> dz(each), db(each), dc(each), dd(size_t(call.H)), dstate(p.state.size());
  Tensor du = empty_of(u);
  const SpaceGradients made{Flat(grad), Flat(du), after.empty() ? nullptr : after.data(), dz.data(), db.data(), dc.data(), dd.data(),
                            dstate.empty() ? nullptr : dstate.data()};
  check(call.B == 0 || call.L >= 1, "u must have a position");
  if (call.B)
    with_kernels<SpaceKernels>(is_double(u), [&](const auto& kernel) {
      parallel_items(call.H, grain(call), [&](int64_t h) { kernel.backward(call, h, made); });
    });
  return {du, narrowed(dz, z), narrowed(db, b), narrowed(dc, c), narrowed(dd, d), state ? narrowed(dstate, *state) : fresh(u, {0})};
}

}  // namespace
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) {
  m.add<&w2s::s4d_conv>("s4d_conv");
  m.add<&w2s::s4d_conv_backward>("s4d_conv_backward");
}
