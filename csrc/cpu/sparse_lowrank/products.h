// Sparse products on plain matrices of A (float or double), for the ops of the family.
#pragma once

#include <memory>

#include "cpu/convert.h"
#include "cpu/parallel.h"
#include "cpu/products.h"
#include "cpu/sparse_lowrank/support.h"

namespace w2s::sparse {

// The values in walking order as A: a copy only where they are not so already.
template <class A>
struct Values {
  const A* data = nullptr;
  Tensor keep;
  Values(const Tensor& values, const Pattern& s);
};

// y [N, O] += x S^T + bias; stored instead of added where `add` is false. x: any dtype, columns contiguous.
template <class A>
void multiply(const Pattern& s, const Operand& x, const A* values, const A* bias, A* y, int64_t ld, bool add);

// Gradients. dx [N, I] (+)= g S (may be null); dv [K], in walking order, += g^T x at the support (may be null).
template <class A>
void multiply_back(const Pattern& s, const Operand& g, const Operand& x, const A* values, A* dx, int64_t ld, bool add, A* dv);

// Values in walking order into a tensor in storage order, rounded to its dtype.
template <class A>
void store_values(const Pattern& s, const A* walked, const Tensor& out);

// A dense matrix in bfloat16: where it lies, or rounded, with a factor of it, which is 1 then.
struct Low {
  Operand x;
  std::unique_ptr<uint16_t[]> memory;
  Low(const Operand& from, double& scale) : x(from) {
    if (from.dtype == Dtype::bf16) return;
    memory.reset(new uint16_t[size_t(from.rows * from.columns)]);
    const float* numbers = static_cast<const float*>(from.data);
    const int64_t count = from.rows * from.columns;
    const float factor = float(scale);
    parallel_ranges(count, 1 << 14, [&](int64_t begin, int64_t end) {
      kernels<ConvertKernels, float>().narrow_scaled(numbers + begin, end - begin, factor, Dtype::bf16, memory.get() + begin);
    });
    scale = 1, x.data = memory.get(), x.dtype = Dtype::bf16;
  }
};

// c (+)= scale a b. `low`: `by_dots` of everything that was given; then what was summed on
// the way is rounded to it first, as it is in PyTorch.
template <class A>
void product(const Operand& a, const Operand& b, Target<A> c, double scale, bool add, bool low);

// Rows [row, row + count) of W = scale B A + S into w [count, I]; the sparse values join while the panel is in cache.
template <class A>
void form_rows(const Pattern& s, const Operand& a, const Operand& b, double scale, const Tensor& values, int64_t row, int64_t count, A* w);

template <class A>
inline A number_at(const void* p, Dtype dtype, int64_t k) {
  if (dtype == Dtype::f32) return A(static_cast<const float*>(p)[k]);
  if (dtype == Dtype::f64) return A(static_cast<const double*>(p)[k]);
  const uint16_t x = static_cast<const uint16_t*>(p)[k];
  return A(dtype == Dtype::bf16 ? bf16_to_float(x) : half_to_float(x));
}

template <class A>
inline void narrow(const A* from, int64_t count, Dtype dtype, void* to) {
  for (int64_t i = 0; i < count; ++i) {
    if (dtype == Dtype::f32) static_cast<float*>(to)[i] = float(from[i]);
    else if (dtype == Dtype::f64) static_cast<double*>(to)[i] = double(from[i]);
    else if (dtype == Dtype::bf16) static_cast<uint16_t*>(to)[i] = float_to_bf16(float(from[i]));
    else static_cast<uint16_t*>(to)[i] = float_to_half(float(from[i]));
  }
}

inline Operand operand(const Tensor& t) {
  return {t.data_ptr(), dtype_of(t), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

}  // namespace w2s::sparse
