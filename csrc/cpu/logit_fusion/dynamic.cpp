// dynamic_fusion_weights: sweeps over all rows (dynamic_kernel.cpp), then a row at a time what the sums at the nodes settle,
// and by further passes over the row what they do not.
#include "cpu/logit_fusion/dynamic_weights.h"

namespace w2s {

Dynamic::Dynamic(const DynamicArguments& given)
    : Models(given.base, given.experts, given.anti, given.vocab_size), alpha_max(given.alpha_max), tol(given.tol), nodes(int(given.nodes)),
      first(int(given.first_candidate)), multi(int(given.multi)), kind(int(given.direction_kind)), average(given.average),
      direction(numbers(given.direction)), target(numbers(given.target_kl)) {}

namespace {

// alpha, target_kl [B, K], achieved_kl [B, problems], saturated [B, K] as doubles.
struct DynamicResult {
  std::vector<double> alpha, target, achieved;
  std::vector<char> saturated;
  explicit DynamicResult(const Dynamic& d)
      : alpha(size_t(d.B * d.K)), target(alpha.size()), achieved(size_t(d.B * d.problems())), saturated(alpha.size()) {}
};

template <class A>
struct DynamicRun {
  const Dynamic& d;
  DynamicResult& out;
  DynamicSweeps s;
  const DynamicKernels<A>& kernel = kernels<DynamicKernels, A>();
  const int64_t S = s.S;
  const double floor = sizeof(A) == 8 ? 1.5e-14 : 4e-7;

  DynamicRun(const Dynamic& dynamic, DynamicResult& o) : d(dynamic), out(o), s(dynamic) {}

  Term merged(const std::vector<Term>& parts, int64_t row, int count, int k) const {
    Term total;
    for (int64_t g = 0; g < S; ++g) total.add(parts[size_t((row * S + g) * count + k)]);
    return total;
  }

  // T_k = E_{Q_k} d - (lse z_k - lse z_0)
  void targets(int64_t row) {
    for (int k = 0; k < d.K; ++k) {
      double& kl = out.target[size_t(row * d.K + k)];
      if (!s.need_terms) {
        kl = d.target[size_t(row * d.K + k)];
        continue;
      }
      const Term q = merged(s.tuned, row, d.K, k), p = merged(s.plain, row, s.L, s.L > 1 ? k : 0);
      bool rises = false;
      for (int64_t g = 0; g < S; ++g) rises |= s.up[size_t((row * S + g) * d.K + k)] != 0;
      kl = q.weighted / q.sum + q.center - (q.lse() - p.lse());
      if (!(std::isfinite(q.lse()) && std::isfinite(p.lse()))) kl = std::numeric_limits<double>::quiet_NaN();
      else if (rises) kl = std::numeric_limits<double>::infinity();
      else if (kl < 0) kl = 0;
    }
  }

  void directions(int64_t row) {
    if (d.multi == 1 || d.kind == 0) return;
    const double* from = d.kind == 1 ? out.target.data() + row * d.K : d.direction.data() + row * d.K;
    double largest = -1;
    for (int k = 0; k < d.K; ++k) largest = std::max(largest, from[k]);
    for (int k = 0; k < d.K; ++k) {
      double& uk = s.u[size_t(row * d.K + k)];
      if (std::isinf(largest)) uk = std::isinf(from[k]);
      else uk = largest == 0 ? (d.kind == 1 ? 1.0 : 0.0) : from[k] / largest;
    }
  }

  void finish(int64_t row) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    bool one_sided = false;
    for (int64_t g = 0; g < S; ++g) one_sided |= s.odd[size_t(row * S + g)] != 0;
    const double* goals = out.target.data() + row * d.K;
    for (int p = 0; p < s.P; ++p) {
      const int moments = d.first >= 0 ? 2 : 4;
      Sums sum;
      for (int64_t g = 0; g < S; ++g) sum.add(s.sums[size_t((row * S + g) * s.P + p)], d.nodes, moments, d.alpha_max);
      double goal = 0;
      if (d.multi == 1) goal = goals[p];
      else
        for (int k = 0; k < d.K; ++k) goal += goals[k] / d.K;
      Solved found;
      if (std::isnan(goal) || !std::isfinite(sum.m0) || !(sum.moment[0][0] > 0) || !(sum.moment[0][d.nodes] == sum.moment[0][d.nodes])) {
        found = {nan, nan, false, true};
      } else {
        found = solve_nodes(sum, d, goal, floor);
        if (one_sided || !found.sure) found = repair(row, p, sum, goal, found);
      }
      report(row, p, found);
    }
  }

  void report(int64_t row, int p, const Solved& found) {
    out.achieved[size_t(row * s.P + p)] = std::max(0.0, found.kl) + (found.kl - found.kl);
    for (int k = d.multi == 1 ? p : 0; k < (d.multi == 1 ? p + 1 : d.K); ++k) {
      const size_t at = size_t(row * d.K + k);
      out.alpha[at] = d.multi == 1 ? found.t / (d.average ? d.K : 1) : found.t * s.u[at];
      out.saturated[at] = found.saturated;
    }
  }

