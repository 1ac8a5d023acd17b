// Results that are summed in A and handed out in a tensor's own dtype.
#pragma once

#include "cpu/convert.h"
#include "cpu/tensors.h"

namespace w2s {

template <class A>
inline bool is_own(const Tensor& t) { return t.scalar_type() == scalar_type<A>; }

inline bool any_double(std::initializer_list<const Tensor*> tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const Tensor* t) { return is_double(*t); });
}

// `count` sums into `to` from element `first` on, rounded to its dtype, in parallel
template <class A>
inline void narrow_into(const A* sums, int64_t count, const Tensor& to, int64_t first) {
  const Dtype dtype = dtype_of(to);
  char* at = static_cast<char*>(to.data_ptr()) + first * bytes_of(dtype);
  parallel_ranges(count, 1 << 14, [&](int64_t begin, int64_t end) {
    kernels<ConvertKernels, A>().narrow(sums + begin, end - begin, dtype, at + begin * bytes_of(dtype));
  });
}

// A contiguous [rows, columns] result: `sums` is its own memory where the dtype is A's, else scratch to `store` from.
template <class A>
struct Output {
  Tensor tensor, wide;
  A* sums = nullptr;
  Output(const Tensor& like, std::vector<int64_t> shape) : tensor(fresh(like, shape)) {
    wide = is_own<A>(tensor) ? tensor : fresh(like, shape, scalar_type<A>);
    sums = static_cast<A*>(wide.data_ptr());
  }
  void store() const {
    if (!is_own<A>(tensor)) narrow_into(sums, tensor.numel(), tensor, 0);
  }
};

template <class A>
inline std::vector<A> widened(const std::optional<Tensor>& t) {  // a vector
  std::vector<A> found;
  if (!t) return found;
  for (double x : numbers(*t)) found.push_back(A(x));
  return found;
}

}  // namespace w2s
