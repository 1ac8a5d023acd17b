// interval_moments and its gradient: one read of the bounds, then one read and one write. Sums are float64, of fixed
// parts in order, so that they do not depend on threads.
#include "cpu/interval_bounds/boxes.h"
#include "cpu/tensors.h"

namespace w2s::interval {
namespace {

constexpr int64_t TILE = 1024, PART = 64 * TILE;

Tensor interval_moments(Tensor lower, Tensor upper) {
  const int64_t n = lower.numel(), parts = (n + PART - 1) / PART;
  const Dtype dtype = dtype_of(lower.scalar_type());
  const int64_t bytes = bytes_of(dtype);
  const char *l = static_cast<const char*>(lower.data_ptr()), *u = static_cast<const char*>(upper.data_ptr());
  const auto moments = with_kernels<MomentKernels>(dtype == Dtype::f64, [&](const auto& kernel) { return kernel.moments; });
  std::vector<double> sums(static_cast<size_t>(9 * parts), 0.0);
  parallel_items(parts, 1, [&](int64_t p) {
    for (int64_t i = p * PART; i < std::min(n, (p + 1) * PART); i += TILE)
      moments(l + i * bytes, u + i * bytes, dtype, int(std::min(TILE, n - i)), sums.data() + 9 * p);
  });
  Tensor out = fresh(lower, {9}, ScalarType::Double);
  double* to = static_cast<double*>(out.data_ptr());
  std::fill(to, to + 9, 0.0);
  for (int64_t p = 0; p < parts; ++p)
    for (int k = 0; k < 9; ++k) to[k] += sums[size_t(9 * p + k)];
  return out;
}

std::tuple<Tensor, Tensor> interval_moments_backward(Tensor grad, Tensor lower, Tensor upper) {
  expect(grad, "grad", {9}, ScalarType::Double), expect_like(upper, "upper", lower);
  Tensor dl = empty_of(lower), du = empty_of(upper);
  const int64_t n = lower.numel();
  const Dtype dtype = dtype_of(lower.scalar_type());
  const int64_t bytes = bytes_of(dtype);
  const auto gradient = with_kernels<MomentKernels>(dtype == Dtype::f64, [&](const auto& kernel) { return kernel.gradient; });
  const double* g = static_cast<const double*>(grad.data_ptr());
  const char *l = static_cast<const char*>(lower.data_ptr()), *u = static_cast<const char*>(upper.data_ptr());
  char *tl = static_cast<char*>(dl.data_ptr()), *tu = static_cast<char*>(du.data_ptr());
  parallel_items((n + TILE - 1) / TILE, 16, [&](int64_t p) {
    const int64_t i = p * TILE;
    gradient(g, l + i * bytes, u + i * bytes, dtype, int(std::min(TILE, n - i)), tl + i * bytes, tu + i * bytes);
  });
  return {dl, du};
}

}  // namespace
}  // namespace w2s::interval

W2S_IMPLEMENTATIONS(m) {
  m.add<&w2s::interval::interval_moments>("interval_moments");
  m.add<&w2s::interval::interval_moments_backward>("interval_moments_backward");
}
