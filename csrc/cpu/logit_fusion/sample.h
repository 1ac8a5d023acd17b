// What a draw takes and gives: fused_sample and dynamic_sample.
#pragma once

#include "cpu/logit_fusion/fusion.h"

namespace w2s {

// reference/logit_fusion/filters.py: the mass that completes a nucleus, and the least z - max z of a token that is likely
// enough. SLACK decides ties, which rounding would decide otherwise.
constexpr double SLACK = 0x1p-21;
inline double nucleus_goal(double top_p, double mass) { return (top_p - SLACK * std::min(top_p, 16 * (1 - top_p))) * mass; }
inline double least_distance(double min_p) { return std::log(min_p) - SLACK; }

struct FilterValues {
  int64_t top_k;
  double top_p, min_p;
  bool any(int64_t V) const { return (top_k > 0 && top_k < V) || top_p < 1 || min_p > 0; }
};

struct Draws {
  std::vector<double> uniform;
  FilterValues filters;
};

struct SampleOutput {
  Tensor token, logprob, lse, kept;
  bool f64;
  explicit SampleOutput(const Models& m)
      : token(m.rows(ScalarType::Long)), logprob(m.rows(m.acc())), lse(m.rows(m.acc())), kept(m.rows(ScalarType::Int)), f64(m.f64) {}
  void write(int64_t row, int64_t chosen, double logp, double log_sum, int64_t count) {
    static_cast<int64_t*>(token.data_ptr())[row] = chosen;
    static_cast<int32_t*>(kept.data_ptr())[row] = int32_t(count);
    put(logprob, f64, row, logp);
    put(lse, f64, row, log_sum);
  }
};

// Draws a token for every row (sample.cpp chooses the instruction set).
void draw_rows(const Fusion& f, const Draws& draws, SampleOutput& out);

}  // namespace w2s
