// What the loss of weak-to-strong generalization takes; see w2s_fast/reference/linear_loss/confidence.py for the equations.
#pragma once

#include "cpu/linear_loss/kd.h"

namespace w2s {

// How the target is made of soft labels w and own prediction p.
struct Mixture {
  bool product;        // p^beta w^alpha in place of (1 - coef) w + coef guess
  double coef, alpha, beta;
  double share;        // of a row in the loss: 1 / B
  bool gradient;
};

struct ConfidenceRow {
  int64_t V;
  RowSource z, w;
  const void* shift;  // of the accumulating type, padded: taken from z before the guess
};

struct ConfidenceResult {
  double loss, outside;  // of soft labels off [0, 1] the first, otherwise NaN
};

// Two classes: pairs of logits, or single ones, which are z_1 beside z_0 = 0.
struct ConfidencePairs {
  Rows z, w;
  bool single;
};

constexpr int PAIRS = 256;  // rows of two classes done at a time

// confidence_kernel.cpp
template <class A>
struct ConfidenceKernels {
  double (*pair_scores)(const ConfidencePairs& s, int64_t first, int n, A* p0);
  ConfidenceResult (*pair_rows)(const Mixture& m, const ConfidencePairs& s, int64_t first, int n, double line, void* out,
                                Dtype type);
  // returns what `outside` does
  double (*columns)(const Rows& z, const Rows& w, int64_t first, int64_t end, int64_t V, A* p_sum, A* w_sum, A* buffers);
  // the first soft label off [0, 1] in rows [first, end), otherwise NaN
  double (*outside)(const Rows& w, int64_t first, int64_t end, int64_t V);
  // log(max(mean p, least) / mean w) of `groups` pairs of sums, each of `width`
  void (*shifts)(const A* sums, int64_t groups, int64_t width, int64_t V, int64_t B, double least, A* shift);
  ConfidenceResult (*row)(const Mixture& m, const ConfidenceRow& row, A* buffers, void* out, Dtype type);
};

}  // namespace w2s
