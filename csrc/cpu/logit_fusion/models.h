// What every op of the family takes, as kernels see it. Arguments were checked in Python.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace w2s {

struct FusionArguments;

// base, experts and anti-experts as rows.
struct Models {
  int64_t B = 0, V = 0;
  int K = 0;
  Rows base;
  std::vector<Rows> expert, anti;  // anti: none, one shared, or one an expert
  bool f64 = false;

  Models(const Tensor& base, const std::vector<Tensor>& experts, const std::vector<Tensor>& antis, int64_t vocab_size);
  const Rows* anti_of(int k) const { return anti.empty() ? nullptr : &anti[anti.size() > 1 ? size_t(k) : 0]; }
};

// z = (base_weight base + sum_k w_k (experts_k - anti_k)) / temperature, with -inf outside the plausible set.
struct Fusion : Models {
  std::vector<double> weights, temperature;  // [B, K]; [B]
  double base_weight;
  int plausible;
  double level;

  explicit Fusion(const FusionArguments& given);
};

template <class A>
struct FuseKernels {  // fuse_kernel.cpp; returns the log-sum-exps
  std::vector<double> (*run)(const Fusion& f, const Rows& out, bool need_lse, bool log_softmax);
};

struct StatsOutput {
  Flat lse, max, entropy, target_logp;
  int64_t* argmax;
};

template <class A>
struct StatsKernels {  // stats_kernel.cpp
  void (*run)(const Fusion& f, const int64_t* target, const StatsOutput& out);
};

struct Upstream {  // gradients with respect to z, see fuse_backward_kernel.cpp
  Rows grad;
  bool has_grad = false, subtract = false, need_params = false;
  std::vector<double> lse, row_a, row_b, coef;
  std::vector<int64_t> index;
  int64_t indices = 0;
};

template <class A>
struct FuseBackwardKernels {  // fuse_backward_kernel.cpp
  void (*run)(const Fusion& f, const Upstream& up, const Rows& dz, const Flat& dweights, const Flat& dtemperature);
};

// ---------------------------------------------------------------- draws, of fused_sample and dynamic_sample

// reference/logit_fusion/filters.py: the mass that completes a nucleus, and the least z - max z of a token that is likely
// enough. SLACK decides ties, which rounding would decide otherwise.
constexpr double SLACK = 0x1p-21;
inline double nucleus_goal(double top_p, double mass) { return (top_p - SLACK * std::min(top_p, 16 * (1 - top_p))) * mass; }
inline double least_distance(double min_p) { return std::log(min_p) - SLACK; }

struct FilterValues {
  int64_t top_k;
  double top_p, min_p;
  bool mass_alone(int64_t V) const { return top_p < 1 && min_p == 0 && !(top_k > 0 && top_k < V); }
  bool any(int64_t V) const { return (top_k > 0 && top_k < V) || top_p < 1 || min_p > 0; }
};

struct Draws {
  std::vector<double> uniform;
  FilterValues filters;
};

struct SampleOutput {
  int64_t* token;
  int32_t* kept;
  Flat logprob, lse;
  void write(int64_t row, int64_t chosen, double logp, double log_sum, int64_t count) const {
    token[row] = chosen;
    kept[row] = int32_t(count);
    logprob.put(row, logp);
    lse.put(row, log_sum);
  }
};

template <class A>
struct SampleKernels {  // sample_kernel.cpp
  void (*run)(const Fusion& f, const Draws& draws, const SampleOutput& out);
};

}  // namespace w2s
