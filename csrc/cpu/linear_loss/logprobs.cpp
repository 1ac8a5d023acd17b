#include "cpu/linear_loss/statistics.h"

// Forward: log-probabilities, and with frozen heads the expectations E_p[W_i] that make the gradient of any later
// coefficient. One sweep of the vocabulary: logits tile, exp in place, second product into the accumulator (softmax
// attention with K = V = W). The reference line of a row moves, and its accumulator is rescaled, only when a tile's
// maximum passes it by more than SLACK, which is rare after the first tiles.
//
// Where bfloat16 is multiplied as it is, the exponentials are rounded to it for that product, but for the target's own:
// the gradient W_y - E_p W of a row that is sure of its target is a difference of almost equal numbers.
namespace w2s {
namespace linear {
namespace {

using LogProbs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr double SLACK = 8;

template <class A>
struct Expectations {
  Engine<A>& e;
  Statistics<A>& s;
  bool need_logits;
  Tensor rows;                // [M, width]
  std::vector<double> parts;  // [Mp, n]: sum_v exp(z - ref) (b_i, or the capped logit)
  A *sum, *slope = nullptr;
  uint16_t* p16 = nullptr;  // a tile of exponentials without the target's

  Expectations(Engine<A>& engine, Statistics<A>& statistics, bool logits, int64_t columns)
      : e(engine), s(statistics), need_logits(logits), rows(e.output({e.M, e.width})), parts(size_t(e.Mp * e.n)) {
    sum = s.sums.data();
    if (e.cap) slope = e.memory(e.tile * columns);
    if (e.dots && !e.cap) p16 = reinterpret_cast<uint16_t*>(e.memory(e.tile * columns / 2));
  }
  A* acc() const { return static_cast<A*>(rows.data_ptr()); }

  void move_reference(int64_t m, A top) {
    const A old = s.ref[size_t(m)];
    s.ref[size_t(m)] = top;
    if (old == -std::numeric_limits<A>::infinity() && s.sum[size_t(m)] == 0) return;  // nothing there yet
    const double f = std::exp(double(old) - double(top));
    s.sum[size_t(m)] *= f;
    for (int i = 0; i < e.n; ++i) parts[size_t(m * e.n + i)] *= f;
    for (int64_t d = 0; d < e.width; ++d) acc()[m * e.width + d] *= A(f);
  }

  void add(int64_t r0, int64_t count, A* z, int64_t ld, A* const* capped) {
    s.pick(r0, count, z, ld);
    const int64_t chunks = pieces(e.nv, CHUNK);
    e.chunks([&](int64_t c, int64_t v, int64_t k) { kernels<TileKernels, A>().max(z + v * ld, k, ld, &s.tops[size_t(c * ld)]); });
    parallel_items(count, 16, [&](int64_t t) {
      A top = s.tops[size_t(t)];
      for (int64_t c = 1; c < chunks; ++c) top = std::max(top, s.tops[size_t(c * ld + t)]);
      if (double(top) > double(s.ref[size_t(r0 + t)]) + SLACK) move_reference(r0 + t, top);
    });
    e.chunks([&](int64_t c, int64_t v, int64_t k) {
      kernels<TileKernels, A>().exp(z + v * ld, k, ld, &s.ref[size_t(r0)], sum + c * ld);
    });
    for (int64_t c = 0; c < chunks; ++c)
      for (int64_t t = 0; t < count; ++t) s.sum[size_t(r0 + t)] += double(sum[c * ld + t]);
    if (p16) narrow_others(r0, count, z, ld);
    for (int i = 0; i < e.n; ++i) {
      if (need_logits && (e.cap || !e.bias.empty())) add_parts(r0, count, z, ld, i, e.cap ? capped[i] : nullptr);
      A* p = z;
      if (e.cap) {
        p = slope;
        e.chunks([&](int64_t, int64_t v, int64_t k) {
          kernels<TileKernels, A>().slope(slope + v * ld, z + v * ld, capped[i] + v * ld, k, ld, e.cap);
        });
      }
      const Target<A> to{acc() + r0 * e.width + e.offset[size_t(i)], e.width, 1};
      if (p16) multiply(Operand{p16, Dtype::bf16, e.nv, count, ld, 1}.t(), e.head16(i), to, e.v0 > 0);
      else multiply(Operand{p, own_dtype<A>, e.nv, count, ld, 1}.t(), e.head_operand(i), to, e.v0 > 0);
    }
  }

  void narrow_others(int64_t r0, int64_t count, const A* z, int64_t ld) const {
    e.chunks([&](int64_t, int64_t v, int64_t k) { kernels<ConvertKernels, A>().narrow(z + v * ld, k * ld, Dtype::bf16, p16 + v * ld); });
    for (int64_t t = 0; t < count; ++t) {
      const int64_t v = s.target[e.index[size_t(r0 + t)]] - e.v0;
      if (v >= 0 && v < e.nv) p16[v * ld + t] = 0;
    }
  }

  // p_y W_y, which `narrow_others` left out
  void add_target(int64_t m, A* row) const {
    const double p = std::exp(double(s.at_target[size_t(m)]) - s.lse(m));
    std::vector<A> w(size_t(e.width));
    for (int i = 0; i < e.n; ++i) {
      kernels<ConvertKernels, A>().widen(e.head[size_t(i)].at(s.target[e.index[size_t(m)]], 0), Dtype::bf16, e.D[size_t(i)], w.data());
      for (int64_t d = 0; d < e.D[size_t(i)]; ++d) row[e.offset[size_t(i)] + d] += A(p * double(w[size_t(d)]));
    }
  }

