#pragma once

#include <vector>

#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace w2s {

// `first` is the conditional prediction, or the only one; levels hold a and b, once or a row.
struct DdimStep {
  int64_t B, D;
  Rows x, first, second, out;
  bool both;
  std::vector<double> levels;
  double guidance;
};

template <class A>
struct DdimKernels {  // ddim_step_kernel.cpp
  void (*step)(const DdimStep& s);
};

}  // namespace w2s
