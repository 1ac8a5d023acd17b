// What rows of distillation are made of; see w2s_fast/reference/linear_loss/distillation.py for the equations.
#pragma once

#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace w2s {

enum KdKind : int64_t { FKL, RKL, JSD, SCE, CE_SOFT, PRODUCT, COSINE };
enum KdForm : int64_t { LOGITS, PROBS, TOPK, LINEAR, LINEAR_BIAS };

// What all rows have in common.
struct KdLoss {
  int64_t V;
  KdKind kind;
  double tau, beta, power;
  bool hard, gradient, statistics;
};

struct RowTeacher {
  KdForm form;
  double share;
  RowSource values;  // z, q, or the log-probabilities of ids
  const int64_t* ids = nullptr;
  int64_t K = 0;
};

struct KdRow {
  const KdLoss& loss;
  double coef_kd, coef_ce;
  int64_t target;
  RowSource student;
  const RowTeacher* teachers;
  int count;
};

struct KdResult {
  double kd = 0, ce = 0, entropy_student = 0, entropy_teacher = 0, agree = 0;
};

// Short rows, as many as a vector has lanes at a time.
struct KdSource {
  KdForm form;
  double share;
  Rows rows;
};

struct KdRows {
  const KdLoss& loss;
  const int64_t* index;  // rows that count
  const double *coef_kd, *coef_ce;
  const int64_t* target;
  Rows student;
  const KdSource* teachers;  // logits or probabilities
  int count;
  Rows gradient;  // written
};

constexpr int64_t KD_BUFFERS = 6;  // rows of working memory
inline int64_t kd_width(int64_t V) { return (V + 15) / 16 * 16 + 16; }  // elements of one
// Rows of at most this many classes are short: a vector is as good as full from here on.
constexpr int64_t KD_SHORT = 64;
inline int64_t kd_short_width(int64_t V) { return 16 * V + 16; }  // elements of a working row of every lane

// kd_kernel.cpp
template <class A>
struct KdKernels {
  KdResult (*row)(const KdRow& row, A* buffers, void* out, Dtype type);
  void (*short_rows)(const KdRows& rows, int64_t first, int64_t end, A* buffers, A* kd, A* ce);
};

}  // namespace w2s
