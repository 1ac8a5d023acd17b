#pragma once

#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace w2s {
namespace norm {

struct Problem {
  int64_t B, N, S, C, first, last;
  Slots x;
  Flat weight, bias;
  int64_t sets, bias_sets;  // of weight and of bias: one for all slots, or one each
  bool rms;
  double eps;
};

template <class A>
struct NormKernels {  // qk_norm_kernel.cpp; total: dweight [sets, C] and dbias [bias_sets, C], each null if not needed
  void (*forward)(const Problem& p, const Slots& y, void* stats);
  void (*backward)(const Problem& p, const Slots& grad, const void* stats, const Slots& dx, A* dweight, A* dbias);
};

}  // namespace norm
}  // namespace w2s
