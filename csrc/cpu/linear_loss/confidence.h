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

template <class A>
struct ConfidenceColumns {  // of B rows, with what `norm` made of each
  const Rows &z, &w;
  int64_t B;
  const A *top, *scale;
};

constexpr int SHIFTS = 512;  // columns whose shifts are made at a time
constexpr int PAIRS = 256;  // rows of two classes done at a time

// confidence_kernel.cpp
template <class A>
struct ConfidenceKernels {
  double (*pair_scores)(const ConfidencePairs& s, int64_t first, int n, A* p0);
  ConfidenceResult (*pair_rows)(const Mixture& m, const ConfidencePairs& s, int64_t first, int n, double line, void* out,
                                Dtype type);
  // of a row of z its largest (0 if that is -infinity) and 1 / sum exp(z - largest)
  void (*norm)(const Rows& z, int64_t row, int64_t V, A* top, A* scale);
  // shift = log(max(mean p, least) / mean w) of `n` columns from `first` on; returns how far a label is off [0, 1] at most
  A (*shifts)(const ConfidenceColumns<A>& s, int64_t first, int n, double least, A* shift);
  // the first soft label off [0, 1] in rows [first, end), otherwise NaN
  double (*outside)(const Rows& w, int64_t first, int64_t end, int64_t V);
  ConfidenceResult (*row)(const Mixture& m, const ConfidenceRow& row, A* buffers, void* out, Dtype type);
};

}  // namespace w2s
