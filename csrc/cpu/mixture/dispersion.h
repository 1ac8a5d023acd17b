#pragma once

#include <vector>

#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace w2s {

struct Dispersion {
  int64_t n, C;
  Rows logits;
  Flat out;         // [n, 2]: the result, or its gradient in the backward
  Rows dlogits;
};

template <class A>
struct DispersionKernels {  // dispersion_kernel.cpp
  void (*run)(const Dispersion& s);
  void (*backward)(const Dispersion& s);
};

}  // namespace w2s
