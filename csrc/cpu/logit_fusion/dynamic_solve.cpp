// The scalar end of dynamic_fusion_weights: KL at the nodes, two-point Hermite interpolation, one root.
//
// A(t) = log sum_v p_v exp(t x_v) and its derivatives m, v, kappa (mean, variance, third central moment of x under P_t)
// are known at the nodes. Between two of them P(u) of degree 7 matches A, A', A'', A''' at both ends and
// F = t A' - A = (j + u) P'(u) - P(u). The same with degree 5 (no third derivative) says how far that is from settled.
#include "cpu/logit_fusion/dynamic.h"

namespace w2s {
namespace {

struct Node {
  double a, mean, variance, third;
  double kl(double t) const { return t * mean - a; }
};

Node node_at(const Sums& s, int j, int moments) {
  const double s0 = s.moment[0][j], m = s.moment[1][j] / s0;
  Node n{std::log(s0) - std::log(s.moment[0][0]), m, 0, 0};
  if (moments > 2) {
    n.variance = std::max(0.0, s.moment[2][j] / s0 - m * m);
    n.third = s.moment[3][j] / s0 - 3 * m * s.moment[2][j] / s0 + 2 * m * m * m;
  }
  return n;
}

// P(u) = c0 + c1 u + ... + u^{n} (r0 + r1 (u - 1) + ...), n = 4 for degree 7 and 3 for degree 5.
struct Hermite {
  double c[4] = {}, r[4] = {};
  int n;
  Hermite(const Node& x, const Node& y, double h, int terms) : n(terms) {
    const double f0[4] = {x.a, h * x.mean, h * h * x.variance / 2, h * h * h * x.third / 6};
    const double f1[4] = {y.a, h * y.mean, h * h * y.variance / 2, h * h * h * y.third / 6};
    constexpr double binomial[4][4] = {{1, 0, 0, 0}, {1, 1, 0, 0}, {1, 2, 1, 0}, {1, 3, 3, 1}};
    constexpr double powers[2][4] = {{1, 3, 3, 1}, {1, 4, 6, 4}};  // (1 + s)^3, (1 + s)^4
    for (int i = 0; i < n; ++i) c[i] = f0[i];
    for (int i = 0; i < n; ++i) {  // Taylor coefficients about u = 1 of what the c leave over, divided by u^n
      double rest = f1[i];
      for (int k = i; k < n; ++k) rest -= binomial[k][i] * c[k];
      for (int k = 0; k < i; ++k) rest -= powers[n - 3][i - k] * r[k];
      r[i] = rest;
    }
  }
  // F at (j + u) h
  double kl(double j, double u) const {
    double p = 0, dp = 0, q = 0, dq = 0;
    for (int i = n - 1; i >= 0; --i) {
      dp = dp * u + p;
      p = p * u + c[i];
      dq = dq * (u - 1) + q;
      q = q * (u - 1) + r[i];
    }
    const double un1 = n == 4 ? u * u * u : u * u, un = un1 * u;
    return (j + u) * (dp + n * un1 * q + un * dq) - (p + un * q);
  }
};

// How far the two polynomials differ over the interval: at the root alone they may happen to cross.
double disagreement(const Hermite& fine, const Hermite& coarse, int j) {
  double worst = 0;
  for (int i = 1; i < 8; ++i) worst = std::max(worst, std::abs(fine.kl(j, i / 8.0) - coarse.kl(j, i / 8.0)));
  return worst;
}

// Columns whose weight underflowed at node 0 may count at node j: a bound on their share of S_j.
bool mass_lost(const Sums& s, const Dynamic& d, int j) {
  if (s.moment[0][j] < (d.f64 ? 1e-280 : 1e-30)) return true;
  if (s.lost == NONE) return false;
  const double share = double(j) / d.nodes, last = s.lost - s.m1(d.alpha_max);
  const double bound = double(d.V) * std::exp((d.f64 ? -600.0 : -75.0) * (1 - share) + share * last);
  return bound > 1e-9 * s.moment[0][j];
}

Solved search_grid(const Sums& s, const Dynamic& d, double goal, double floor) {
  Solved best;
  double least = std::numeric_limits<double>::infinity(), end = 0;
  for (int j = d.first; j <= d.nodes; ++j) {
    const double t = j * d.step(), kl = std::max(0.0, node_at(s, j, 2).kl(t)), misfit = (kl - goal) * (kl - goal);
    best.sure &= !mass_lost(s, d, j);
    if (misfit < least || (goal > 1e300 && j == d.nodes)) {
      least = misfit;
      best.t = t;
      best.kl = kl;
    }
    end = kl;
  }
  best.saturated = goal > floor && end <= goal && (end > floor || d.target.empty());
  return best;
}

}  // namespace

Solved solve_nodes(const Sums& s, const Dynamic& d, double goal, double floor) {
  if (d.first >= 0) return search_grid(s, d, goal, floor);
  Solved found;
  const int J = d.nodes;
  const double end = node_at(s, J, 2).kl(d.alpha_max);
  found.sure = !mass_lost(s, d, J);
  // a shift that changes nothing has T = 0 too, unless the caller gave the target
  if (found.sure && (goal <= floor || (end <= floor && !d.target.empty()))) return found;
  if (end <= goal) {
    found.t = d.alpha_max;
    found.kl = end;
    found.saturated = true;
    return found;
  }
  int j = 0;
  while (j < J - 1 && node_at(s, j + 1, 2).kl((j + 1) * d.step()) < goal) ++j;
  const Node left = node_at(s, j, 4), right = node_at(s, j + 1, 4);
  const Hermite fine(left, right, d.step(), 4), coarse(left, right, d.step(), 3);
  double low = 0, high = 1;
  for (int i = 0; i < 48; ++i) {
    const double middle = (low + high) / 2;
    (fine.kl(j, middle) < goal ? low : high) = middle;
  }
  const double u = (low + high) / 2;
  found.t = (j + u) * d.step();
  found.kl = fine.kl(j, u);
  const double allowed = d.tol * std::max(1.0, goal);
  found.sure = !mass_lost(s, d, j) && !mass_lost(s, d, j + 1) && allowed >= (d.f64 ? 1e-12 : 1e-5) &&
               disagreement(fine, coarse, j) <= allowed && std::abs(found.kl - goal) <= 0.1 * allowed;
  return found;
}

}  // namespace w2s
