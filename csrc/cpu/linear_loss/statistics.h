// What a row's softmax comes to, from tiles of logits: log-sum-exp, the target's logit, entropy, the largest.
#pragma once

#include "cpu/linear_loss/engine.h"

namespace w2s {
namespace linear {

// Online log-sum-exp and target logit of every row that counts.
template <class A>
struct Statistics {
  const Engine<A>& e;
  const int64_t* target;
  std::vector<A> ref, at_target, newest, total, tops, sums;
  std::vector<double> sum;
  std::vector<A> spreads;
  std::vector<double> spread;  // sum_v exp(z - ref) (z - ref), if wanted
  std::vector<int64_t> best;   // first token of the largest logit, if wanted

  Statistics(const Engine<A>& engine, const int64_t* target)
      : e(engine), target(target), ref(size_t(e.Mp), -std::numeric_limits<A>::infinity()), at_target(size_t(e.Mp)),
        newest(size_t(e.Mp)), total(size_t(e.Mp)), sum(size_t(e.Mp)) {
    tops.resize(size_t(pieces(e.tile, CHUNK) * e.Mp));
    sums.resize(tops.size());
  }

  void pick(int64_t r0, int64_t rows, const A* z, int64_t ld) {
    if (!target) return;
    for (int64_t t = r0; t < r0 + rows; ++t) {
      const int64_t v = target[e.index[size_t(t)]] - e.v0;
      if (v >= 0 && v < e.nv) at_target[size_t(t)] = z[v * ld + t - r0];
    }
  }

  void want(bool entropy, bool largest) {
    if (entropy) spread.assign(size_t(e.Mp), 0.0), spreads.resize(sums.size());
    if (largest) best.assign(size_t(e.Mp), 0);
  }

  // a tile of logits: adds its mass; the chunks' (max, sum) stay in tops, sums
  void add(int64_t r0, int64_t rows, A* z, int64_t ld) {
    pick(r0, rows, z, ld);
    e.chunks([&](int64_t c, int64_t v, int64_t count) {
      kernels<TileKernels, A>().stats(z + v * ld, count, ld, &tops[size_t(c * ld)], &sums[size_t(c * ld)]);
      if (!spread.empty()) kernels<TileKernels, A>().spread(z + v * ld, count, ld, &tops[size_t(c * ld)], &spreads[size_t(c * ld)]);
    });
    kernels<TileKernels, A>().merge(tops.data(), sums.data(), pieces(e.nv, CHUNK), ld, &ref[size_t(r0)], newest.data(), total.data());
    parallel_items(rows, 64, [&](int64_t t) {
      A& r = ref[size_t(r0 + t)];
      double& s = sum[size_t(r0 + t)];
      const double shift = double(r) - double(newest[size_t(t)]);
      if (newest[size_t(t)] > r) {
        const double f = std::exp(shift);
        if (!spread.empty() && s != 0) spread[size_t(r0 + t)] = f * (spread[size_t(r0 + t)] + shift * s);
        if (!best.empty()) best[size_t(r0 + t)] = e.v0 + first_of(newest[size_t(t)], z, ld, t);
        s *= f;
      }
      r = newest[size_t(t)];
      s += double(total[size_t(t)]);
      if (!spread.empty()) add_spread(r0 + t, t, ld);
    });
  }

  // the first row of the tile whose logit of token t is `top`
  int64_t first_of(A top, const A* z, int64_t ld, int64_t t) const {
    int64_t c = 0;
    while (tops[size_t(c * ld + t)] != top) ++c;
    int64_t v = c * CHUNK;
    while (z[v * ld + t] != top) ++v;
    return v;
  }

  void add_spread(int64_t row, int64_t t, int64_t ld) {
    for (int64_t c = 0; c < pieces(e.nv, CHUNK); ++c) {
      const double top = double(tops[size_t(c * ld + t)]), over = top - double(ref[size_t(row)]);
      if (top == -std::numeric_limits<double>::infinity()) continue;
      spread[size_t(row)] += std::exp(over) * (double(spreads[size_t(c * ld + t)]) + over * double(sums[size_t(c * ld + t)]));
    }
  }

  double lse(int64_t m) const {
    const double r = double(ref[size_t(m)]), s = sum[size_t(m)];
    return r == -std::numeric_limits<double>::infinity() ? r + s : r + std::log(s);
  }
};

// once for all losses: instances.cpp
extern template struct Statistics<float>;
extern template struct Statistics<double>;

}  // namespace linear
}  // namespace w2s
