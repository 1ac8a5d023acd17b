// What host and kernels of lora_linear say to each other.
#pragma once

#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace w2s {

// y = gain z + bias of rows whose z has been summed; without a gain 1, without a bias 0. gain and bias: of the sums' type.
struct LoraFinish {
  int64_t N, O;
  const void *sums, *gain, *bias;
  Rows y, z;  // z: where the sums are kept as well, rounded; without memory where nobody wants them
};

// g = gain grad, rounded, and sums[o] of grad z over the rows, where z is.
struct LoraGain {
  int64_t N, O;
  Rows grad, z, g;
  const void* gain;
  double* sums;
};

template <class A>
struct LoraKernels {  // lora_linear_kernel.cpp
  void (*finish)(const LoraFinish& s);
  void (*gain)(const LoraGain& s);
};

}  // namespace w2s
