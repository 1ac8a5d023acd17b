// What the row program takes, shares within a block, and merges over a team (see row.h).
#pragma once
#include "cuda/logit_fusion/select.h"

namespace w2s::fusion {

constexpr int kMaxExperts = 4;

// [B, K] float32 or float64 with any strides; null when absent.
struct Scalars {
  const void* data;
  int64_t row_stride, column_stride;
  bool is_double;
  W2S_HD explicit operator bool() const { return data != nullptr; }
  W2S_HD double at(int64_t row, int column) const {
    const int64_t i = row * row_stride + column * column_stride;
    return is_double ? static_cast<const double*>(data)[i] : static_cast<double>(static_cast<const float*>(data)[i]);
  }
};

struct Logits {
  const void* data;
  int64_t row_stride;
};

enum class Type : int { float32, float16, bfloat16 };

struct Arguments {
  Type type;  // of all logits
  Logits base, expert[kMaxExperts], anti[kMaxExperts];
  int experts, width, slice;  // K, vocab_size, columns of a block (a multiple of 4)
  double alpha_max, tol;
  int nodes, first_candidate, direction_kind, plausible, top_k;
  bool decoupled, average;
  Scalars direction, target_kl, temperature, uniform;
  double temperature_value, plausible_value, top_p, min_p;
  int64_t* token;
  float *logprob, *lse, *alpha, *target, *achieved;
  int* kept;
  bool* saturated;
};

// What the threads of a block share about the row.
struct Shared {
  float offset[kMaxExperts];  // lse(expert) - lse(anti)
  float u[kMaxExperts];       // the ray
  float alpha[kMaxExperts];
  double kl[kMaxExperts];
};

template <int N>
struct Sums {
  double v[N];
  W2S_HD static Sums none() {
    Sums s;
#pragma unroll
    for (int i = 0; i < N; ++i) s.v[i] = 0;
    return s;
  }
  W2S_HD static Sums merge(Sums a, const Sums& b) {
#pragma unroll
    for (int i = 0; i < N; ++i) a.v[i] += b.v[i];
    return a;
  }
};

// Maxima of the models, with the shift at the expert's maximum as the reference of its mean shift.
struct Maxima {
  float base, expert, shift, anti;
  uint32_t flags;
  static constexpr uint32_t kBaseBad = 1, kExpertBad = 2, kAntiBad = 4, kInfinite = 8;
  W2S_HD static Maxima none() { return {-HUGE_VALF, -HUGE_VALF, 0.0f, -HUGE_VALF, 0}; }
  W2S_HD static Maxima merge(Maxima a, const Maxima& b) {
    a.base = fmaxf(a.base, b.base);
    a.anti = fmaxf(a.anti, b.anti);
    if (b.expert > a.expert) a.expert = b.expert, a.shift = b.shift;
    a.flags |= b.flags;
    return a;
  }
};

struct Range {  // largest base, largest exponent at alpha_max, smallest and largest shift on the support
  float end, low, high;
  W2S_HD static Range none() { return {-HUGE_VALF, HUGE_VALF, -HUGE_VALF}; }
  W2S_HD static Range merge(Range a, const Range& b) {
    return {fmaxf(a.end, b.end), fminf(a.low, b.low), fmaxf(a.high, b.high)};
  }
};

struct Best {  // largest value, smallest index of ties
  float value;
  int index;
  W2S_HD static Best none() { return {-HUGE_VALF, kNoCut}; }
  W2S_HD static Best merge(const Best& a, const Best& b) {
    const bool second = b.value > a.value || (b.value == a.value && b.index < a.index);
    return {second ? b.value : a.value, second ? b.index : a.index};
  }
};

template <int N>
struct Tallies {
  Above v[N];
  W2S_HD static Tallies none() {
    Tallies t;
#pragma unroll
    for (int i = 0; i < N; ++i) t.v[i] = {0, 0};
    return t;
  }
  W2S_HD static Tallies merge(Tallies a, const Tallies& b) {
#pragma unroll
    for (int i = 0; i < N; ++i) a.v[i].weight += b.v[i].weight, a.v[i].count += b.v[i].count;
    return a;
  }
};

}  // namespace w2s::fusion
