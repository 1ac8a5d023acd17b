// Products of tensors, and of operands as they are stored.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "cpu/gemm.h"
#include "cpu/tensors.h"

namespace w2s {

// A matrix whose rows lie in one piece each.
inline Operand matrix(const Tensor& t) {
  return {t.data_ptr(), dtype_of(t), t.size(0), t.size(1), t.size(0) > 1 ? t.stride(0) : t.size(1), 1};
}

// Whether a product of matrices of these takes them as they are: bfloat16, sums in float32, and a machine that multiplies bfloat16.
template <class A>
inline bool by_dots(std::initializer_list<Dtype> given) {
  return sizeof(A) == 4 && has_bf16_dot() && std::all_of(given.begin(), given.end(), [](Dtype d) { return d == Dtype::bf16; });
}

// c = a b, or c += a b: bfloat16 by the machine's own instructions where it has them, else by gemm.
template <class A>
inline void multiply(const Operand& a, const Operand& b, Target<A> c, bool add = false) {
  if constexpr (sizeof(A) == 4) {
    if (by_dots<A>({a.dtype, b.dtype})) return gemm_bf16(a, b, c, add);
  }
  gemm(a, b, c, A(1), add);
}

}  // namespace w2s
