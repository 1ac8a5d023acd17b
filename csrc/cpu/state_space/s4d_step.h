// A step of a diagonal state space as its kernel takes it; s4d_step_kernel.cpp says how it is run.
#pragma once

#include "cpu/kernels.h"

namespace w2s {

template <class A>
struct StepCall {
  int64_t H, M;
  const A *u, *a, *b, *c, *d, *state;  // [B, H], [H, M, 2], [H], [B, H, M, 2]
  A *y, *after;                        // like u and state
};

template <class A>
struct StepKernels {
  void (*rows)(const StepCall<A>& call, int64_t begin, int64_t end);  // of the B H samples' features
};

}  // namespace w2s
