// What the kernels of s4d_conv are handed: one feature of a diagonal state space; s4d_conv_kernel.cpp says how it is run.
#pragma once

#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace w2s {

struct SpaceCall {
  int64_t B, H, L, M;
  Flat u;                             // [B, H, L]
  const double *z, *b, *c, *d;        // [H, M, 2], [H]
  const double* state = nullptr;      // [B, H, M, 2], or none
};

struct SpaceGradients {
  Flat grad, du;                      // [B, H, L]
  const double* after = nullptr;      // gradient of the state after u, [B, H, M, 2], or none
  double *dz, *db, *dc, *dd, *state;  // those of the call; [B, H, M, 2], or none
};

template <class A>
struct SpaceKernels {
  void (*forward)(const SpaceCall& call, int64_t feature, const Flat& y, const Flat& after);
  void (*backward)(const SpaceCall& call, int64_t feature, const SpaceGradients& made);
};

}  // namespace w2s
