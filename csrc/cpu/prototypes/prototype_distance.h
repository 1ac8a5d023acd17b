// What is kept of a row of scores while its tiles go by, and what it becomes in the gradient; prototype_distance_kernel.cpp
// says how.
#pragma once

#include "cpu/kernels.h"

namespace w2s {

template <class A>
struct PrototypeTile {  // z = (raw + offset) inverse of `columns` prototypes from `first` on
  const A *raw, *offset;
  int64_t columns, first;
  A inverse;
};

template <class A>
struct PrototypeRow {
  A* top;          // the k largest so far, in falling order, and their indices; -infinity and -1 at first
  int64_t* index;
  int64_t k, label;  // label -1: none
  bool lse;
  A max, sum, at_label;  // of this tile, if the label is in it
  bool nan = false;
};

template <class A>
struct PrototypeKernels {
  void (*row)(const PrototypeTile<A>& t, PrototypeRow<A>& r);
  double (*square)(const void* x, Dtype dtype, int64_t n);
  void (*gradient)(const PrototypeTile<A>& t, A lse, A coef, A* out);  // coef exp(z - lse), with what pads the tile
};

}  // namespace w2s
