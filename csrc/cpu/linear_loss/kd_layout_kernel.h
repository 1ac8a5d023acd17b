// Included once a target by kd_kernel.cpp (no include guard). How rows of distillation lie in working memory: one row of V
// numbers side by side (`OneRow`), or as many short rows as a vector has lanes, a class after the other (`Lanes`), so that
// a vector of ten classes is not six lanes of padding and ends in no sum across lanes. What is computed on them is written
// once, for both.
#include "cpu/log_kernel.h"
#include "cpu/pack_kernel.h"

// The sum of the lanes in double: a lane's is of few terms, but every halving across lanes would round once more.
template <class A>
W2S_INLINE double fine_sum(Vec<A> x) {
  A lane[Vec<A>::W];
  x.store(lane);
  double four[4] = {};
  for (int i = 0; i < Vec<A>::W; i += 4)
    for (int j = 0; j < 4 && j < Vec<A>::W; ++j) four[j] += double(lane[i + j]);
  return (four[0] + four[1]) + (four[2] + four[3]);
}

// Sums over a padded row, tile by tile: `step(i, sums)` adds a vector at i to N running sums.
template <class A, bool FINE = false, int N, class Step>
W2S_INLINE void row_sums_of(int64_t n, double (&out)[N], const Step& step) {
  using V = Vec<A>;
  for (int k = 0; k < N; ++k) out[k] = 0;
  for (int64_t at = 0; at < n; at += TILE) {
    constexpr int U = 16 / V::W > 1 ? 16 / V::W : 1;  // as many partial sums, hence as small an error, on every target
    V sums[U][N];
    for (auto& part : sums)
      for (int k = 0; k < N; ++k) part[k] = V::set(0);
    const int64_t end = n < at + TILE ? n : at + TILE;
    for (int64_t i = at; i < end; i += U * V::W)
      for (int u = 0; u < U; ++u) step(i + u * V::W, sums[u]);
    for (const auto& part : sums)
      for (int k = 0; k < N; ++k) out[k] += FINE ? fine_sum<A>(part[k]) : double(part[k].sum());
  }
}

// A number for each of several rows, one a lane; what double is for one row.
template <class A>
struct PerLane {
  using T = Vec<A>;
  T v;
  W2S_INLINE PerLane(double x) : v(T::set(A(x))) {}
  W2S_INLINE PerLane(T x) : v(x) {}
  friend W2S_INLINE PerLane operator+(PerLane a, PerLane b) { return a.v + b.v; }
  friend W2S_INLINE PerLane operator-(PerLane a, PerLane b) { return a.v - b.v; }
  friend W2S_INLINE PerLane operator*(PerLane a, PerLane b) { return a.v * b.v; }
  friend W2S_INLINE PerLane operator/(PerLane a, PerLane b) { return a.v / b.v; }
};

// In every lane what belongs to its row.
template <class A>
W2S_INLINE Vec<A> all(double x) { return Vec<A>::set(A(x)); }
template <class A>
W2S_INLINE Vec<A> all(PerLane<A> x) { return x.v; }

W2S_INLINE double log_of(double x) { return std::log(x); }
template <class A>
W2S_INLINE PerLane<A> log_of(PerLane<A> x) {
  A lane[Vec<A>::W];
  x.v.store(lane);
  log_row(lane, Vec<A>::W);
  return Vec<A>::load(lane);
}

W2S_INLINE double sqrt_of(double x) { return std::sqrt(x); }
template <class A>
W2S_INLINE PerLane<A> sqrt_of(PerLane<A> x) {
  A lane[Vec<A>::W];
  x.v.store(lane);
  for (A& own : lane) own = std::sqrt(own);
  return Vec<A>::load(lane);
}

// the larger one; NaN where x is
W2S_INLINE double at_least(double x, double low) { return x < low ? low : x; }
template <class A>
W2S_INLINE PerLane<A> at_least(PerLane<A> x, double low) {
  const Vec<A> floor = Vec<A>::set(A(low));
  return Vec<A>::select(Vec<A>::gt(floor, x.v), floor, x.v);
}
// y where x >= low, 0 elsewhere
W2S_INLINE double from(double x, double low, double y) { return x < low ? 0 : y; }
template <class A>
W2S_INLINE PerLane<A> from(PerLane<A> x, double low, std::type_identity_t<PerLane<A>> y) {
  return Vec<A>::select(Vec<A>::gt(Vec<A>::set(A(low)), x.v), Vec<A>::set(0), y.v);
}

// y where x is not 0, `zero` elsewhere
W2S_INLINE double unless_zero(double x, double y, double zero) { return x == 0 ? zero : y; }
template <class A>
W2S_INLINE PerLane<A> unless_zero(PerLane<A> x, std::type_identity_t<PerLane<A>> y, std::type_identity_t<PerLane<A>> zero) {
  return Vec<A>::select(Vec<A>::eq(x.v, Vec<A>::set(0)), zero.v, y.v);
}

template <class A>
struct OneRow {
  using Scalar = A;
  using T = Vec<A>;
  using Number = double;
  static constexpr bool alone = true;
  const KdRow& row;
  const KdLoss& loss;
  int64_t n;  // elements of a working row: V, padded to 16 with -infinity or 0

