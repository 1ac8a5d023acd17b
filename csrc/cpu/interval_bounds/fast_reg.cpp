// interval_moments and its gradient: one read of the bounds, then one read and one write. Sums are float64, of fixed
// parts in order, so that they do not depend on threads.
#include "cpu/tensors.h"

#define W2S_KERNEL "cpu/interval_bounds/fast_reg_kernel.h"
#include "cpu/for_each_target.h"

namespace w2s::interval {
namespace {

constexpr int64_t TILE = 1024, PART = 64 * TILE;

int64_t count_of(const Tensor& t) {
  int64_t n = 1;
  for (int64_t d = 0; d < t.dim(); ++d) n *= t.size(d);
  return n;
}

Tensor interval_moments(Tensor lower, Tensor upper) {
  const int64_t n = count_of(lower), parts = (n + PART - 1) / PART;
  const Dtype dtype = dtype_of(lower.scalar_type());
  const int64_t bytes = bytes_of(dtype);
  const char *l = static_cast<const char*>(lower.data_ptr()), *u = static_cast<const char*>(upper.data_ptr());
  std::vector<double> sums(static_cast<size_t>(9 * parts), 0.0);
  parallel_items(parts, 1, [&](int64_t p) {
    for (int64_t i = p * PART; i < std::min(n, (p + 1) * PART); i += TILE)
      W2S_DISPATCH(moments)(l + i * bytes, u + i * bytes, dtype, int(std::min(TILE, n - i)), sums.data() + 9 * p);
  });
  Tensor out = torch::stable::new_empty(lower, {9}, ScalarType::Double);
  double* to = static_cast<double*>(out.data_ptr());
  std::fill(to, to + 9, 0.0);
  for (int64_t p = 0; p < parts; ++p)
    for (int k = 0; k < 9; ++k) to[k] += sums[size_t(9 * p + k)];
  return out;
}

std::tuple<Tensor, Tensor> interval_moments_backward(Tensor grad, Tensor lower, Tensor upper) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < lower.dim(); ++d) shape.push_back(lower.size(d));
  Tensor dl = torch::stable::new_empty(lower, shape), du = torch::stable::new_empty(upper, shape);
  const int64_t n = count_of(lower);
  const Dtype dtype = dtype_of(lower.scalar_type());
  const int64_t bytes = bytes_of(dtype);
  const double* g = static_cast<const double*>(grad.data_ptr());
  const char *l = static_cast<const char*>(lower.data_ptr()), *u = static_cast<const char*>(upper.data_ptr());
  char *tl = static_cast<char*>(dl.data_ptr()), *tu = static_cast<char*>(du.data_ptr());
  parallel_items((n + TILE - 1) / TILE, 16, [&](int64_t p) {
    const int64_t i = p * TILE;
    W2S_DISPATCH(moments_gradient)(g, l + i * bytes, u + i * bytes, dtype, int(std::min(TILE, n - i)), tl + i * bytes, tu + i * bytes);
  });
  return {dl, du};
}

}  // namespace
}  // namespace w2s::interval

STABLE_TORCH_LIBRARY_IMPL(w2s_fast, CPU, m) {
  m.impl("interval_moments", W2S_BOX(&w2s::interval::interval_moments));
  m.impl("interval_moments_backward", W2S_BOX(&w2s::interval::interval_moments_backward));
}