  void add_parts(int64_t r0, int64_t count, const A* p, int64_t ld, int i, const A* capped) {
    const A* b = capped ? nullptr : e.bias[size_t(i)].data() + e.v0;
    e.chunks([&](int64_t c, int64_t v, int64_t k) {
      kernels<TileKernels, A>().dot(p + v * ld, capped ? capped + v * ld : nullptr, b ? b + v : nullptr, k, ld, &s.tops[size_t(c * ld)]);
    });
    for (int64_t c = 0; c < pieces(e.nv, CHUNK); ++c)
      for (int64_t t = 0; t < count; ++t) parts[size_t((r0 + t) * e.n + i)] += double(s.tops[size_t(c * ld + t)]);
  }

  // divides by the mass; h_i . E_p W_i completes the mean logits of models without a softcap
  Tensor finish() {
    Tensor logits = e.output({need_logits ? e.T : 0, e.n});
    A* out = static_cast<A*>(logits.data_ptr());
    if (need_logits) std::fill(out, out + e.T * e.n, A(0));
    std::vector<Rows> hidden;
    for (const Tensor& t : e.hiddens) hidden.emplace_back(t);
    parallel_items(e.M, 8, [&](int64_t m) {
      const double inv = s.sum[size_t(m)] == 0 ? 0.0 : 1.0 / s.sum[size_t(m)];
      A* row = acc() + m * e.width;
      for (int64_t d = 0; d < e.width; ++d) row[d] *= A(inv);
      if (p16 && inv != 0) add_target(m, row);
      if (!need_logits) return;
      std::vector<A> x(size_t(e.width));
      for (int i = 0; i < e.n; ++i) {
        double total = parts[size_t(m * e.n + i)] * inv;
        if (!e.cap) {
          kernels<ConvertKernels, A>().widen(hidden[size_t(i)].at(e.index[size_t(m)], 0), hidden[size_t(i)].dtype, e.D[size_t(i)], x.data());
          for (int64_t d = 0; d < e.D[size_t(i)]; ++d) total += double(x[size_t(d)]) * double(row[e.offset[size_t(i)] + d]);
        }
        out[e.index[size_t(m)] * e.n + i] = A(total);
      }
    });
    return logits;
  }

  Tensor all_rows() const {
    if (e.M == e.T) return rows;
    Tensor out = e.output({e.T, e.width});
    A* p = static_cast<A*>(out.data_ptr());
    std::fill(p, p + e.T * e.width, A(0));
    for (int64_t m = 0; m < e.M; ++m) std::copy_n(acc() + m * e.width, e.width, p + e.index[size_t(m)] * e.width);
    return out;
  }
};

template <class A>
LogProbs run(Engine<A>& e, const int64_t* target, bool need_rows, bool need_logits, bool need_kept) {
  const int64_t block = std::min(e.block(), e.Mp);
  e.widens = !e.dots || (e.cap && (need_rows || need_logits));
  e.plan(block * (e.cap ? e.n + 2 : 1), 0);
  Statistics<A> s(e, target);
  Tensor kept = kept_logits(e, need_kept);
  A* scratch = need_kept ? nullptr : e.memory(e.tile * block);
  std::vector<A*> capped;
  for (int i = 0; e.cap && i < e.n; ++i) capped.push_back(e.memory(e.tile * block));
  std::unique_ptr<Expectations<A>> means;
  if (need_rows || need_logits) means = std::make_unique<Expectations<A>>(e, s, need_logits, block);
  for (int64_t v = 0; v < e.V && e.M > 0; v += e.tile) {
    e.load(v);
    A* z = need_kept ? static_cast<A*>(kept.data_ptr()) + v * e.Mp : scratch;
    for (int64_t r0 = 0; r0 < e.M; r0 += block) {
      const int64_t rows = std::min(block, e.M - r0), ld = round_up(rows, 16);
      e.logits(r0, rows, z, ld, capped.data());
      if (means) means->add(r0, rows, z, ld, capped.data());
      else s.add(r0, rows, z, ld);
    }
  }
  Tensor mean_logits = e.output({0});
  if (means) mean_logits = means->finish();
  return {scattered(e, [&](int64_t m) { return double(s.at_target[size_t(m)]) - s.lse(m); }),
          scattered(e, [&](int64_t m) { return s.lse(m); }), need_rows ? means->all_rows() : e.output({0}),
          need_logits ? mean_logits : e.output({0}), kept};
}

LogProbs linear_fusion_logprobs(LinearArguments linear, Tensor target, int64_t ignore_index, bool need_rows, bool need_logits,
                                bool need_kept) {
  const int64_t* y = integers<int64_t>(target);
  const std::vector<int64_t> rows = rows_where(linear.rows(), [&](int64_t t) { return y[t] != ignore_index; });
  return with_engine(linear, rows, [&](auto& e) { return run(e, y, need_rows, need_logits, need_kept); });
}

}  // namespace
}  // namespace linear
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) { m.add<&w2s::linear::linear_fusion_logprobs>("linear_fusion_logprobs"); }
