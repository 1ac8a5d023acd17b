// dynamic_fusion_weights: the arguments, and what one sweep over a row leaves for the solver.
#pragma once

#include "cpu/logit_fusion/fusion.h"

namespace w2s {

constexpr int MAX_NODES = 33;

struct Dynamic : Models {
  double alpha_max, tol;
  int nodes, first, multi, kind;  // nodes = intervals J; first < 0 solves exactly
  bool average;
  std::vector<double> direction, target;  // [B, K] or empty

  Dynamic(const Tensor& base, const Tensors& experts, const Tensors& antis, double amax, int64_t j, int64_t first_candidate,
          double tolerance, int64_t m, int64_t direction_kind, const std::optional<Tensor>& d, bool mean,
          const std::optional<Tensor>& t, int64_t vocab_size)
      : Models(base, experts, antis, vocab_size), alpha_max(amax), tol(tolerance), nodes(int(j)), first(int(first_candidate)),
        multi(int(m)), kind(int(direction_kind)), average(mean), direction(numbers(d)), target(numbers(t)) {}
  int problems() const { return multi == 1 ? K : 1; }
  double step() const { return alpha_max / nodes; }
};

#define W2S_DYN_PARAMETERS                                                                                          \
  Rowwise base, RowwiseTensors experts, RowwiseTensors anti, double alpha_max, int64_t nodes,                       \
      int64_t first_candidate, double tol, int64_t multi, int64_t direction_kind, std::optional<Strided> direction, \
      bool average, std::optional<Strided> target_kl, int64_t vocab_size
#define W2S_DYN_ARGUMENTS                                                                                           \
  base, experts, anti, alpha_max, nodes, first_candidate, tol, multi, direction_kind, direction, average, target_kl, \
      vocab_size

constexpr double NONE = -std::numeric_limits<double>::infinity();

// sum exp(z - max) of one model, and sum exp(z_k - max) (d - center) of a tuned one.
struct Term {
  double max = NONE, sum = 0, weighted = 0, center = 0;
  void add(const Term& o) {
    if (o.max == NONE) {
      sum += o.sum;  // 0, or NaN
      return;
    }
    if (max == NONE) {
      const double bad = sum;
      *this = o;
      sum += bad;
      return;
    }
    const double top = std::max(max, o.max), a = std::exp(max - top), b = std::exp(o.max - top);
    weighted = a * weighted + b * (o.weighted + (o.center - center) * o.sum);
    sum = a * sum + b * o.sum;
    max = top;
  }
  double lse() const { return max == NONE ? max + sum : max + std::log(sum); }
};

// S_{j,r} = sum_v exp(z_L - m0) t^j x^r with t = exp(step x), x = shift - c; see section "node sweep" of dynamic_kernel.h.
struct Sums {
  double m0 = NONE, c = 0, moment[4][MAX_NODES] = {};
  double lost = NONE;  // largest z_L + alpha_max shift of a column whose exp(z_L - m0) underflows

  double m1(double alpha_max) const { return m0 + alpha_max * c; }
  void add(const Sums& o, int nodes, int moments, double alpha_max) {
    lost = std::max(lost, o.lost);
    if (o.m0 == NONE) {
      moment[0][0] += o.moment[0][0];
      return;
    }
    if (m0 == NONE) {
      const double bad = moment[0][0], was = lost;
      *this = o;
      moment[0][0] += bad;
      lost = was;
      return;
    }
    const double top0 = std::max(m0, o.m0), top1 = std::max(m1(alpha_max), o.m1(alpha_max));
    const double line = (top1 - top0) / alpha_max;
    Sums moved = o;
    move(top0, line, nodes, moments, alpha_max);
    moved.move(top0, line, nodes, moments, alpha_max);
    for (int r = 0; r < moments; ++r)
      for (int j = 0; j <= nodes; ++j) moment[r][j] += moved.moment[r][j];
  }
  // The same sums about another reference line.
  void move(double new_m0, double new_c, int nodes, int moments, double alpha_max) {
    const double d = c - new_c;
    double f = std::exp(m0 - new_m0);
    const double ratio = std::exp(alpha_max / nodes * d);
    for (int j = 0; j <= nodes; ++j, f *= ratio) {
      const double s0 = moment[0][j], s1 = moment[1][j], s2 = moment[2][j], s3 = moment[3][j];
      moment[0][j] = f * s0;
      moment[1][j] = f * (s1 + d * s0);
      if (moments > 2) moment[2][j] = f * (s2 + d * (2 * s1 + d * s0));
      if (moments > 3) moment[3][j] = f * (s3 + d * (3 * s2 + d * (3 * s1 + d * s0)));
    }
    m0 = new_m0;
    c = new_c;
  }
};

struct Solved {
  double t = 0, kl = 0;
  bool saturated = false, sure = true;  // sure: the estimate of the sweep meets the tolerance by itself
};

// t in [0, alpha_max] with F(t) = goal from the sums at the nodes: no look at the logits. `floor` is F's own rounding.
Solved solve_nodes(const Sums& s, const Dynamic& d, double goal, double floor);

// alpha, target_kl [B, K], achieved_kl [B, problems], saturated [B, K] as doubles.
struct DynamicResult {
  std::vector<double> alpha, target, achieved;
  std::vector<char> saturated;
  explicit DynamicResult(const Dynamic& d)
      : alpha(size_t(d.B * d.K)), target(alpha.size()), achieved(size_t(d.B * d.problems())), saturated(alpha.size()) {}
  std::tuple<Tensor, Tensor, Tensor, Tensor> tensors(const Dynamic& d) const {
    Tensor a = d.rows(d.acc(), d.K), t = d.rows(d.acc(), d.K), k = d.rows(d.acc(), d.problems()), s = d.rows(ScalarType::Bool, d.K);
    for (size_t i = 0; i < alpha.size(); ++i) {
      put(a, d.f64, int64_t(i), alpha[i]);
      put(t, d.f64, int64_t(i), target[i]);
      static_cast<bool*>(s.data_ptr())[i] = saturated[i] != 0;
    }
    for (size_t i = 0; i < achieved.size(); ++i) put(k, d.f64, int64_t(i), achieved[i]);
    return {a, t, k, s};
  }
};

// Solves every row (dynamic.cpp chooses the instruction set).
DynamicResult solve_dynamic(const Dynamic& d);

}  // namespace w2s
