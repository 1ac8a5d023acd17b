// Prefixes of the order (value descending, index ascending) without a sort: top-k, top-p and the plausible set.
//
// A prefix is a boundary key and, among the columns that tie with it, a last index. The boundary is found by counting
// what lies above three pivots at a time; masses are 64-bit fixed point, so that sums are exact in any order.
#pragma once
#include <cstdint>
#include <cstring>

#include "cuda/logit_fusion/solve.h"

namespace w2s::fusion {

// reference/logit_fusion/filters.py: ties are decided by this much, rounding would decide them otherwise.
constexpr double kSlack = 0x1p-21;
W2S_HD double reached(double top_p) { return top_p - kSlack * fmin(top_p, 16 * (1 - top_p)); }
W2S_HD float least_distance(double min_p) {
  return min_p > 0 ? static_cast<float>(log(min_p) - kSlack) : -HUGE_VALF;
}

constexpr int kPivots = 3;
constexpr int kNoCut = 0x7fffffff;

// float -> unsigned in the same order; -0 equals +0.
W2S_HD uint32_t key_of(float value) {
  value += 0.0f;
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

W2S_HD float value_of(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// exp(value - top) in fixed point: `scale` is the power of two that lets `width` columns of mass 1 fit in 62 bits.
struct Mass {
  float top, scale;
  W2S_HD Mass(float maximum, int64_t width) : top(maximum), scale(0x1p61f) {
    for (int64_t w = 1; w < width; w *= 2) scale *= 0.5f;
  }
  W2S_HD uint64_t operator()(float value) const {
    return static_cast<uint64_t>(expf(value - top) * scale + 0.5f);  // 0 for -inf
  }
};

struct Prefix {
  uint32_t key = 0;  // columns with a larger key are in; 0 keeps everything
  int cut = kNoCut;  // columns with this key are in up to this index
  W2S_HD bool has(float value, int column) const {
    const uint32_t k = key_of(value);
    return k > key || (k == key && column <= cut);
  }
};

// Weight and number of the columns above a key.
struct Above {
  uint64_t weight;
  uint32_t count;
};

// The smallest key with weight above it < goal: the boundary of the shortest prefix whose weight reaches goal.
struct Boundary {
  uint32_t low, high;      // weight above low >= goal > weight above high
  Above at_low, at_high;
  double goal;
  float span;
  int pass;

  W2S_HD void begin(float top, Above all, double weight_goal) {
    low = key_of(-HUGE_VALF), high = key_of(top), at_low = all, at_high = {0, 0};
    goal = weight_goal, span = 8.0f, pass = 0;
  }
  W2S_HD bool exact() const { return high - low <= 1; }
  // One column is left between: its key is the boundary.
  W2S_HD bool single() const { return at_low.count - at_high.count == 1; }

  // Mostly at equal steps of the value, where logits are spread; sometimes of the key, which bounds the passes.
  W2S_HD uint32_t pivot(int i) const {
    uint32_t p;
    if (pass % 4 == 3) {
      p = low + static_cast<uint32_t>(static_cast<uint64_t>(high - low) * (i + 1) / (kPivots + 1));
    } else {
      const float b = value_of(high), a = low == key_of(-HUGE_VALF) ? b - span : value_of(low);
      p = key_of(a + (b - a) * (static_cast<float>(i + 1) / (kPivots + 1)));
    }
    return p <= low ? low + 1 : p >= high ? high - 1 : p;
  }
  W2S_HD void step(const uint32_t (&pivots)[kPivots], const Above (&found)[kPivots]) {
#pragma unroll
    for (int i = 0; i < kPivots; ++i) {
      if (static_cast<double>(found[i].weight) < goal) {
        if (pivots[i] < high) high = pivots[i], at_high = found[i];
      } else if (pivots[i] > low) {
        low = pivots[i], at_low = found[i];
      }
    }
    span *= 8.0f;
    ++pass;
  }
  // How many of the columns that tie at the boundary are in, each of weight `each`.
  W2S_HD uint32_t ties_kept(uint64_t each) const {
    const double missing = goal - static_cast<double>(at_high.weight);
    const double n = ceil(missing / static_cast<double>(each));
    const uint32_t ties = at_low.count - at_high.count;
    return n < 1 ? 1 : n >= ties ? ties : static_cast<uint32_t>(n);
  }
  W2S_HD bool cuts_ties(uint64_t each) const { return ties_kept(each) < at_low.count - at_high.count; }
};

// The draw u in [0, 1) as the integer that the cumulative mass must exceed; at most total - 1, so a column exists.
W2S_HD uint64_t draw_goal(double u, uint64_t total) {
  const double product = u * static_cast<double>(total);
  const uint64_t goal = product >= 1.8e19 ? total : static_cast<uint64_t>(product);
  return goal < total ? goal : total - 1;
}

}  // namespace w2s::fusion
