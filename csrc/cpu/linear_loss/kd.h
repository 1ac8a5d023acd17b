// What a row of distillation is made of; see w2s_fast/reference/linear_loss/distillation.py for the equations.
#pragma once

#include "cpu/linear_loss/rows.h"
#include "cpu/logit_fusion/fusion.h"

namespace w2s {

enum KdKind : int64_t { FKL, RKL, JSD, SCE, CE_SOFT, PRODUCT };
enum KdForm : int64_t { LOGITS, PROBS, TOPK, LINEAR, LINEAR_BIAS };

struct RowTeacher {
  KdForm form;
  double share;
  RowSource values;  // z, q, or the log-probabilities of ids
  const int64_t* ids = nullptr;
  int64_t K = 0;
};

struct KdRow {
  int64_t V;
  KdKind kind;
  double tau, beta, power, coef_kd, coef_ce;
  int64_t target;  // -1: no cross-entropy
  bool gradient, statistics;
  RowSource student;
  const RowTeacher* teachers;
  int count;
};

struct KdResult {
  double kd = 0, ce = 0, entropy_student = 0, entropy_teacher = 0, agree = 0;
};

constexpr int64_t KD_BUFFERS = 6;  // rows of working memory of kd_row
inline int64_t kd_width(int64_t V) { return (V + 15) / 16 * 16 + 16; }  // elements of one

}  // namespace w2s
