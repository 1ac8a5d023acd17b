// What a row's softmax is compared with: q_tv = r_t + d_t dense_tv + sum_k a_tk [v = id_tk]. A hard label is one id; label
// smoothing adds r; mixed labels and the top of a teacher's distribution are several ids.
#pragma once

#include "cpu/linear_loss/engine.h"

namespace w2s {
namespace linear {

template <class A>
struct Target {
  int64_t K = 0;
  std::vector<int64_t> ids;  // [M, K]; negative: none
  std::vector<A> a, r, d;    // [M, K], [Mp], [Mp]; r and d may be empty
  Rows dense;                // used if d is not empty

  Target() = default;
  Target(const Engine<A>& e, const Tensor& id, const Tensor& coef, const std::optional<Tensor>& uniform,
         const std::optional<Tensor>& whole, const std::optional<Tensor>& coef_whole)
      : K(id.size(1)), ids(size_t(e.M * K)), a(ids.size()) {
    const int64_t* given = integers<int64_t>(id);
    const std::vector<double> numbers_a = numbers(coef);
    for (int64_t m = 0; m < e.M; ++m)
      for (int64_t k = 0; k < K; ++k) {
        ids[size_t(m * K + k)] = given[e.index[size_t(m)] * K + k];
        a[size_t(m * K + k)] = A(numbers_a[size_t(e.index[size_t(m)] * K + k)]);
      }
    if (uniform) r = rows(e, *uniform);
    if (whole) {
      dense = Rows(*whole);
      d = coef_whole ? rows(e, *coef_whole) : std::vector<A>(size_t(e.Mp), A(1));
    }
  }

  static std::vector<A> rows(const Engine<A>& e, const Tensor& t) {
    const std::vector<double> given = numbers(t);
    std::vector<A> found(size_t(e.Mp), A(0));
    for (int64_t m = 0; m < e.M; ++m) found[size_t(m)] = A(given[size_t(e.index[size_t(m)])]);
    return found;
  }

  // f(place in a, row of the tile, token) for the ids in the current tile
  template <class F>
  void inside(const Engine<A>& e, int64_t r0, int64_t count, const F& f) const {
    for (int64_t i = r0 * K; i < (r0 + count) * K; ++i) {
      const int64_t v = ids[size_t(i)] - e.v0;
      if (v >= 0 && v < e.nv) f(i, v, i / K - r0);
    }
  }

  // f(chunk, first row of the tile, rows, token, dense[rows]) for the current tile
  template <class F>
  void each_dense(const Engine<A>& e, int64_t r0, int64_t count, const F& f) const {
    e.chunks([&](int64_t c, int64_t v, int64_t k) {
      A q[CHUNK];
      for (int64_t t = 0; t < count; ++t) {
        W2S_DISPATCH(widen_row<A>)(dense.at(e.index[size_t(r0 + t)], e.v0 + v), dense.dtype, k, A(1), q);
        f(c, v, k, t, q);
      }
    });
  }

  // z += q without r
  void add(const Engine<A>& e, int64_t r0, int64_t count, A* z, int64_t ld) const {
    inside(e, r0, count, [&](int64_t i, int64_t v, int64_t t) { z[v * ld + t] += a[size_t(i)]; });
    if (d.empty()) return;
    each_dense(e, r0, count, [&](int64_t, int64_t v, int64_t k, int64_t t, const A* q) {
      for (int64_t j = 0; j < k; ++j) z[(v + j) * ld + t] += d[size_t(r0 + t)] * q[j];
    });
  }

  // every coefficient of row m times f
  void scale(int64_t m, A f) {
    for (int64_t k = 0; k < K; ++k) a[size_t(m * K + k)] *= f;
    if (!r.empty()) r[size_t(m)] *= f;
    if (!d.empty()) d[size_t(m)] *= f;
  }
};

// sum_v q_tv z_tv and sum_v q_tv, collected tile by tile
template <class A>
struct Agreement {
  const Engine<A>& e;
  const Target<A>& q;
  std::vector<A> at, ones, partial;     // z at the ids, [M, K]
  std::vector<double> total, cross, mass;  // [Mp]: sum_v z, sum_v dense z, sum_v dense

  Agreement(const Engine<A>& engine, const Target<A>& target) : e(engine), q(target), at(q.ids.size(), A(0)) {
    if (!q.r.empty()) total.assign(size_t(e.Mp), 0.0), ones.assign(size_t(e.tile), A(1));
    if (!q.d.empty()) cross.assign(size_t(e.Mp), 0.0), mass.assign(size_t(e.Mp), 0.0);
    if (!q.r.empty() || !q.d.empty()) partial.resize(size_t(2 * pieces(e.tile, CHUNK) * e.Mp));
  }

  void add(int64_t r0, int64_t rows, const A* z, int64_t ld) {
    q.inside(e, r0, rows, [&](int64_t i, int64_t v, int64_t t) { at[size_t(i)] = z[v * ld + t]; });
    if (!q.r.empty()) {
      e.chunks([&](int64_t c, int64_t v, int64_t k) {
        W2S_DISPATCH(chunk_dot<A>)(z + v * ld, nullptr, ones.data(), k, ld, &partial[size_t(c * ld)]);
      });
      merge(total, 0, r0, rows, ld);
    }
    if (q.d.empty()) return;
    const int64_t second = pieces(e.tile, CHUNK) * e.Mp;
    q.each_dense(e, r0, rows, [&](int64_t c, int64_t v, int64_t k, int64_t t, const A* dense) {
      A x = 0, y = 0;
      for (int64_t j = 0; j < k; ++j) {
        if (dense[j] != 0) x += dense[j] * z[(v + j) * ld + t];  // 0 where z may be -infinity
        y += dense[j];
      }
      partial[size_t(c * ld + t)] = x;
      partial[size_t(second + c * ld + t)] = y;
    });
    merge(cross, 0, r0, rows, ld);
    merge(mass, second, r0, rows, ld);
  }

  void merge(std::vector<double>& to, int64_t from, int64_t r0, int64_t rows, int64_t ld) {
    for (int64_t c = 0; c < pieces(e.nv, CHUNK); ++c)
      for (int64_t t = 0; t < rows; ++t) to[size_t(r0 + t)] += double(partial[size_t(from + c * ld + t)]);
  }

  double ids_mass(int64_t m) const {
    double x = 0;
    for (int64_t k = 0; k < q.K; ++k) x += q.ids[size_t(m * q.K + k)] < 0 ? 0.0 : double(q.a[size_t(m * q.K + k)]);
    return x;
  }
  double ids_sum(int64_t m) const {
    double x = 0;
    for (int64_t i = m * q.K; i < (m + 1) * q.K; ++i)
      if (q.ids[size_t(i)] >= 0 && q.a[size_t(i)] != 0) x += double(q.a[size_t(i)]) * double(at[size_t(i)]);
    return x;
  }
  double dense_mass(int64_t m) const { return q.d.empty() ? 0.0 : double(q.d[size_t(m)]) * mass[size_t(m)]; }
  double dense_sum(int64_t m) const { return q.d.empty() ? 0.0 : double(q.d[size_t(m)]) * cross[size_t(m)]; }
  double all_mass(int64_t m) const { return q.r.empty() ? 0.0 : double(q.r[size_t(m)]) * double(e.V); }
  double all_sum(int64_t m) const { return q.r.empty() || q.r[size_t(m)] == 0 ? 0.0 : double(q.r[size_t(m)]) * total[size_t(m)]; }
};

}  // namespace linear
}  // namespace w2s
