#include "cpu/state_space/s4_spectrum.h"

#include "cpu/state_space/values.h"

// A feature is an item of work: its sums have one order. Floor: the reciprocals and the sums, 2 + 24 operations a node and pole.
namespace w2s {
namespace {

constexpr double PI = 3.14159265358979323846;

struct Space {
  std::vector<double> a, b, p, c, dt, y;
  SpectrumCall call;
};

Space space(const Tensor& a, const Tensor& b, const Tensor& p, const Tensor& c, const Tensor& dt, int64_t length) {
  check(a.dim() == 3 && c.dim() == 4, "a must be [H, M, 2] and c [C, H, M, 2]");
  check(length >= 2 && length <= LONGEST, "length must be in [2, 2^31)");
  const int64_t H = a.size(0), M = a.size(1), C = c.size(0);
  expect(a, "a", {H, M, 2}), expect(b, "b", {H, M, 2}), expect(p, "p", {H, M, 2}), expect(c, "c", {C, H, M, 2}), expect(dt, "dt", {H});
  Space s{values(a), values(b), values(p), values(c), values(dt), {}, {H, M, C, length, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr}};
  s.y.reserve(size_t(s.call.nodes()));
  for (int64_t l = 0; l < s.call.nodes(); ++l) s.y.push_back(2 * std::tan(PI * double(l) / double(length)));
  s.call.a = s.a.data(), s.call.b = s.b.data(), s.call.p = s.p.data(), s.call.c = s.c.data(), s.call.dt = s.dt.data(), s.call.y = s.y.data();
  return s;
}

int64_t grain(const SpectrumCall& call, int64_t times) { return grain_of(times * call.C * call.nodes() * call.M); }

Tensor s4_spectrum(Tensor a, Tensor b, Tensor p, Tensor c, Tensor dt, int64_t length) {
  const Space s = space(a, b, p, c, dt, length);
  const SpectrumCall& call = s.call;
  Tensor out = fresh(c, {call.C, call.H, call.columns(), 2}, wide_type(c));
  with_type(is_double(c), [&]<class A>(A) {
    const auto& kernel = kernels<SpectrumKernels, A>();
    parallel_items(call.H, grain(call, 1), [&](int64_t h) { kernel.forward(call, h, static_cast<A*>(out.data_ptr())); });
  });
  return out;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients s4_spectrum_backward(Tensor grad, Tensor a, Tensor b, Tensor p, Tensor c, Tensor dt, int64_t length) {
  const Space s = space(a, b, p, c, dt, length);
  const SpectrumCall& call = s.call;
  expect(grad, "grad", {call.C, call.H, call.columns(), 2}, wide_type(c));
  std::vector<double> da(s.a.size()), db(s.b.size()), dp(s.p.size()), dc(s.c.size()), ddt(s.dt.size());
  const SpectrumGradients made{grad.data_ptr(), da.data(), db.data(), dp.data(), dc.data(), ddt.data()};
  with_kernels<SpectrumKernels>(is_double(c), [&](const auto& kernel) {
    parallel_items(call.H, grain(call, 4), [&](int64_t h) { kernel.backward(call, h, made); });
  });
  return {narrowed(da, a), narrowed(db, b), narrowed(dp, p), narrowed(dc, c), narrowed(ddt, dt)};
}

}  // namespace
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) {
  m.add<&w2s::s4_spectrum>("s4_spectrum");
  m.add<&w2s::s4_spectrum_backward>("s4_spectrum_backward");
}
