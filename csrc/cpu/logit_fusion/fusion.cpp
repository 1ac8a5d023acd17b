#include "cpu/logit_fusion/fusion.h"

namespace w2s {

Models::Models(const Tensor& b, const Tensors& experts, const Tensors& antis, int64_t vocab_size)
    : B(b.size(0)), V(vocab_size), K(int(experts.size())), base(b) {
  for (const Tensor& t : experts) expert.emplace_back(t);
  for (const Tensor& t : antis) anti.emplace_back(t);
  for (const Tensors* all : {&experts, &antis})
    for (const Tensor& t : *all)
      check(t.dim() == 2 && t.size(0) == B && t.size(1) >= V, "experts and anti-experts must have the rows of base and a column for each token");
  check(b.dim() == 2 && b.size(1) >= V, "base must have a column for each token");
  f64 = base.dtype == Dtype::f64;
  for (const Rows& r : expert) f64 |= r.dtype == Dtype::f64;
  for (const Rows& r : anti) f64 |= r.dtype == Dtype::f64;
}

Fusion::Fusion(const FusionArguments& given)
    : Models(given.base, given.experts, given.anti, given.vocab_size), base_weight(given.base_weight),
      plausible(int(given.plausible)), level(given.plausible_value) {
  if (given.weights) {
    expect(*given.weights, "weights", {B, K});
    weights = numbers(*given.weights);
  } else {
    for (int64_t i = 0; i < B; ++i) weights.insert(weights.end(), given.weight_values.begin(), given.weight_values.end());
  }
  if (given.temperature) expect(*given.temperature, "temperature", {B});
  temperature = given.temperature ? numbers(*given.temperature) : std::vector<double>(size_t(B), given.temperature_value);
}

}  // namespace w2s
