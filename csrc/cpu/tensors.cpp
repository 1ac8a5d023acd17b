#include "cpu/tensors.h"

namespace w2s {

std::vector<double> numbers(const Tensor& t) {
  const int64_t rows = t.size(0), columns = t.dim() > 1 ? t.size(1) : 1;
  const int64_t down = t.stride(0), across = t.dim() > 1 ? t.stride(1) : 0;
  std::vector<double> found(size_t(rows * columns));
  const Dtype dtype = dtype_of(t);
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

}  // namespace w2s
