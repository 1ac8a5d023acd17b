#include "cpu/linear_loss/engine.h"
#include "cpu/log_sum_exp.h"

// One sweep keeps (max, mass) of every chunk of 128 tokens; the uniform number chooses a chunk, and that chunk's logits
// are computed again for that row alone. 2/128 of [T, V] is held.
namespace w2s {
namespace linear {
namespace {

constexpr double INF = std::numeric_limits<double>::infinity();

template <class A>
struct Draw {
  Engine<A>& e;
  std::vector<A> tops, sums;  // [chunks of the vocabulary, Mp]

  explicit Draw(Engine<A>& engine) : e(engine), tops(size_t(pieces(e.V, CHUNK) * e.Mp)), sums(tops.size()) {}

  void sweep() {
    const int64_t block = std::min(e.block(), e.Mp);
    e.widens = !e.dots;
    e.plan(block * (e.cap ? e.n + 1 : 1), 0);
    A* z = e.memory(e.tile * block);
    std::vector<A*> capped;
    for (int i = 0; e.cap && i < e.n; ++i) capped.push_back(e.memory(e.tile * block));
    std::vector<A> top(size_t(pieces(e.tile, CHUNK) * block)), sum(top.size());
    for (int64_t v = 0; v < e.V && e.M > 0; v += e.tile) {
      e.load(v);
      for (int64_t r0 = 0; r0 < e.M; r0 += block) {
        const int64_t rows = std::min(block, e.M - r0), ld = round_up(rows, 16);
        e.logits(r0, rows, z, ld, capped.data());
        e.chunks([&](int64_t c, int64_t first, int64_t k) {
          kernels<TileKernels, A>().stats(z + first * ld, k, ld, &top[size_t(c * ld)], &sum[size_t(c * ld)]);
          const size_t to = size_t((v / CHUNK + c) * e.Mp + r0);
          std::copy_n(&top[size_t(c * ld)], ld, &tops[to]);
          std::copy_n(&sum[size_t(c * ld)], ld, &sums[to]);
        });
      }
    }
  }

  // logits of one row in one chunk, in double
  std::vector<double> again(int64_t m, int64_t chunk) const {
    const int64_t first = chunk * CHUNK, count = std::min(CHUNK, e.V - first);
    std::vector<double> z(static_cast<size_t>(count), 0.0);
    std::vector<A> w(static_cast<size_t>(e.width));
    for (int i = 0; i < e.n; ++i)
      for (int64_t v = 0; v < count; ++v) {
        kernels<ConvertKernels, A>().widen(e.head[size_t(i)].at(first + v, 0), e.head[size_t(i)].dtype, e.D[size_t(i)], w.data());
        const A* h = e.h + m * e.width + e.offset[size_t(i)];
        double x = 0;
        for (int64_t d = 0; d < e.D[size_t(i)]; ++d) x += double(w[size_t(d)]) * double(h[d]);
        const double b = e.bias.empty() ? 0.0 : double(e.bias[size_t(i)][size_t(first + v)]);
        const double c = double(e.coef[size_t(i)][size_t(m)]);
        z[size_t(v)] += e.cap ? c * double(e.cap) * std::tanh((x + b) / double(e.cap)) : x + c * b;
      }
    return z;
  }

  struct Found {
    int64_t token = -1;
    double logprob = std::numeric_limits<double>::quiet_NaN(), lse = 0;
    int32_t kept = 0;
  };

  Found row(int64_t m, double u, bool greedy) const {
    const int64_t chunks = pieces(e.V, CHUNK);
    LogSumExp all;
    for (int64_t c = 0; c < chunks; ++c) all.add(double(tops[size_t(c * e.Mp + m)]), double(sums[size_t(c * e.Mp + m)]));
    Found f;
    f.lse = all.value();
    if (!std::isfinite(f.lse)) return f;
    int64_t chosen = -1;
    double before = 0;
    const double goal = u * all.sum;
    for (int64_t c = 0; c < chunks; ++c) {
      const double top = double(tops[size_t(c * e.Mp + m)]);
      if (greedy) {
        if (top == all.max) { chosen = c; break; }
        continue;
      }
      const double mass = top == -INF ? 0.0 : double(sums[size_t(c * e.Mp + m)]) * std::exp(top - all.max);
      if (mass > 0) chosen = c;  // the last chunk with mass, should rounding leave the goal beyond it
      if (mass > 0 && before + mass > goal) break;
      before += mass;
    }
    const std::vector<double> z = again(m, chosen);
    int64_t at = -1;
    for (size_t v = 0; v < z.size(); ++v) {
      if (greedy) {
        if (at < 0 || z[v] > z[size_t(at)]) at = int64_t(v);
        continue;
      }
      const double mass = std::exp(z[v] - all.max);
      if (mass > 0) at = int64_t(v);
      before += mass;
      if (mass > 0 && before > goal) break;
    }
    f.token = chosen * CHUNK + at;
    f.logprob = z[size_t(at)] - f.lse;
    f.kept = greedy ? 1 : finite();
    return f;
  }

  // columns that can be drawn: all but those a bias of -infinity shuts out of every row
  int32_t finite() const {
    int32_t open = 0;
    for (int64_t v = 0; v < e.V; ++v) {
      bool shut = false;
      for (const auto& b : e.bias) shut |= b[size_t(v)] == -std::numeric_limits<A>::infinity() && !e.cap;
      open += !shut;
    }
    return open;
  }
};

template <class A>
std::tuple<Tensor, Tensor, Tensor, Tensor> run(Engine<A>& e, const Tensor& uniform, bool greedy) {
  Draw<A> draw(e);
  draw.sweep();
  const std::vector<double> u = numbers(uniform);
  Tensor token = fresh(e.hiddens[0], {e.T}, ScalarType::Long);
  Tensor kept = fresh(e.hiddens[0], {e.T}, ScalarType::Int);
  Tensor logprob = e.output({e.T}), lse = e.output({e.T});
  parallel_items(e.T, 1, [&](int64_t t) {
    const auto f = draw.row(t, u[size_t(t)], greedy);
    static_cast<int64_t*>(token.data_ptr())[t] = f.token;
    static_cast<int32_t*>(kept.data_ptr())[t] = f.kept;
    static_cast<A*>(logprob.data_ptr())[t] = A(f.logprob);
    static_cast<A*>(lse.data_ptr())[t] = A(f.lse);
  });
  return {token, logprob, lse, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_fusion_sample(LinearArguments linear, Strided uniform) {
  const bool greedy = linear.temperature == 0;
  if (greedy) linear.temperature = 1;
  const std::vector<int64_t> rows = rows_where(linear.rows(), [](int64_t) { return true; });
  return with_engine(linear, rows, [&](auto& e) { return run(e, uniform, greedy); });
}

}  // namespace
}  // namespace linear
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) { m.add<&w2s::linear::linear_fusion_sample>("linear_fusion_sample"); }
