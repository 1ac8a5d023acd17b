// Compression of keys and values on plain pointers, for kv_compress and for the whole path.
#pragma once

#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace w2s {
namespace compress {

struct CompressionArguments;

// What is compressed and how: M outputs of T tokens each, with taps [sets, T, C] or one factor for all.
struct Problem {
  int64_t B, C, first, groups;  // slots [first, first + groups)
  int64_t height, width, ratio, M, T, across;  // across: windows in a row of the grid
  bool stride, normalize;
  double factor;
  Flat weight, bias, norm_weight, norm_bias;
  int64_t sets = 1, bias_sets = 1;  // of weight and of bias: one for all slots, or one each
  bool f64;

  Problem(const Tensor& x, int64_t first, const CompressionArguments& c);
  int64_t token(int64_t m, int64_t tap) const {
    if (stride) return m * ratio;
    return ((m / across) * ratio + tap / ratio) * width + (m % across) * ratio + tap % ratio;
  }
  bool used(int64_t n) const {  // whether token n belongs to an output
    if (stride) return n % ratio == 0;
    const int64_t y = n / width, x = n % width;
    if (T == 1 && (y % ratio || x % ratio)) return false;
    return y < height / ratio * ratio && x < across * ratio;
  }
};

template <class A>
struct CompressKernels {  // compress_kernel.cpp
  void (*forward)(const Problem& p, const Slots& x, double eps, const Slots& kv, void* stats);
  void (*backward)(const Problem& p, const Slots& grad, const Slots& x, const void* stats, const Slots& dx, bool need_x,
                   bool need_params, A* total);
  void (*clear)(const Slots& x, int64_t B, int64_t N, int64_t bytes);  // the first bytes of every token become 0
};

}  // namespace compress
}  // namespace w2s
