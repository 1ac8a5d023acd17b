#pragma once

#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace w2s {

enum class Score : int8_t { softmax, topk, sigmoid };

// Arrays are of the accumulating type A, [T, k], [T] and [E]; null: not given, or not wanted.
template <class A>
struct MoeRoute {
  int64_t T, E, k;
  Score score;
  bool renormalize;
  Rows logits;
  Flat bias;             // any dtype
  const uint8_t* mask;   // null: all rows are real
  A *weights, *lse, *psum;
  int64_t *indices, *counts, *tokens;
};
template <class A>
struct MoeRouteGradient {
  const A *weights, *lse, *psum;  // of the results; each may be null
  Rows dlogits;
};

template <class A>
struct MoeRouteKernels {  // moe_route_kernel.cpp
  void (*forward)(const MoeRoute<A>& s);
  void (*backward)(const MoeRoute<A>& s, const MoeRouteGradient<A>& grad);
};

}  // namespace w2s
