// Masks of the largest magnitudes. |x| with NaN as infinity is what is compared; equal ones go by index.
#pragma once

#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace w2s::sparse {

struct Digit {  // of the magnitudes whose bits from shift + width on are `prefix`, the `width` bits from `shift` on
  uint64_t prefix;
  int shift, width;
};

struct Span {  // columns [begin, begin + count) of a row
  const Rows* x;
  int64_t row, begin, count;
};

struct Found {
  int64_t near, above, nans;
};

template <class A>
struct Threshold {
  A value;
  int64_t ties;  // how many of that value are taken
};

template <class A>
struct MaskKernels {  // masks_kernel.cpp
  // the magnitudes of a span, with what `largest` needs behind them (room for count + 16); returns the number of NaN
  int64_t (*load)(const Span& s, A* sizes);
  // the k-th largest of n loaded magnitudes, 1 <= k <= n, whose lowest `empty` bits are 0; what was loaded is lost
  Threshold<A> (*largest)(A* sizes, int64_t n, int64_t k, int empty);
  // magnitudes at places `from, from + step, ...`, each moved by less than a step
  void (*sample)(const Rows& x, int64_t row, int64_t from, int64_t step, int64_t count, A* out);
  void (*histogram)(const Span& s, const Digit& digit, uint32_t* counts);
  // mask = magnitude > high; those in [low, high] are listed (room for count + 16), their places from the span's begin
  Found (*bracket)(const Span& s, A low, A high, uint8_t* mask, A* near, int32_t* places);
  // mask = magnitude > threshold, or equal to it and one of the first `ties` such; returns the number of NaN
  int64_t (*threshold)(const Span& s, A threshold, int64_t ties, uint8_t* mask);
  // n of every m of a span of whole groups; returns the number of NaN
  int64_t (*groups)(const Span& s, int n, int m, uint8_t* mask);
};

}  // namespace w2s::sparse
