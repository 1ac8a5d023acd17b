// The host side of the family: from tensors to models, and results.
#pragma once

#include "cpu/logit_fusion/models.h"
#include "cpu/tensors.h"

namespace w2s {

struct FusionArguments {
  Rowwise base;
  RowwiseTensors experts, anti;
  std::optional<Strided> weights;
  std::vector<double> weight_values;
  double base_weight;
  std::optional<Strided> temperature;
  double temperature_value;
  int64_t plausible;
  double plausible_value;
  int64_t vocab_size;
  static constexpr int arguments = 11;
};

// Results a row, made like the base.
struct RowResults {
  Tensor like;
  int64_t B;
  ScalarType wide;
  RowResults(const Tensor& base, const Models& m) : like(base), B(m.B), wide(wide_type(m.f64)) {}
  Tensor operator()(ScalarType type) const { return fresh(like, {B}, type); }
  Tensor operator()(ScalarType type, int64_t columns) const { return fresh(like, {B, columns}, type); }
  Tensor nothing() const { return fresh(like, {0}, wide); }
};

struct SampleTensors {
  Tensor token, logprob, lse, kept;
};

// Draws a token for every row of f.
SampleTensors draw_rows(const Tensor& base, const Fusion& f, const Draws& draws);

}  // namespace w2s
