// What host and kernels of lora_linear say to each other.
#pragma once

#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace w2s {

// y = gain z + bias of z = sums + h^T low, where z's first part has been summed; without a gain 1, without a bias 0. gain, bias,
// h and low: of the sums' type.
struct LoraFinish {
  int64_t N, O, r;
  Rows sums;
  const void *gain, *bias;
  const void* h;    // [r, N], its rows `pitch` apart
  int64_t pitch;
  const void* low;  // panels of LORA_PANEL columns, [r, LORA_PANEL] each, zeros behind the last column; r = 0: no memory
  Rows y, z;        // z: where z is kept as well, rounded; without memory where nobody wants it
};
constexpr int64_t LORA_PANEL = 256;  // columns: a panel of 16 rows and those of z stay in L1

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
