// Views of memory that kernels take, without torch. What makes one of a tensor stands in tensors.h.
#pragma once

#include "cpu/vec.h"

namespace torch {
namespace stable {
class Tensor;
}
}  // namespace torch

namespace w2s {

using torch::stable::Tensor;

// One [B, >= V] tensor: rows of any stride, columns next to each other.
struct Rows {
  char* data = nullptr;
  int64_t stride = 0, bytes = 4;
  Dtype dtype = Dtype::f32;
  Rows() = default;
  explicit Rows(const Tensor& t);
  void* at(int64_t row, int64_t column) const { return data + row * stride + column * bytes; }
};

// A contiguous tensor's memory; null: there is none.
struct Flat {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t count = 0;
  Flat() = default;
  explicit Flat(const Tensor& t);
  template <class Optional>
    requires requires(const Optional& t) { t.has_value(); }
  explicit Flat(const Optional& t) {
    if (t) *this = Flat(static_cast<const Tensor&>(*t));
  }
  explicit operator bool() const { return data != nullptr; }
  // of the accumulating type
  void put(int64_t i, double x) const {
    if (dtype == Dtype::f64) static_cast<double*>(data)[i] = x;
    else static_cast<float*>(data)[i] = float(x);
  }
};

// [B, tokens, slots, C], or [B, tokens, C], of any strides with C contiguous; strides in bytes.
struct Slots {
  char* data = nullptr;
  int64_t batch = 0, token = 0, slot = 0, bytes = 4;
  Dtype dtype = Dtype::f32;
  Slots() = default;
  explicit Slots(const Tensor& t);
  template <class Optional>
    requires requires(const Optional& t) { t.has_value(); }
  explicit Slots(const Optional& t) {
    if (t) *this = Slots(static_cast<const Tensor&>(*t));
  }
  // one slot of C = H D channels seen as H slots of D: the heads of attention
  Slots heads(int64_t which, int64_t D) const {
    Slots h = *this;
    h.data += which * slot;
    h.slot = D * bytes;
    return h;
  }
  char* at(int64_t b, int64_t n, int64_t s) const { return data + b * batch + n * token + s * slot; }
  char* at(int64_t b, int64_t n) const { return data + b * batch + n * token; }
};

// A row of numbers in any dtype, and a bias in the accumulating type that is added to it, or null.
struct RowSource {
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;
  const void* bias = nullptr;
};

}  // namespace w2s
