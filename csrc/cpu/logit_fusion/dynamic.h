// dynamic_fusion_weights: the arguments, and what one sweep over a row leaves for the solver.
#pragma once

#include "cpu/logit_fusion/models.h"
#include "cpu/parallel.h"

namespace w2s {

constexpr int MAX_NODES = 33;

struct DynamicArguments;

struct Dynamic : Models {
  double alpha_max, tol;
  int nodes, first, multi, kind;  // nodes = intervals J; first < 0 solves exactly
  bool average;
  std::vector<double> direction, target;  // [B, K] or empty

  explicit Dynamic(const DynamicArguments& given);
  Dynamic(const Models& models, int multi, int kind, bool average)  // what its gradient needs
      : Models(models), alpha_max(1), tol(1), nodes(2), first(-1), multi(multi), kind(kind), average(average) {}
  int problems() const { return multi == 1 ? K : 1; }
  double step() const { return alpha_max / nodes; }
};

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

// S_{j,r} = sum_v exp(z_L - m0) t^j x^r with t = exp(step x), x = shift - c; see section "node sweep" of dynamic_kernel.cpp.
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

// What the sweeps over all rows leave: an item is a row and a segment of its columns.
struct DynamicSweeps {
  const Dynamic& d;
  int64_t S;
  int P, L;         // problems; untuned models
  bool need_terms;  // T is not given
  std::vector<Sums> sums;   // [B, S, P]
  std::vector<Term> tuned;  // [B, S, K]
  std::vector<Term> plain;  // [B, S, L]
  std::vector<char> odd;    // [B, S]: one-sided masks
  std::vector<char> up;     // [B, S, K]
  std::vector<double> u;    // [B, K]: directions

  explicit DynamicSweeps(const Dynamic& dynamic)
      : d(dynamic), S(segments(d.V)), P(d.problems()), L(int(d.anti.size())), need_terms(d.target.empty()), sums(size_t(d.B * S * P)),
        tuned(size_t(d.B * S * d.K)), plain(size_t(d.B * S * L)), odd(size_t(d.B * S)), up(tuned.size()), u(size_t(d.B * d.K), 1.0) {}
};

struct KlAt {  // F(t), and Var_{P_t} x
  double kl, variance;
};

template <class A>
struct DynamicKernels {  // dynamic_kernel.cpp
  void (*item)(DynamicSweeps& s, int64_t i, bool with_terms);  // sums, and the small models' terms
  void (*terms)(DynamicSweeps& s, int64_t i);
  KlAt (*evaluate)(const DynamicSweeps& s, int64_t row, int p, double t, double center, double base_lse, const double (*far)[2]);
};

struct DynamicGradient {
  const Dynamic& d;
  std::vector<double> grad, alpha;
  std::vector<char> saturated;
  bool has_target;
  Rows base;
  std::vector<Rows> expert, anti;
  Flat dtarget;
};

template <class A>
struct DynamicBackwardKernels {  // dynamic_backward_kernel.cpp; in double whatever A is
  void (*run)(const DynamicGradient& g);
};

}  // namespace w2s
