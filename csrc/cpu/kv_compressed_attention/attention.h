// Attention of N queries over M keys on plain pointers; the compressed-attention ops and the whole path call these.
#pragma once

#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace w2s {
namespace attention {

using Heads = Slots;  // [B, tokens, H, D]

struct Problem {
  int64_t B, N, M, H, D;
  double scale;
  Heads q, k, v, out;
  void* softmax;  // [2, B, H, N] in the arithmetic's type: the largest score, the sum of exponentials above it
};

struct Gradients {
  Heads grad, dq, dk, dv;
  bool need_q, need_kv;
};

template <class A>
struct AttentionKernels {  // attention_kernel.cpp
  void (*forward)(const Problem& p);
  void (*backward)(const Problem& p, const Gradients& g);
};

}  // namespace attention
}  // namespace w2s
