// A sentence of the edit-invariant loss; see w2s_fast/reference/linear_loss/eisl.py for the equations.
#pragma once

#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace w2s {

struct Sentence {
  int64_t T, U;                  // output positions, target tokens
  const bool *source, *target;   // which count; null: all
  double tau, floor;
  bool logsumexp;
};

struct Ngram {
  int64_t n;
  double scale;        // of L_n in the loss, divided by the number of sentences
  RowSource noise;     // [T - n + 1, U - n + 1] of this sentence, or null
};

inline int64_t eisl_width(int64_t U) { return (U + 15) / 16 * 16 + 16; }  // elements of a row of raw, and of dcost
inline int64_t eisl_scratch(int64_t T, int64_t U) { return (4 * T + 4) * eisl_width(U); }

// eisl_kernel.cpp
template <class A>
struct EislKernels {
  double (*row)(A* z, int64_t V, const A* bias, const int64_t* y, const bool* kept, int64_t U, A* raw);
  double (*sentence)(const Sentence& given, const Ngram* ngrams, int64_t count, double ce_share, A* raw, A* scratch,
                     double* losses);
  void (*gradient)(A* z, int64_t V, double inverse, const int64_t* y, const bool* kept, int64_t U, const A* a, Dtype dtype);
};

}  // namespace w2s
