// The host side of dynamic_fusion_weights, for dynamic_sample too.
#pragma once

#include "cpu/logit_fusion/dynamic.h"
#include "cpu/logit_fusion/fusion.h"

namespace w2s {

struct DynamicArguments {
  Rowwise base;
  RowwiseTensors experts, anti;
  double alpha_max;
  int64_t nodes, first_candidate;
  double tol;
  int64_t multi, direction_kind;
  std::optional<Strided> direction;
  bool average;
  std::optional<Strided> target_kl;
  int64_t vocab_size;
  static constexpr int arguments = 13;
};

struct DynamicTensors {
  Tensor alpha, target, achieved, saturated;
};

DynamicTensors solve_dynamic(const Tensor& base, const Dynamic& d);

}  // namespace w2s
