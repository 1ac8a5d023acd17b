#pragma once

#include <cmath>
#include <limits>

#include "cpu/vec.h"

namespace w2s {

// Online log-sum-exp of a row: tiles of (max, sum) merged in order, in double. Inlined, so that a kernel's is its own code.
struct LogSumExp {
  double max = -std::numeric_limits<double>::infinity(), sum = 0;
  W2S_INLINE void add(double m, double s) {
    if (m > max) {
      sum = sum * std::exp(max - m) + s;
      max = m;
    } else if (m == -std::numeric_limits<double>::infinity()) {
      sum += s;  // 0, or NaN
    } else {
      sum += s * std::exp(m - max);
    }
  }
  // lse = reference + log_sum, for a row without mass -infinity + 0 (or NaN)
  W2S_INLINE double reference() const { return max; }
  W2S_INLINE double log_sum() const { return std::isinf(max) ? (max < 0 ? sum : 0 * sum) : std::log(sum); }
  W2S_INLINE double value() const { return max == -std::numeric_limits<double>::infinity() ? max + sum : max + std::log(sum); }
};

}  // namespace w2s
