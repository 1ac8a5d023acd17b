// Rows of numbers from any dtype to the accumulating type and back.
#pragma once

#include "cpu/kernels.h"

namespace w2s {

template <class A>
struct ConvertKernels {  // n numbers; rounded to nearest even
  void (*widen)(const void* src, Dtype dtype, int64_t n, A* dst);
  void (*widen_scaled)(const void* src, Dtype dtype, int64_t n, A scale, A* dst);
  void (*narrow)(const A* src, int64_t n, Dtype dtype, void* dst);
  void (*narrow_scaled)(const A* src, int64_t n, A scale, Dtype dtype, void* dst);
  // sum_v += over the rows of z, for at most TILE columns
  void (*add_columns)(const void* z, Dtype dtype, int64_t rows, int64_t ld, int64_t n, A* sum);
};

}  // namespace w2s
