// What the kernels of s4_spectrum are handed; s4_spectrum_kernel.cpp says how a feature is run.
#pragma once

#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace w2s {

struct SpectrumCall {
  int64_t H, M, C, length;
  const double *a, *b, *p, *c, *dt;  // [H, M, 2], c [C, H, M, 2], dt [H]
  const double* y;                   // nodes i y [nodes]
  int64_t nodes() const { return (length + 1) / 2; }
  int64_t columns() const { return length / 2 + 1; }
};

struct SpectrumGradients {
  const void* grad;            // [C, H, columns, 2] of the accumulating type
  double *a, *b, *p, *c, *dt;  // those of the call
};

template <class A>
struct SpectrumKernels {
  void (*forward)(const SpectrumCall& call, int64_t feature, A* out);  // [C, H, columns, 2]
  void (*backward)(const SpectrumCall& call, int64_t feature, const SpectrumGradients& made);
};

}  // namespace w2s
