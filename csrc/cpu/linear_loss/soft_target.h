// What a row's softmax is compared with: q_tv = c_v (r_t + d_t dense_tv) + sum_k a_tk [v = id_tk]. A hard label is one id;
// label smoothing adds r; mixed labels and the top of a teacher's distribution are several ids; c are weights of classes.
#pragma once

#include "cpu/linear_loss/statistics.h"

namespace w2s {
namespace linear {

template <class A>
struct SoftTarget {
  int64_t K = 0;
  std::vector<int64_t> ids;  // [M, K]; negative: none
  std::vector<A> a, r, d;    // [M, K], [Mp], [Mp]; r and d may be empty
  std::vector<A> classes;    // [V], or empty: 1
  Rows dense;                // used if d is not empty

  SoftTarget() = default;
  SoftTarget(const Engine<A>& e, const Tensor& id, const Tensor& coef, const std::optional<Tensor>& uniform,
         const std::optional<Tensor>& whole, const std::optional<Tensor>& coef_whole, const std::optional<Tensor>& weights)
      : K(id.size(1)), ids(size_t(e.M * K)), a(ids.size()) {
    const int64_t* given = integers<int64_t>(id);
    const std::vector<double> numbers_a = numbers(coef);
    for (int64_t m = 0; m < e.M; ++m)
      for (int64_t k = 0; k < K; ++k) {
        ids[size_t(m * K + k)] = given[e.index[size_t(m)] * K + k];
        a[size_t(m * K + k)] = A(numbers_a[size_t(e.index[size_t(m)] * K + k)]);
      }
    if (uniform) r = rows(e, *uniform);
    for (const double x : numbers(weights)) classes.push_back(A(x));
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

  A of_class(int64_t v) const { return classes.empty() ? A(1) : v < int64_t(classes.size()) ? classes[size_t(v)] : A(0); }

  // from here on a has its classes' weights too
  void weigh() {
    for (size_t i = 0; i < a.size() && !classes.empty(); ++i)
      if (ids[i] >= 0) a[i] *= of_class(ids[i]);
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
        kernels<ConvertKernels, A>().widen(dense.at(e.index[size_t(r0 + t)], e.v0 + v), dense.dtype, k, q);
        f(c, v, k, t, q);
      }
    });
  }

  // z += q without r
  void add(const Engine<A>& e, int64_t r0, int64_t count, A* z, int64_t ld) const {
    inside(e, r0, count, [&](int64_t i, int64_t v, int64_t t) { z[v * ld + t] += a[size_t(i)]; });
    if (d.empty()) return;
    each_dense(e, r0, count, [&](int64_t, int64_t v, int64_t k, int64_t t, const A* q) {
      for (int64_t j = 0; j < k; ++j) z[(v + j) * ld + t] += d[size_t(r0 + t)] * q[j] * of_class(e.v0 + v + j);
    });
  }

  // every coefficient of row m times f
  void scale(int64_t m, A f) {
    for (int64_t k = 0; k < K; ++k) a[size_t(m * K + k)] *= f;
    if (!r.empty()) r[size_t(m)] *= f;
    if (!d.empty()) d[size_t(m)] *= f;
  }
};

// sum_v q_tv z_tv and sum_v q_tv, collected tile by tile; those of a and dense without the classes' weights too
template <class A>
struct Agreement {
  const Engine<A>& e;
  const SoftTarget<A>& q;
  std::vector<A> at, ones, partial;     // z at the ids, [M, K]
  std::vector<double> total, cross, mass;  // [Mp]: sum_v c z, sum_v dense z, sum_v dense
  std::vector<double> cross_c, mass_c;     // sum_v c dense z, sum_v c dense, where there are classes
  double everything;                       // sum_v c

  Agreement(const Engine<A>& engine, const SoftTarget<A>& target) : e(engine), q(target), at(q.ids.size(), A(0)) {
    if (!q.r.empty()) total.assign(size_t(e.Mp), 0.0), ones.assign(size_t(e.tile), A(1));
    if (!q.d.empty()) cross.assign(size_t(e.Mp), 0.0), mass.assign(size_t(e.Mp), 0.0);
    if (!q.d.empty() && !q.classes.empty()) cross_c = cross, mass_c = mass;
    if (!q.r.empty() || !q.d.empty()) partial.resize(size_t(4 * pieces(e.tile, CHUNK) * e.Mp));
    everything = q.classes.empty() ? double(e.V) : 0.0;
    for (const A c : q.classes) everything += double(c);
  }

