// What the kernels of vandermonde_log are handed; vandermonde_log_kernel.cpp says how a feature is run.
#pragma once

#include "cpu/kernels.h"

namespace w2s {

struct VandermondeCall {
  int64_t H, M, C, L;
  const double *c, *x;  // [C, H, M, 2], [H, M, 2]
};

template <class A>
struct VandermondeKernels {
  void (*forward)(const VandermondeCall& call, int64_t feature, A* out);  // [C, H, L]
  // dc and dx like c and x
  void (*backward)(const VandermondeCall& call, int64_t feature, const A* grad, double* dc, double* dx);
};

}  // namespace w2s
