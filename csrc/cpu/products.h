// Products of tensors, and of operands as they are stored.
#pragma once

#include "cpu/gemm.h"
#include "cpu/tensors.h"

namespace w2s {

// A matrix whose rows lie in one piece each.
inline Operand matrix(const Tensor& t) {
  return {t.data_ptr(), dtype_of(t), t.size(0), t.size(1), t.size(0) > 1 ? t.stride(0) : t.size(1), 1};
}

// Whether `multiply` takes them as they are: bfloat16, sums in float32, and a machine that multiplies bfloat16.
template <class A>
inline bool by_dots(Dtype a, Dtype b) {
  return sizeof(A) == 4 && a == Dtype::bf16 && b == Dtype::bf16 && has_bf16_dot();
}

// c = a b, or c += a b: bfloat16 by the machine's own instructions where it has them, else by gemm.
template <class A>
inline void multiply(const Operand& a, const Operand& b, Target<A> c, bool add = false) {
  if constexpr (sizeof(A) == 4) {
    if (by_dots<A>(a.dtype, b.dtype)) return gemm_bf16(a, b, c, add);
  }
  gemm(a, b, c, A(1), add);
}

}  // namespace w2s