  void add(int64_t r0, int64_t rows, const A* z, int64_t ld) {
    q.inside(e, r0, rows, [&](int64_t i, int64_t v, int64_t t) { at[size_t(i)] = z[v * ld + t]; });
    if (!q.r.empty()) {
      e.chunks([&](int64_t c, int64_t v, int64_t k) {
        const A* weights = q.classes.empty() ? ones.data() : &q.classes[size_t(e.v0 + v)];
        kernels<TileKernels, A>().dot(z + v * ld, nullptr, weights, k, ld, &partial[size_t(c * ld)]);
      });
      merge(total, 0, r0, rows, ld);
    }
    if (q.d.empty()) return;
    const int64_t second = pieces(e.tile, CHUNK) * e.Mp;
    q.each_dense(e, r0, rows, [&](int64_t c, int64_t v, int64_t k, int64_t t, const A* dense) {
      A x = 0, y = 0, xc = 0, yc = 0;
      for (int64_t j = 0; j < k; ++j) {
        const A own = dense[j] != 0 ? dense[j] * z[(v + j) * ld + t] : A(0), weight = q.of_class(e.v0 + v + j);
        x += own, y += dense[j];  // 0 where z may be -infinity
        if (weight != 0) xc += weight * own, yc += weight * dense[j];
      }
      const A found[4] = {x, y, xc, yc};
      for (int64_t i = 0; i < (cross_c.empty() ? 2 : 4); ++i) partial[size_t(i * second + c * ld + t)] = found[i];
    });
    merge(cross, 0, r0, rows, ld);
    merge(mass, second, r0, rows, ld);
    if (cross_c.empty()) return;
    merge(cross_c, 2 * second, r0, rows, ld);
    merge(mass_c, 3 * second, r0, rows, ld);
  }

  void merge(std::vector<double>& to, int64_t from, int64_t r0, int64_t rows, int64_t ld) {
    for (int64_t c = 0; c < pieces(e.nv, CHUNK); ++c)
      for (int64_t t = 0; t < rows; ++t) to[size_t(r0 + t)] += double(partial[size_t(from + c * ld + t)]);
  }

  double ids_mass(int64_t m, bool weighted) const {
    double x = 0;
    for (int64_t i = m * q.K; i < (m + 1) * q.K; ++i)
      if (q.ids[size_t(i)] >= 0) x += double(q.a[size_t(i)]) * class_of(i, weighted);
    return x;
  }
  double ids_sum(int64_t m, bool weighted) const {
    double x = 0;
    for (int64_t i = m * q.K; i < (m + 1) * q.K; ++i) {
      const double a = q.ids[size_t(i)] < 0 ? 0 : double(q.a[size_t(i)]) * class_of(i, weighted);
      if (a != 0) x += a * double(at[size_t(i)]);
    }
    return x;
  }
  double class_of(int64_t i, bool weighted) const { return weighted ? double(q.of_class(q.ids[size_t(i)])) : 1.0; }
  double dense_mass(int64_t m, bool weighted) const { return dense_part(m, weighted ? mass_c : mass, mass); }
  double dense_sum(int64_t m, bool weighted) const { return dense_part(m, weighted ? cross_c : cross, cross); }
  double dense_part(int64_t m, const std::vector<double>& of, const std::vector<double>& plain) const {
    return q.d.empty() ? 0.0 : double(q.d[size_t(m)]) * (of.empty() ? plain : of)[size_t(m)];
  }
  double all_mass(int64_t m) const { return q.r.empty() ? 0.0 : double(q.r[size_t(m)]) * everything; }
  double all_sum(int64_t m) const { return q.r.empty() || q.r[size_t(m)] == 0 ? 0.0 : double(q.r[size_t(m)]) * total[size_t(m)]; }
};

// once for all losses: instances.cpp
extern template struct SoftTarget<float>;
extern template struct SoftTarget<double>;
extern template struct Agreement<float>;
extern template struct Agreement<double>;

}  // namespace linear
}  // namespace w2s
