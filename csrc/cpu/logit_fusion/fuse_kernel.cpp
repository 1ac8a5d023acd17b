// fuse_logits and fused_log_softmax: z = (base_weight base + sum_k w_k (experts_k - anti_k)) / temperature, and z - lse.
//
// Work items are (row, segment of 8,192 columns), tiles of 1,024 stay in L1; z of the compute type is written straight
// to its place. log_softmax writes z, then takes lse off while the row is in L2 (16-bit outputs form z twice).
// Floor: inputs read once, output written once (log_softmax: the output once more through L2); 2 + K FMA an element,
// 11 more with the log-sum-exp.
#include "cpu/logit_fusion/models.h"

#include "cpu/target_begin.h"

#include "cpu/logit_fusion/fusion_kernel.h"
#include "cpu/logit_fusion/select_kernel.h"

template <class A>
struct FuseRun {
  const Fusion& f;
  Rows out;
  bool need_lse;
  std::vector<Cut<A>> cut;
  std::vector<LogSumExp> part;  // [B, segments]
  std::vector<char> nan;
  std::vector<LogSumExp> lse;
  int64_t S;

  FuseRun(const Fusion& fusion, const Rows& o, bool with_lse)
      : f(fusion), out(o), need_lse(with_lse), cut(size_t(f.B)), part(size_t(f.B * segments(f.V))),
        nan(part.size()), lse(size_t(f.B)), S(segments(f.V)) {}

  static constexpr Dtype mine() { return sizeof(A) == 8 ? Dtype::f64 : Dtype::f32; }

  // z (minus `less`) of one item to the output; `write` is off when only the sums are wanted.
  void item(int64_t i, bool write, bool sums, bool normalise) {
    const int64_t row = i / S, begin = (i % S) * SEGMENT, end = std::min(f.V, begin + SEGMENT);
    FusedRow<A> z;
    z.begin(f, row, f.temperature[size_t(row)], cut[size_t(row)]);
    A buffer[TILE];
    LogSumExp sum;
    for (int64_t c = begin; c < end; c += TILE) {
      const int n = int(std::min<int64_t>(TILE, end - c));
      const bool direct = write && out.dtype == mine() && n == padded(n);
      A* dst = direct ? static_cast<A*>(out.at(row, c)) : buffer;
      const TileInfo<A> info = z.tile(c, n, dst);
      nan[size_t(i)] |= info.nan;
      if (sums) sum.add(info.max, exp_sum(dst, n, info, c + TILE < end ? z.ahead(c + TILE) : Ahead{}));
      if (!write) continue;
      if (normalise) subtract(dst, n, lse[size_t(row)]);
      if (!direct) narrow(dst, n, out.dtype, out.at(row, c));
    }
    if (sums) part[size_t(i)] = sum;
  }

  // (z - max) - log sum: at large offsets max is exact where lse is not
  static void subtract(A* z, int n, const LogSumExp& total) {
    using V = Vec<A>;
    const double log_sum = total.log_sum();
    const A top = A(total.reference()), rest = A(log_sum);
    const V a = V::set(top), b = V::set(rest);
    int i = 0;
    for (; i + V::W <= n; i += V::W) (V::load(z + i) - a - b).store(z + i);
    for (; i < n; ++i) z[i] = z[i] - top - rest;
  }

  void subtract_item(int64_t i) {
    const int64_t row = i / S, begin = (i % S) * SEGMENT, end = std::min(f.V, begin + SEGMENT);
    subtract(static_cast<A*>(out.at(row, begin)), int(end - begin), lse[size_t(row)]);
  }

  void merge_rows() {
    for (int64_t r = 0; r < f.B; ++r) {
      LogSumExp sum;
      for (int64_t s = 0; s < S; ++s) sum.add(part[size_t(r * S + s)].max, part[size_t(r * S + s)].sum);
      lse[size_t(r)] = sum;
    }
  }

  // A row with NaN is not cut to the plausible set: its numbers stay as they are.
  void uncut_nan_rows(bool write, bool sums) {
    for (int64_t i = 0; i < f.B * S; ++i)
      if (nan[size_t(i)] && cut[size_t(i / S)].active) {
        const int64_t r = i / S;
        cut[size_t(r)].active = false;
        for (int64_t s = 0; s < S; ++s) item(r * S + s, write, sums, false);
      }
  }

  void run(bool log_softmax) {
    const int64_t items = f.B * S, grain = segment_grain(f.V);
    if (f.plausible) parallel_items(f.B, grain_of(f.V), [this](int64_t r) { cut[size_t(r)] = plausible_cut<A>(f, r); });
    const bool twice = log_softmax && out.dtype != mine();
    parallel_items(items, grain, [this, twice](int64_t i) { item(i, !twice, need_lse, false); });
    if (f.plausible) uncut_nan_rows(!twice, need_lse);
    if (need_lse) merge_rows();
    if (!log_softmax) return;
    if (twice) parallel_items(items, grain, [this](int64_t i) { item(i, true, false, true); });
    else parallel_items(items, grain, [this](int64_t i) { subtract_item(i); });
  }
};

template <class A>
inline std::vector<double> fuse_rows(const Fusion& f, const Rows& out, bool need_lse, bool log_softmax) {
  FuseRun<A> run(f, out, need_lse);
  run.run(log_softmax);
  std::vector<double> lse;
  for (const LogSumExp& row : run.lse) lse.push_back(row.value());
  return lse;
}

W2S_KERNELS(FuseKernels, fuse_rows<Real>)

#include "cpu/target_end.h"
