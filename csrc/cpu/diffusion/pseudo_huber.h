#pragma once

#include <vector>

#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace w2s {

// Residuals of pred and target, or of four tensors with coefficients a row (levels).
struct PseudoHuber {
  std::vector<Rows> tensors;
  std::vector<double> levels;  // [B, 4], or none
  int64_t B, D;
  double c;
  bool vector;
  Flat loss, inverse;         // forward
  std::vector<double> scale;  // backward: a row's factor of r, or of r / sqrt(r^2 + c^2)
  Rows out;
};

template <class A>
struct PseudoHuberKernels {  // pseudo_huber_kernel.cpp
  void (*loss)(const PseudoHuber& h);
  void (*gradient)(const PseudoHuber& h);
};

}  // namespace w2s
