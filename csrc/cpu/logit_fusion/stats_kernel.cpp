// fused_stats: lse, max, argmax, entropy and target log-probability of each row of z; nothing of size [B, V] is written.
//
// Items (row, segment); a tile in L1 gives max, sum e, sum e y with y = z - max, e = exp(y). H = log sum e - sum e y / sum e.
// Floor: inputs read once; 2 + K FMA, one exponential and 3 more an element.
#include "cpu/logit_fusion/models.h"

#include "cpu/target_begin.h"

#include "cpu/logit_fusion/fusion_kernel.h"
#include "cpu/logit_fusion/select_kernel.h"

struct StatsPart {
  double max = -std::numeric_limits<double>::infinity(), sum = 0, weighted = 0;  // weighted = sum e (z - max)
  int64_t argmax = -1, nan = -1;                                                  // first column with the max, with NaN
  void add(const StatsPart& o) {
    if (nan < 0) nan = o.nan;
    if (o.argmax < 0) return;
    if (argmax < 0 || o.max > max) {
      const double f = argmax < 0 || max == -std::numeric_limits<double>::infinity() ? 0 : std::exp(max - o.max);
      weighted = o.weighted + (f > 0 ? f * (weighted + (max - o.max) * sum) : 0);
      sum = o.sum + f * sum;
      max = o.max;
      argmax = o.argmax;
    } else if (o.max > -std::numeric_limits<double>::infinity()) {
      const double f = std::exp(o.max - max);
      weighted += f > 0 ? f * (o.weighted + (o.max - max) * o.sum) : 0;
      sum += f * o.sum;
    }
  }
};

template <class A>
struct StatsRun {
  const Fusion& f;
  const int64_t* target;
  const StatsOutput& out;
  int64_t S;
  std::vector<Cut<A>> cut;
  std::vector<StatsPart> part;
  std::vector<double> hit;  // z at the target

  StatsRun(const Fusion& fusion, const int64_t* t, const StatsOutput& o)
      : f(fusion), target(t), out(o), S(segments(f.V)), cut(size_t(f.B)), part(size_t(f.B * S)), hit(size_t(f.B)) {}

  static StatsPart tile(const A* z, int n, int64_t c, const TileInfo<A>& info) {
    using V = Vec<A>;
    StatsPart p;
    p.max = double(info.max);
    if (info.nan)
      for (int i = n - 1; i >= 0; --i)
        if (z[i] != z[i]) p.nan = c + i;
    int first = 0;
    while (first < n - 1 && z[first] != info.max) ++first;
    p.argmax = c + first;
    if (std::isinf(info.max)) {
      p.sum = info.max > 0;
      return p;
    }
    const V top = V::set(info.max), low = V::set(A(sizeof(A) == 8 ? -800 : -200));
    constexpr int U = 16 / V::W > 1 ? 16 / V::W : 1;  // as many partial sums, hence as small an error, on every target
    V s[U], w[U];
    for (int k = 0; k < U; ++k) s[k] = w[k] = V::set(0);
    for (int i = 0; i < padded(n); i += U * V::W)
      for (int k = 0; k < U; ++k) {
        const V y = V::max(low, V::load(z + i + k * V::W) - top), e = vexp(y);  // 0 times a finite number, not infinity
        s[k] = s[k] + e;
        w[k] = V::fma(e, y, w[k]);
      }
    for (int k = 0; k < U; ++k) {
      p.sum += double(s[k].sum());
      p.weighted += double(w[k].sum());
    }
    return p;
  }

  void item(int64_t i) {
    const int64_t row = i / S, begin = i % S * SEGMENT, end = std::min(f.V, begin + SEGMENT);
    FusedRow<A> z;
    z.begin(f, row, f.temperature[size_t(row)], cut[size_t(row)]);
    A buffer[TILE];
    StatsPart sum;
    for (int64_t c = begin; c < end; c += TILE) {
      const int n = int(std::min<int64_t>(TILE, end - c));
      const TileInfo<A> info = z.tile(c, n, buffer);
      sum.add(tile(buffer, n, c, info));
      if (target && target[row] >= c && target[row] < c + n) hit[size_t(row)] = double(buffer[target[row] - c]);
    }
    part[size_t(i)] = sum;
  }

  void finish(int64_t row) const {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    StatsPart p;
    for (int64_t s = 0; s < S; ++s) p.add(part[size_t(row * S + s)]);
    const double log_sum = std::isinf(p.max) ? 0 : std::log(p.sum);
    const bool bad = p.nan >= 0;
    const double lse = bad ? nan : p.max + log_sum;
    out.lse.put(row, lse);
    out.max.put(row, bad ? nan : p.max);
    out.argmax[row] = bad ? p.nan : p.argmax;
    out.entropy.put(row, bad || std::isinf(p.max) ? nan : log_sum - p.weighted / p.sum);
    if (target) out.target_logp.put(row, bad ? nan : (hit[size_t(row)] - p.max) - log_sum);
  }

  void run() {
    parallel_items(f.plausible ? f.B : 0, grain_of(f.V), [this](int64_t r) { cut[size_t(r)] = plausible_cut<A>(f, r); });
    parallel_items(f.B * S, segment_grain(f.V), [this](int64_t i) { item(i); });
    for (int64_t r = 0; r < f.B; ++r) finish(r);
  }
};

template <class A>
inline void stats_rows(const Fusion& f, const int64_t* target, const StatsOutput& out) {
  StatsRun<A>(f, target, out).run();
}

W2S_KERNELS(StatsKernels, stats_rows<Real>)

#include "cpu/target_end.h"
