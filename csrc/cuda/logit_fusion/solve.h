// The weight of one row: F(alpha) = KL(P_alpha || P) = T on [0, alpha_max], in float64 scalars.
//
// Given sums S_r = sum_v exp(b_v + alpha y_v - shift) y_v^r with y = x - centre and b = z_L - max z_L,
//     A = shift + log S_0 - log Z_0,   m = S_1/S_0,   v = S_2/S_0 - m^2,   F = alpha m - A.
// A few nodes give a start by Hermite interpolation of A; Newton on sqrt(2F), nearly linear in alpha, certifies it
// with sums at the very alpha that is returned. Everything here also compiles for the host, where tests run it.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define W2S_HD __host__ __device__ __forceinline__
#else
#define W2S_HD inline
#endif

namespace w2s::fusion {

constexpr int kNodes = 4;           // points of a sweep: 0, 1/3, 2/3 and 1 of alpha_max
constexpr double kFloor = 1e-8;     // KL that float32 sums cannot tell from 0
constexpr float kClamp = 60.0f;     // bound of a log-probability shift, as in the reference
constexpr double kUnderflow = 1e-25;  // S_0 below this has lost its terms: take the exact maximum as reference

W2S_HD double infinity() { return HUGE_VAL; }
W2S_HD double not_a_number() { return static_cast<double>(NAN); }

struct Tilt {
  double kl, log_sum, mean, variance;  // F, A, m, v
};

W2S_HD Tilt tilt(double alpha, double s0, double s1, double s2, double shift, double log_z0) {
  const double mean = s1 / s0, log_sum = shift + log(s0) - log_z0;
  const double kl = alpha * mean - log_sum;
  // fmax would turn NaN into 0
  return {kl < 0 ? 0.0 : kl, log_sum, mean, fmax(s2 / s0 - mean * mean, 0.0)};
}

// KL(Q_k || Q_0) of an expert: sums relative to its maximum m and the anti-expert's m0, shifts relative to `ref`.
struct Expert {
  double m, s, ref, w, m0, s0;  // sum e^(e-m), sum e^(e-m) (d-ref), sum e^(a-m0)
  W2S_HD double offset() const { return (m - m0) + log(s / s0); }  // lse(expert) - lse(anti)
  W2S_HD double kl() const {
    const double t = (ref - (m - m0)) + w / s - log(s / s0);
    return t < 0 ? 0.0 : t;
  }
};

// Where F = target on [a, b], by the quintic that matches A, m, v at both ends; only a start for Newton.
W2S_HD double hermite_root(double a, double b, const Tilt& left, const Tilt& right, double target) {
  const double h = b - a, c1 = h * left.mean, c2 = 0.5 * h * h * left.variance;
  const double q0 = right.log_sum - left.log_sum - c1 - c2, q1 = h * right.mean - c1 - 2 * c2;
  const double q2 = h * h * right.variance - 2 * c2;
  const double c3 = 10 * q0 - 4 * q1 + 0.5 * q2, c4 = -15 * q0 + 7 * q1 - q2, c5 = 6 * q0 - 3 * q1 + 0.5 * q2;
  const double start = a / h;
  double low = 0, high = 1, f_low = left.kl - target, f_high = right.kl - target, u = 0.5;
  for (int i = 0; i < 8; ++i) {  // Illinois: false position that halves the weight of an end that stays
    u = (low * f_high - high * f_low) / (f_high - f_low);
    if (!(u > low && u < high)) u = 0.5 * (low + high);
    const double slope = c1 + u * (2 * c2 + u * (3 * c3 + u * (4 * c4 + u * 5 * c5)));
    const double value = left.log_sum + u * (c1 + u * (c2 + u * (c3 + u * (c4 + u * c5))));
    const double f = (start + u) * slope - value - target;
    if (f < 0) {
      low = u, f_low = f, f_high *= 0.5;
    } else {
      high = u, f_high = f, f_low *= 0.5;
    }
  }
  return a + u * h;
}

// Newton within a bracket. begin() proposes `alpha`; step() takes F and v there and proposes the next until `done`.
struct Root {
  double target, end, tol, low, high, alpha, achieved;
  int passes;
  bool done, saturated, end_seen;

  W2S_HD void finish(double at, double kl) { alpha = at, achieved = kl, done = true; }

  // `flat`: the shift is constant on the support, so that every alpha is a minimiser.
  W2S_HD void begin(double goal, double alpha_max, double tolerance, const Tilt (&node)[kNodes], bool flat) {
    target = goal, end = alpha_max, low = 0, high = alpha_max, passes = 0, achieved = 0;
    tol = 0.25 * tolerance * fmax(1.0, fmin(goal, 1e30));
    done = saturated = end_seen = false;
    const double reach = node[kNodes - 1].kl;
    if (goal != goal) return finish(not_a_number(), not_a_number());
    if (flat || goal <= 0 || reach <= kFloor) return finish(0, 0);
    alpha = alpha_max;
    if (!(reach > goal)) return;  // NaN included: the exact sums at the end decide
    const double h = alpha_max / (kNodes - 1);
    int j = 0;
    Tilt left = node[0], right = node[1];
#pragma unroll
    for (int i = 1; i < kNodes - 1; ++i)
      if (node[i].kl < goal) j = i, left = node[i], right = node[i + 1];
    alpha = hermite_root(j * h, (j + 1) * h, left, right, goal);
    if (!(alpha > 0 && alpha < alpha_max)) alpha = 0.5 * alpha_max;
  }

  W2S_HD void step(const Tilt& at) {
    ++passes;
    if (at.kl != at.kl) return finish(not_a_number(), not_a_number());
    if (alpha == end) {
      end_seen = true;
      saturated = at.kl <= target;
    }
    if (saturated || fabs(at.kl - target) <= tol) return finish(alpha, at.kl);
    (at.kl < target ? low : high) = alpha;
    if (passes >= 48 || high - low <= 1e-9 * end) return finish(alpha, at.kl);
    const double g = sqrt(2 * at.kl);
    const double next = alpha - (g - sqrt(2 * target)) * g / (alpha * at.variance);
    if (next >= end && !end_seen)
      alpha = end;
    else
      alpha = next > low && next < high ? next : 0.5 * (low + high);
  }
};

// The paper's search: the node j = first .. nodes that minimises (F_j - T)^2; ties keep the smaller alpha.
struct Grid {
  double target, alpha_max, alpha, achieved, misfit, reach;
  int node, nodes;

  W2S_HD void begin(double goal, double end, int first, int intervals) {
    target = goal, alpha_max = end, alpha = achieved = reach = not_a_number(), misfit = infinity();
    node = first, nodes = intervals;
    if (first == 0) feed(0.0);
  }
  W2S_HD double next() const { return alpha_max * node / nodes; }
  W2S_HD bool done() const { return node > nodes; }
  W2S_HD void feed(double kl) {
    const double at = next(), miss = target == infinity() ? -at : (kl - target) * (kl - target);
    if (miss < misfit) misfit = miss, alpha = at, achieved = kl;
    reach = kl;
    ++node;
  }
  W2S_HD bool saturated() const { return reach > kFloor && reach <= target; }
};

}  // namespace w2s::fusion
