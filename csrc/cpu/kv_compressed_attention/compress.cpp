#include "cpu/kv_compressed_attention/compression.h"

namespace w2s {
namespace compress {

Problem::Problem(const Tensor& x, int64_t first, const CompressionArguments& c)
    : B(x.size(0)), C(x.size(3)), first(first), groups(x.size(2) - first), height(c.height), width(c.width), ratio(c.ratio),
      stride(c.mode == "stride"), normalize(c.normalize), weight(c.weight), bias(c.bias), norm_weight(c.norm_weight),
      norm_bias(c.norm_bias), f64(is_double(x)) {
  if (c.weight) sets = c.weight->size(0);
  if (c.bias) bias_sets = c.bias->size(0);
  const bool sums = c.mode == "conv" || c.mode == "mean";
  const auto each = [&](int64_t given) { return given == 1 ? 1 : groups; };
  expect(c.weight, "weight", {each(sets), C, ratio, ratio}), expect(c.bias, "bias", {each(bias_sets), C});
  expect(c.norm_weight, "norm_weight", {C}), expect(c.norm_bias, "norm_bias", {C});
  across = width / ratio;
  M = stride ? (height * width + ratio - 1) / ratio : (height / ratio) * across;
  T = sums ? ratio * ratio : 1;
  factor = c.mode == "mean" ? 1.0 / double(T) : 1.0;
}

namespace {

// The sums of all rows, put into the parameters' shapes.
template <class A>
Parameters split(const Problem& p, const Tensor& like, const A* total, bool need) {
  const int64_t C = p.C, T = p.T, sets = p.sets;
  const ScalarType type = wide_type(p.f64);
  const bool norm = need && p.normalize;
  Parameters found{fresh(like, need && p.weight ? std::vector<int64_t>{sets, C, p.ratio, p.ratio} : std::vector<int64_t>{0}, type),
                   fresh(like, need && p.bias ? std::vector<int64_t>{p.bias_sets, C} : std::vector<int64_t>{0}, type),
                   fresh(like, {norm && p.norm_weight ? C : 0}, type), fresh(like, {norm && p.norm_bias ? C : 0}, type)};
  if (!need) return found;
  if (p.weight) {
    A* w = static_cast<A*>(found.weight.data_ptr());
    for (int64_t s = 0; s < sets; ++s)
      for (int64_t t = 0; t < T; ++t)
        for (int64_t c = 0; c < C; ++c) w[(s * C + c) * T + t] = total[(s * T + t) * C + c];
    total += sets * T * C;
  }
  if (p.bias) {
    std::memcpy(found.bias.data_ptr(), total, size_t(p.bias_sets * C) * sizeof(A));
    total += p.bias_sets * C;
  }
  if (norm && p.norm_weight) std::memcpy(found.norm_weight.data_ptr(), total, size_t(C) * sizeof(A));
  if (norm && p.norm_bias) std::memcpy(found.norm_bias.data_ptr(), total + C, size_t(C) * sizeof(A));
  return found;
}

}  // namespace

void forward(const Problem& p, const Slots& x, double eps, const Slots& kv, void* stats) {
  with_kernels<CompressKernels>(p.f64, [&](const auto& kernel) { kernel.forward(p, x, eps, kv, stats); });
}

Parameters backward(const Problem& p, const Tensor& like, const Slots& grad, const Slots& x, const void* stats, const Slots& dx,
                    bool need_x, bool need_params) {
  return with_type(p.f64, [&]<class A>(A) {
    const int64_t weights = p.weight ? p.sets * p.T : 0, biases = p.bias ? p.bias_sets : 0;
    std::vector<A> total(size_t((weights + biases + 2) * p.C + 64));
    kernels<CompressKernels, A>().backward(p, grad, x, stats, dx, need_x, need_params, total.data());
    return split<A>(p, like, total.data(), need_params);
  });
}

}  // namespace compress
}  // namespace w2s
