// What every op of the family takes, brought from tensors to plain numbers. Arguments were checked in Python.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/vec.h"

namespace w2s {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

inline Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::Double: return Dtype::f64;
    default: STD_TORCH_CHECK(false, "w2s_fast: logits must be float32, bfloat16, float16 or float64"); return Dtype::f32;
  }
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

// base, experts and anti-experts as rows.
struct Models {
  int64_t B = 0, V = 0;
  int K = 0;
  Rows base;
  std::vector<Rows> expert, anti;  // anti: none, one shared, or one an expert
  bool f64 = false;
  Tensor like;  // base; outputs are made like it

  Models(const Tensor& b, const Tensors& experts, const Tensors& antis, int64_t vocab_size)
      : B(b.size(0)), V(vocab_size), K(int(experts.size())), base(b), like(b) {
    for (const Tensor& t : experts) expert.emplace_back(t);
    for (const Tensor& t : antis) anti.emplace_back(t);
    f64 = base.dtype == Dtype::f64;
    for (const Rows& r : expert) f64 |= r.dtype == Dtype::f64;
    for (const Rows& r : anti) f64 |= r.dtype == Dtype::f64;
  }
  const Rows* anti_of(int k) const { return anti.empty() ? nullptr : &anti[anti.size() > 1 ? size_t(k) : 0]; }
  ScalarType acc() const { return f64 ? ScalarType::Double : ScalarType::Float; }
  Tensor rows(ScalarType type) const { return torch::stable::new_empty(like, {B}, type); }
  Tensor rows(ScalarType type, int64_t columns) const { return torch::stable::new_empty(like, {B, columns}, type); }
  Tensor nothing() const { return torch::stable::new_empty(like, {0}, acc()); }
};

// z = (base_weight base + sum_k w_k (experts_k - anti_k)) / temperature, with -inf outside the plausible set.
struct Fusion : Models {
  std::vector<double> weights, temperature;  // [B, K]; [B]
  double base_weight;
  int plausible;
  double level;

  Fusion(const Tensor& b, const Tensors& experts, const Tensors& antis, const std::optional<Tensor>& w,
         const std::vector<double>& weight_values, double base_w, const std::optional<Tensor>& t, double t_value,
         int64_t kind, double kind_value, int64_t vocab_size)
      : Models(b, experts, antis, vocab_size), base_weight(base_w), plausible(int(kind)), level(kind_value) {
    if (w) {
      weights = numbers(*w);
    } else {
      for (int64_t i = 0; i < B; ++i) weights.insert(weights.end(), weight_values.begin(), weight_values.end());
    }
    temperature = t ? numbers(*t) : std::vector<double>(size_t(B), t_value);
  }
};

#define W2S_FUSE_PARAMETERS                                                                                        \
  Tensor base, Tensors experts, Tensors anti, std::optional<Tensor> weights, std::vector<double> weight_values,    \
      double base_weight, std::optional<Tensor> temperature, double temperature_value, int64_t plausible,          \
      double plausible_value, int64_t vocab_size
#define W2S_FUSE_ARGUMENTS                                                                                   \
  base, experts, anti, weights, weight_values, base_weight, temperature, temperature_value, plausible,        \
      plausible_value, vocab_size

// Work is cut into (row, segment) items of fixed size, so that results do not depend on the number of threads.
constexpr int64_t SEGMENT = 8192;
inline int64_t segments(int64_t V) { return (V + SEGMENT - 1) / SEGMENT; }

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
