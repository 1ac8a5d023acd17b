// The ground floor of hosts: from tensors to what kernels take.
#pragma once

#include <algorithm>
#include <memory>
#include <string>

#include "cpu/kernels.h"
#include "cpu/op.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace w2s {

inline Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::Double: return Dtype::f64;
    default: throw Refusal("tensors of real numbers must be float32, bfloat16, float16 or float64");
  }
}
Dtype dtype_of(const Tensor& t);

template <class T>
constexpr ScalarType scalar_type = std::is_same_v<T, double>     ? ScalarType::Double
                                   : std::is_same_v<T, float>    ? ScalarType::Float
                                   : std::is_same_v<T, int64_t>  ? ScalarType::Long
                                   : std::is_same_v<T, int32_t>  ? ScalarType::Int
                                   : std::is_same_v<T, uint16_t> ? ScalarType::UInt16
                                   : std::is_same_v<T, uint8_t>  ? ScalarType::Byte
                                                                 : ScalarType::Bool;

inline bool is_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }
// What the results of a call on t are accumulated in.
inline ScalarType wide_type(bool f64) { return f64 ? ScalarType::Double : ScalarType::Float; }
inline ScalarType wide_type(const Tensor& t) { return wide_type(is_double(t)); }

inline std::vector<int64_t> shape_of(const Tensor& t) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < t.dim(); ++d) shape.push_back(t.size(d));
  return shape;
}
// Uninitialised and contiguous, of the dtype of `like` if no other is given. torch::stable::new_empty looks its op up by name
// at every call, which takes longer than a small kernel.
Tensor fresh(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape, std::optional<ScalarType> type = std::nullopt);
// Of t's shape; of no elements where it is not wanted.
inline Tensor empty_of(const Tensor& t, bool wanted = true) {
  return fresh(t, wanted ? shape_of(t) : std::vector<int64_t>{0});
}

// What one op leaves for another, which reads it by that shape: a hook on saved tensors may hand back something else. A dtype
// is named where its bytes are read as such.
void expect(const Tensor& t, const char* argument, torch::headeronly::IntHeaderOnlyArrayRef shape, std::optional<ScalarType> type = std::nullopt);
inline void expect(const std::optional<Tensor>& t, const char* argument, torch::headeronly::IntHeaderOnlyArrayRef shape,
                   std::optional<ScalarType> type = std::nullopt) {
  if (t) expect(*t, argument, shape, type);
}
// Two tensors of one shape and dtype.
inline void expect_like(const Tensor& t, const char* argument, const Tensor& other) {
  expect(t, argument, shape_of(other), other.scalar_type());
}

// The integers or booleans of a contiguous tensor.
template <class T>
const T* integers(const Tensor& t) {
  check(t.scalar_type() == scalar_type<T>, "a tensor of integers or booleans has another dtype than the op's");
  return static_cast<const T*>(t.data_ptr());
}

// The same where each is a place in [0, size) to read or write: under torch.compile nobody has looked at them yet.
inline const int64_t* places(const Tensor& t, int64_t size, const char* argument) {
  const int64_t* found = integers<int64_t>(t);
  for (int64_t i = 0; i < t.numel(); ++i)
    check(found[i] >= 0 && found[i] < size, [&] {
      return std::string(argument) + " must be in [0, " + std::to_string(size) + "), got " + std::to_string(found[i]) + ".";
    });
  return found;
}

// A tensor's numbers as doubles, row by row (one number, a row vector, weights [B, K]); any strides.
std::vector<double> numbers(const Tensor& t);
inline std::vector<double> numbers(const std::optional<Tensor>& t) { return t ? numbers(*t) : std::vector<double>(); }
inline std::vector<double> numbers(const std::optional<Strided>& t) { return t ? numbers(*t) : std::vector<double>(); }

// Sums as a tensor like another one, rounded to its dtype.
Tensor narrowed(const std::vector<double>& sums, const Tensor& like);

// Memory of one call, made like the tensor `like`, freed with this.
struct CallMemory {
  Tensor like;
  Tensors kept;
  template <class A>
  A* get(int64_t elements) {
    kept.push_back(fresh(like, {std::max<int64_t>(elements, 1)}, scalar_type<A>));
    return static_cast<A*>(kept.back().data_ptr());
  }
};

}  // namespace w2s
