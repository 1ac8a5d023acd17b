// What every op of the family takes, brought from tensors to plain numbers. Arguments were checked in Python.
#pragma once

#include "cpu/tensors.h"

namespace w2s {

// base, experts and anti-experts as rows.
struct Models {
  int64_t B = 0, V = 0;
  int K = 0;
  Rows base;
  std::vector<Rows> expert, anti;  // anti: none, one shared, or one an expert
  bool f64 = false;
  Tensor like;  // base; outputs are made like it

  Models(const Tensor& b, const Tensors& experts, const Tensors& antis, int64_t vocab_size)
      : B(b.size(0)), V(vocab_size), K(int(experts.size())), base(b), like(b) {
    for (const Tensor& t : experts) expert.emplace_back(t);
    for (const Tensor& t : antis) anti.emplace_back(t);
    f64 = base.dtype == Dtype::f64;
    for (const Rows& r : expert) f64 |= r.dtype == Dtype::f64;
    for (const Rows& r : anti) f64 |= r.dtype == Dtype::f64;
  }
  const Rows* anti_of(int k) const { return anti.empty() ? nullptr : &anti[anti.size() > 1 ? size_t(k) : 0]; }
  ScalarType acc() const { return f64 ? ScalarType::Double : ScalarType::Float; }
  Tensor rows(ScalarType type) const { return torch::stable::new_empty(like, {B}, type); }
  Tensor rows(ScalarType type, int64_t columns) const { return torch::stable::new_empty(like, {B, columns}, type); }
  Tensor nothing() const { return torch::stable::new_empty(like, {0}, acc()); }
};

// z = (base_weight base + sum_k w_k (experts_k - anti_k)) / temperature, with -inf outside the plausible set.
struct Fusion : Models {
  std::vector<double> weights, temperature;  // [B, K]; [B]
  double base_weight;
  int plausible;
  double level;

  Fusion(const Tensor& b, const Tensors& experts, const Tensors& antis, const std::optional<Tensor>& w,
         const std::vector<double>& weight_values, double base_w, const std::optional<Tensor>& t, double t_value,
         int64_t kind, double kind_value, int64_t vocab_size)
      : Models(b, experts, antis, vocab_size), base_weight(base_w), plausible(int(kind)), level(kind_value) {
    if (w) {
      weights = numbers(*w);
    } else {
      for (int64_t i = 0; i < B; ++i) weights.insert(weights.end(), weight_values.begin(), weight_values.end());
    }
    temperature = t ? numbers(*t) : std::vector<double>(size_t(B), t_value);
  }
};

#define W2S_FUSE_PARAMETERS                                                                                        \
  Rowwise base, RowwiseTensors experts, RowwiseTensors anti, std::optional<Strided> weights,                        \
      std::vector<double> weight_values, double base_weight, std::optional<Strided> temperature,                    \
      double temperature_value, int64_t plausible, double plausible_value, int64_t vocab_size
#define W2S_FUSE_ARGUMENTS                                                                                   \
  base, experts, anti, weights, weight_values, base_weight, temperature, temperature_value, plausible,        \
      plausible_value, vocab_size

}  // namespace w2s
