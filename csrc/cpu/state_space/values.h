// Parameters of a state space as a host takes them: few numbers, in any dtype, whose arithmetic is in double.
#pragma once

#include "cpu/convert.h"
#include "cpu/tensors.h"

namespace w2s {

constexpr int64_t LONGEST = (int64_t(1) << 31) - 1;  // positions: w2s_fast/checks.py says so first, but for a compiled graph

// The numbers of a contiguous tensor.
inline std::vector<double> values(const Tensor& t) {
  std::vector<double> found(size_t(round_up(t.numel(), 16)));
  kernels<ConvertKernels, double>().widen(t.data_ptr(), dtype_of(t), t.numel(), found.data());
  found.resize(size_t(t.numel()));
  return found;
}
inline std::vector<double> values(const std::optional<Tensor>& t) { return t ? values(*t) : std::vector<double>(); }

}  // namespace w2s
