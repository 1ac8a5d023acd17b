#pragma once

#include "cpu/output.h"
#include "cpu/sparse_lowrank/products.h"

namespace w2s::sparse {

inline double scale_of(const std::optional<Tensor>& scale, double value) {
  if (!scale) return value;
  check(scale->numel() == 1, "scale must have one element");
  return number_at<double>(scale->data_ptr(), dtype_of(scale->scalar_type()), 0);
}

}  // namespace w2s::sparse
