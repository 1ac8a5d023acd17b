// The ground floor of every family: from tensors to plain memory, and the one place that decides about their layout.
//
// An implementation says by the type of a parameter how it reads it, and W2S_BOX makes that true before it runs:
//     Tensor    contiguous: copied if it is not. The default, so that what is forgotten costs a copy, not a wrong result.
//     Rowwise   columns next to each other, outer strides free: copied if the last dimension has another stride than 1.
//     Strided   as it comes; the implementation honours every stride.
// Each of them also as std::optional and as a list (Tensors, RowwiseTensors).
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/vec.h"

namespace w2s {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

struct Rowwise : Tensor {};
struct Strided : Tensor {};
struct RowwiseTensors : Tensors {};

inline Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
inline bool has_rows(const Tensor& t) {
  const int64_t n = t.dim();
  return n == 0 || t.size(n - 1) <= 1 || t.stride(n - 1) == 1;
}

// What a parameter of type T is given by the dispatcher, and how that becomes a T.
template <class T>
struct Parameter {
  using Given = T;
  static T take(T given) { return given; }
};
template <>
struct Parameter<Tensor> {
  using Given = Tensor;
  static Tensor take(const Tensor& t) { return packed(t); }
};
template <>
struct Parameter<Rowwise> {
  using Given = Tensor;
  static Rowwise take(const Tensor& t) { return {has_rows(t) ? t : torch::stable::contiguous(t)}; }
};
template <>
struct Parameter<Strided> {
  using Given = Tensor;
  static Strided take(const Tensor& t) { return {t}; }
};
template <class T>
  requires std::is_base_of_v<Tensor, T>
struct Parameter<std::optional<T>> {
  using Given = std::optional<Tensor>;
  static std::optional<T> take(const Given& t) {
    if (!t) return std::nullopt;
    return Parameter<T>::take(*t);
  }
};
template <>
struct Parameter<Tensors> {
  using Given = Tensors;
  static Tensors take(Tensors list) {
    for (Tensor& t : list) t = packed(t);
    return list;
  }
};
template <>
struct Parameter<RowwiseTensors> {
  using Given = Tensors;
  static RowwiseTensors take(Tensors list) {
    for (Tensor& t : list) t = Parameter<Rowwise>::take(t);
    return {std::move(list)};
  }
};

template <auto function>
struct Boundary;
template <class R, class... P, R (*function)(P...)>
struct Boundary<function> {
  static R call(typename Parameter<P>::Given... given) { return function(Parameter<P>::take(std::move(given))...); }
};

#define W2S_BOX(function) TORCH_BOX((&::w2s::Boundary<function>::call))

inline Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::Double: return Dtype::f64;
    default: STD_TORCH_CHECK(false, "w2s_fast: logits must be float32, bfloat16, float16 or float64"); return Dtype::f32;
  }
}

template <class T>
constexpr ScalarType scalar_of = std::is_same_v<T, int64_t>    ? ScalarType::Long
                                 : std::is_same_v<T, int32_t>  ? ScalarType::Int
                                 : std::is_same_v<T, uint16_t> ? ScalarType::UInt16
                                 : std::is_same_v<T, uint8_t>  ? ScalarType::Byte
                                                               : ScalarType::Bool;

// The integers or booleans of a contiguous tensor.
template <class T>
const T* integers(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == scalar_of<T>, "w2s_fast: a tensor of integers or booleans has another dtype than the op's");
  return static_cast<const T*>(t.data_ptr());
}

// The same where each is a place in [0, size) to read or write: under torch.compile nobody has looked at them yet.
inline const int64_t* places(const Tensor& t, int64_t size, const char* argument) {
  const int64_t* found = integers<int64_t>(t);
  for (int64_t i = 0; i < t.numel(); ++i)
    STD_TORCH_CHECK(found[i] >= 0 && found[i] < size,
                    std::string("w2s_fast: ") + argument + " must be in [0, " + std::to_string(size) + "), got " + std::to_string(found[i]) + ".");
  return found;
}

// One [B, >= V] tensor: rows of any stride, columns next to each other.
struct Rows {
  char* data = nullptr;
  int64_t stride = 0, bytes = 4;
  Dtype dtype = Dtype::f32;
  Rows() = default;
  explicit Rows(const Tensor& t) : data(static_cast<char*>(t.data_ptr())), dtype(dtype_of(t.scalar_type())) {
    bytes = bytes_of(dtype);
    stride = t.size(0) > 1 ? t.stride(0) * bytes : 0;
  }
  void* at(int64_t row, int64_t column) const { return data + row * stride + column * bytes; }
};

// A tensor's numbers as doubles, row by row (a row vector, weights [B, K]); any strides.
inline std::vector<double> numbers(const Tensor& t) {
  const int64_t rows = t.size(0), columns = t.dim() > 1 ? t.size(1) : 1;
  const int64_t down = t.stride(0), across = t.dim() > 1 ? t.stride(1) : 0;
  std::vector<double> found(size_t(rows * columns));
  const Dtype dtype = dtype_of(t.scalar_type());
  const void* data = t.data_ptr();
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t at = i * down + j * across;
      double x;
      if (dtype == Dtype::f32) x = static_cast<const float*>(data)[at];
      else if (dtype == Dtype::f64) x = static_cast<const double*>(data)[at];
      else if (dtype == Dtype::bf16) x = bf16_to_float(static_cast<const uint16_t*>(data)[at]);
      else x = half_to_float(static_cast<const uint16_t*>(data)[at]);
      found[size_t(i * columns + j)] = x;
    }
  return found;
}

inline std::vector<double> numbers(const std::optional<Tensor>& t) { return t ? numbers(*t) : std::vector<double>(); }

// Work is cut into (row, segment) items of fixed size, so that results do not depend on the number of threads.
constexpr int64_t SEGMENT = 8192;
inline int64_t segments(int64_t V) { return (V + SEGMENT - 1) / SEGMENT; }

// Items of `elements` each that a thread is woken for: waking it takes as long as going over some ten thousand elements.
constexpr int64_t WORTH = 16384;
inline int64_t grain_of(int64_t elements) { return std::max<int64_t>(1, WORTH / std::max<int64_t>(elements, 1)); }
inline int64_t segment_grain(int64_t row) { return grain_of(std::min(row, SEGMENT)); }

// Calls work(i) for i in [0, count), in parallel.
template <class F>
inline void parallel_items(int64_t count, int64_t grain, const F& work) {
  torch::stable::parallel_for(0, count, grain, [&work](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(i);
  });
}

inline void put(const Tensor& out, bool f64, int64_t i, double x) {
  if (f64) static_cast<double*>(out.data_ptr())[i] = x;
  else static_cast<float*>(out.data_ptr())[i] = float(x);
}

}  // namespace w2s
