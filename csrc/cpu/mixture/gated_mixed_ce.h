#pragma once

#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace w2s {

struct GatedMixedCe {
  int64_t n, C, ignored;
  Rows a, b;
  const int64_t* target;
  Flat gate;
  double factor;
  bool logits;  // of the mixed logits, not the mixed losses
  Rows da, db;  // null if not wanted
  Flat dgate;
};

template <class A>
struct GatedMixedCeKernels {  // gated_mixed_ce_kernel.cpp
  double (*loss)(const GatedMixedCe& s);
};

}  // namespace w2s