  // Newton on G = sqrt(2 F), which is close to linear in t, within a bracket; a step past the end tries the end once.
  Solved repair(int64_t row, int p, const Sums& sums, double goal, Solved start) {
    double far[64][2];
    const bool centered = centers(row, far);
    const double center = sums.moment[1][0] / sums.moment[0][0] + sums.c, base_lse = sums.m0 + std::log(sums.moment[0][0]);
    const double(*ends)[2] = centered ? far : nullptr;
    if (d.first >= 0) return search(row, p, goal, center, base_lse, ends);
    const double allowed = std::max(d.tol * std::max(1.0, goal), sizeof(A) == 8 ? 1e-13 : 1e-6) * 0.5;
    if (goal <= floor) return {};
    double low = 0, high = d.alpha_max, t = std::min(std::max(start.t, 1e-3 * d.alpha_max), d.alpha_max);
    bool end_tried = false;
    KlAt now{};
    for (int pass = 0; pass < 40; ++pass) {
      now = kernel.evaluate(s, row, p, t, center, base_lse, ends);
      if (t >= d.alpha_max) {
        end_tried = true;
        if (now.kl <= floor && !d.target.empty()) return {};
        if (now.kl <= goal) return {t, now.kl, true, true};
      }
      if (std::abs(now.kl - goal) <= allowed || std::isnan(now.kl)) break;
      (now.kl < goal ? low : high) = t;
      if (high - low <= 1e-15 * d.alpha_max) break;
      const double root = std::sqrt(2 * now.kl);
      double next = t - (root - std::sqrt(2 * goal)) * root / (t * now.variance);
      if (!(next > low)) next = (low + high) / 2;
      else if (next >= high) next = end_tried ? (low + high) / 2 : d.alpha_max;
      t = next;
    }
    return {t, now.kl, false, true};
  }

  // The grid by direct evaluation
  Solved search(int64_t row, int p, double goal, double center, double base_lse, const double (*far)[2]) const {
    Solved best;
    double least = std::numeric_limits<double>::infinity(), end = 0;
    for (int j = d.first; j <= d.nodes; ++j) {
      const double t = j * d.step();
      end = kernel.evaluate(s, row, p, t, center, base_lse, far).kl;
      const double misfit = (end - goal) * (end - goal);
      if (misfit < least || (goal > 1e300 && j == d.nodes)) {
        least = misfit;
        best.t = t;
        best.kl = end;
      }
    }
    best.saturated = goal > floor && end <= goal && (end > floor || d.target.empty());
    return best;
  }

  // Where an infinite shift is put: 60 below and above the difference of the log-sum-exps.
  bool centers(int64_t row, double (*far)[2]) {
    bool any = false;
    for (int64_t g = 0; g < S; ++g) any |= s.odd[size_t(row * S + g)] != 0;
    if (!any || d.K > 64) return false;
    if (!s.need_terms)
      for (int64_t g = 0; g < S; ++g) kernel.terms(s, row * S + g);
    for (int k = 0; k < d.K; ++k) {
      const double gap = merged(s.tuned, row, d.K, k).lse() - merged(s.plain, row, s.L, s.L > 1 ? k : 0).lse();
      far[k][0] = gap - 60;
      far[k][1] = gap + 60;
    }
    return true;
  }

  void run() {
    const int64_t items = d.B * S;
    if (d.multi != 1 && d.kind == 1 && s.need_terms && d.K > 1) {  // the direction needs the targets first
      parallel_items(items, 1, [this](int64_t i) { kernel.terms(s, i); });
      for (int64_t r = 0; r < d.B; ++r) targets(r), directions(r);
      parallel_items(items, 1, [this](int64_t i) { kernel.item(s, i, false); });
    } else {
      if (!s.need_terms || d.kind == 2)
        for (int64_t r = 0; r < d.B; ++r) {
          if (!s.need_terms) targets(r);
          directions(r);
        }
      parallel_items(items, 1, [this](int64_t i) { kernel.item(s, i, s.need_terms); });
      if (s.need_terms)
        for (int64_t r = 0; r < d.B; ++r) targets(r);
    }
    parallel_items(d.B, 4, [this](int64_t r) { finish(r); });
  }
};

}  // namespace

DynamicTensors solve_dynamic(const Tensor& base, const Dynamic& d) {
  DynamicResult found(d);
  with_type(d.f64, [&](auto zero) { DynamicRun<decltype(zero)>(d, found).run(); });
  const RowResults rows(base, d);
  const DynamicTensors made{rows(rows.wide, d.K), rows(rows.wide, d.K), rows(rows.wide, d.problems()), rows(ScalarType::Bool, d.K)};
  const Flat alpha(made.alpha), target(made.target), achieved(made.achieved);
  for (size_t i = 0; i < found.alpha.size(); ++i) {
    alpha.put(int64_t(i), found.alpha[i]);
    target.put(int64_t(i), found.target[i]);
    static_cast<bool*>(made.saturated.data_ptr())[i] = found.saturated[i] != 0;
  }
  for (size_t i = 0; i < found.achieved.size(); ++i) achieved.put(int64_t(i), found.achieved[i]);
  return made;
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> dynamic_fusion_weights(DynamicArguments given) {
  const DynamicTensors found = solve_dynamic(given.base, Dynamic(given));
  return {found.alpha, found.target, found.achieved, found.saturated};
}

}  // namespace
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) { m.add<&w2s::dynamic_fusion_weights>("dynamic_fusion_weights"); }
