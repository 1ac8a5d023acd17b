// Large outputs. Memory beyond the allocator's threshold is mapped anew at every call and its pages are cleared one by one
// as they are first written: for a packed gradient of 56 MB that takes 12 ms where the arithmetic takes 4. Asking for huge
// pages leaves the clearing and takes away most of the faults.
#pragma once

#include "cpu/logit_fusion/fusion.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace w2s {

inline Tensor large_output(const Tensor& like, std::vector<int64_t> shape) {
  Tensor t = torch::stable::new_empty(like, shape);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t huge = 2 << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(t.data_ptr()), end = start + size_t(t.numel() * bytes_of(dtype_of(t.scalar_type())));
  const uintptr_t first = (start + huge - 1) / huge * huge, last = end / huge * huge;
  if (end - start >= 8 * huge && last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint
#endif
  return t;
}

}  // namespace w2s
