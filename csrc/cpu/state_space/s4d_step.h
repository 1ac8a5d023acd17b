// One feature of a step of a diagonal state space; s4d_step_kernel.cpp says how it is run.
#pragma once

#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace w2s {

struct StepCall {
  int64_t B, H, M;
  Flat u, a, b, c, d, state, y, after;  // [B, H], [H, M, 2], [H], [B, H, M, 2]; `after` in the accumulating type
};

template <class A>
struct StepKernels {
  void (*feature)(const StepCall& call, int64_t h);
};

}  // namespace w2s