  explicit OneRow(const KdRow& r) : row(r), loss(r.loss), n(padded(int(r.loss.V))) {}
  int64_t filled() const { return loss.V; }
  int64_t width() const { return kd_width(loss.V); }
  const RowSource& student() const { return row.student; }
  int count() const { return row.count; }
  KdForm form(int m) const { return row.teachers[m].form; }
  double share(int m) const { return row.teachers[m].share; }
  const RowSource& teacher(int m) const { return row.teachers[m].values; }
  double coef_kd() const { return row.coef_kd; }
  double coef_ce() const { return row.coef_ce; }
  W2S_INLINE double at_target(const A* x) const { return double(x[row.target]); }
  W2S_INLINE void take_target(A* g) const { g[row.target] -= A(row.coef_ce); }

  template <bool FINE = false, int N, class Step>
  W2S_INLINE void sums(double (&out)[N], const Step& step) const { row_sums_of<A, FINE>(n, out, step); }

  W2S_INLINE void load(const RowSource& s, A fill, A* x) const {
    widen<A>(s.data, s.dtype, int(loss.V), fill, x);
    const A* bias = static_cast<const A*>(s.bias);
    if (!bias) return;
    int64_t i = 0;
    for (; i + T::W <= loss.V; i += T::W) (T::load(x + i) + T::load(bias + i)).store(x + i);
    for (; i < loss.V; ++i) x[i] += bias[i];
  }

  // the largest of the row, 0 if that is -infinity
  W2S_INLINE T top(const A* x) const {
    T most[2] = {T::set(-infinity<A>), T::set(-infinity<A>)};
    int64_t i = 0;
    for (; i + 2 * T::W <= n; i += 2 * T::W) {
      most[0] = T::max(T::load(x + i), most[0]);
      most[1] = T::max(T::load(x + i + T::W), most[1]);
    }
    for (; i < n; i += T::W) most[0] = T::max(T::load(x + i), most[0]);
    const A found = T::max(most[0], most[1]).top();
    return T::set(found == -infinity<A> ? A(0) : found);
  }
};

// Rows [first, first + lanes) of the list; a last group that is not full repeats its last row.
template <class A>
struct Lanes {
  using Scalar = A;
  using T = Vec<A>;
  using Number = PerLane<A>;
  static constexpr bool alone = false;
  static constexpr int W = T::W;
  const KdRows& rows;
  const KdLoss& loss;
  int64_t n;  // elements of a working row: a vector a class
  int64_t index[W];

  Lanes(const KdRows& r, int64_t first, int64_t end) : rows(r), loss(r.loss), n(r.loss.V * W) {
    for (int l = 0; l < W; ++l) index[l] = r.index[first + l < end ? first + l : end - 1];
  }
  int64_t filled() const { return n; }
  int64_t width() const { return kd_short_width(loss.V); }
  const Rows& student() const { return rows.student; }
  int count() const { return rows.count; }
  KdForm form(int m) const { return rows.teachers[m].form; }
  double share(int m) const { return rows.teachers[m].share; }
  const Rows& teacher(int m) const { return rows.teachers[m].rows; }
  W2S_INLINE PerLane<A> each(const double* from) const {
    A lane[W];
    for (int l = 0; l < W; ++l) lane[l] = A(from[index[l]]);
    return T::load(lane);
  }
  W2S_INLINE PerLane<A> coef_kd() const { return each(rows.coef_kd); }
  W2S_INLINE PerLane<A> coef_ce() const { return each(rows.coef_ce); }
  W2S_INLINE PerLane<A> at_target(const A* x) const {
    A lane[W];
    for (int l = 0; l < W; ++l) lane[l] = x[rows.target[index[l]] * W + l];
    return T::load(lane);
  }
  W2S_INLINE void take_target(A* g) const {
    for (int l = 0; l < W; ++l) g[rows.target[index[l]] * W + l] -= A(rows.coef_ce[index[l]]);
  }

  template <bool FINE = false, int N, class Step>
  W2S_INLINE void sums(PerLane<A> (&out)[N], const Step& step) const {
    T sum[N];
    for (int k = 0; k < N; ++k) sum[k] = T::set(0);
    for (int64_t i = 0; i < n; i += W) step(i, sum);
    for (int k = 0; k < N; ++k) out[k] = sum[k];
  }

  W2S_INLINE void load(const Rows& s, A, A* x) const {
    for (int64_t v = 0; v < loss.V; v += W) {
      const int here = loss.V - v < W ? int(loss.V - v) : W;
      T square[W];
      for (int l = 0; l < W; ++l)
        square[l] = here == W ? load_any<A>(s.at(index[l], v), s.dtype, 0) : first_as<A>(s.at(index[l], v), s.dtype, 0, here);
      T::transpose(square);
      for (int k = 0; k < here; ++k) square[k].store(x + (v + k) * W);
    }
  }
  W2S_INLINE void store(const A* g, const Rows& to, int lanes) const {
    for (int64_t v = 0; v < loss.V; v += W) {
      const int here = loss.V - v < W ? int(loss.V - v) : W;
      T square[W];
      for (int k = 0; k < W; ++k) square[k] = k < here ? T::load(g + (v + k) * W) : T::set(0);
      T::transpose(square);
      A row[W];
      for (int l = 0; l < lanes; ++l) {
        square[l].store(row);
        narrow<A>(row, here, to.dtype, to.at(index[l], v));
      }
    }
  }
  W2S_INLINE T top(const A* x) const {
    T most = T::set(-infinity<A>);
    for (int64_t i = 0; i < n; i += W) most = T::max(T::load(x + i), most);
    return T::select(T::eq(most, T::set(-infinity<A>)), T::set(0), most);
  }
};
