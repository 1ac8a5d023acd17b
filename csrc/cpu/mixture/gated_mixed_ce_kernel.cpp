// gated_mixed_ce: the sum of f (g CE(a, y) + (1 - g) CE(b, y)), or of f CE(g a + (1 - g) b, y), over the rows, and its
// gradients: with z = a, b or the mixture and dz = f (softmax(z) - 1_y), da = g dz, db = (1 - g) dz and
//   dg = f (CE(a, y) - CE(b, y)), or sum_c dz_c (a_c - b_c).
// Floor: a and b read once, a tensor written for each gradient.
#include "cpu/mixture/gated_mixed_ce.h"

#include "cpu/target_begin.h"

#include "cpu/mixture/rows_kernel.h"

// What a group of rows brings besides logits; the class of a row that does not count is 0.
template <class A>
struct Labels {
  using V = Vec<A>;
  int64_t first;
  int count;
  int64_t own[V::W] = {};
  A keep[V::W] = {}, gate[PAD];

  Labels(const GatedMixedCe& s, int64_t first, int count) : first(first), count(count) {
    for (int i = 0; i < count; ++i) {
      const int64_t y = s.target[first + i];
      keep[i] = y != s.ignored;
      own[i] = y != s.ignored ? y : 0;
    }
    widen(static_cast<const char*>(s.gate.data) + first * bytes_of(s.gate.dtype), s.gate.dtype, count, A(0), gate);
  }
  // x in rows that count, elsewhere 0
  W2S_INLINE V kept(V x) const { return V::select(V::gt(V::load(keep), V::set(0)), x, V::set(0)); }
  // each row's element of its own class
  W2S_INLINE V of_own(const A* z) const {
    A found[V::W];
    for (int i = 0; i < V::W; ++i) found[i] = z[own[i] * V::W + i];
    return V::load(found);
  }
};

// f(e^(z - top)), block() after every 16, and sum e^(z - top); with STORE each takes the place of its z
template <bool STORE, class A, class V, class F, class G>
W2S_INLINE V exp_sum(LaneRows<A>& rows, V top, const F& f, const G& block) {
  Total<V> sum;
  rows.each(
      [&](V z, A* at) {
        V d;
        const V e = exp_below(z, top, d);
        sum.part = sum.part + e;
        f(e);
        if (STORE) e.store(at);
      },
      [&] { sum.block(), block(); });
  return sum.sum;
}
template <class A, class V, class F, class G>
W2S_INLINE V exp_sum(LaneRows<A>& rows, V top, bool store, const F& f, const G& block) {
  return store ? exp_sum<true>(rows, top, f, block) : exp_sum<false>(rows, top, f, block);
}

// `ahead`, which is top - own, is there first, so that a shift that all scores share cancels
template <class V>
W2S_INLINE V cross_entropy(V ahead, V sum) {
  typename V::Scalar log_sum[V::W];
  sum.store(log_sum);
  log_row(log_sum, V::W);
  return ahead + V::load(log_sum);
}

// exponentials become scale (e / sum - 1_y), 0 in rows that do not count
template <class A, class V>
W2S_INLINE void to_gradient(LaneRows<A>& rows, const Labels<A>& labels, V sum, V scale) {
  const V share = scale / sum;
  rows.each([&](V e, A* at) { labels.kept(e * share).store(at); });
  A own[V::W];
  labels.kept(scale).store(own);
  for (int i = 0; i < V::W; ++i) rows.z()[labels.own[i] * V::W + i] -= own[i];
}

// one expert's cross-entropy; its gradient, scaled, to `to`
template <class A, class V>
W2S_INLINE V expert(const Rows& from, const Rows& to, LaneRows<A>& rows, const Labels<A>& labels, V scale) {
  const V top = rows.read(from, labels.first, labels.count), ahead = top - labels.of_own(rows.z());
  const V sum = exp_sum(rows, top, to.data != nullptr, [](V) {}, [] {});
  if (to.data) {
    to_gradient(rows, labels, sum, scale);
    rows.write(to, labels.first, labels.count);
  }
  return cross_entropy(ahead, sum);
}

// the mixture's cross-entropy, and its derivative in the gate to `gap`
template <class A, class V>
W2S_INLINE V mixed(const GatedMixedCe& s, LaneRows<A>& rows, LaneRows<A>& others, const Labels<A>& labels, V factor, V& gap) {
  const V zero = V::set(0), g = V::load(labels.gate), shares[] = {g, V::set(1) - g};
  rows.read(s.a, labels.first, labels.count);
  others.read(s.b, labels.first, labels.count);
  V top = V::set(-infinity<A>);
  A* apart = others.z();  // a - b
  rows.each([&](V a, A* at) {
    const V b = V::load(apart), z = V::fma(g, a, shares[1] * b);
    z.store(at);
    top = V::max(z, top);
    (a - b).store(apart);
    apart += V::W;
  });
  const V ahead = top - labels.of_own(rows.z()), apart_own = labels.of_own(others.z());
  const bool wanted = s.da.data || s.db.data;
  Total<V> moved;
  apart = others.z();
  const auto move = [&](V e) {
    moved.part = moved.part + V::select(V::eq(e, zero), zero, e * V::load(apart));  // not of classes that both leave out
    apart += V::W;
  };
  const V sum = exp_sum(rows, top, wanted, move, [&] { moved.block(); });
  gap = moved.sum / sum - apart_own;
  if (wanted) to_gradient(rows, labels, sum, factor);
  const Rows* to[] = {&s.da, &s.db};
  for (int k = 0; k < 2; ++k) {
    if (!to[k]->data) continue;
    A* scaled = others.z();
    rows.each([&](V dz, A*) { labels.kept(shares[k] * dz).store(scaled), scaled += V::W; });
    others.write(*to[k], labels.first, labels.count);
  }
  return cross_entropy(ahead, sum);
}

template <class A>
inline double gated_mixed_ce_as(const GatedMixedCe& s) {
  using V = Vec<A>;
  std::vector<double> parts(size_t(pieces(s.n, V::W)));
  A* dgate = static_cast<A*>(s.dgate.data);
  each_group<A>(s.n, s.C, [&](LaneRows<A>& rows, LaneRows<A>& others, int64_t first, int count) {
    const Labels<A> labels(s, first, count);
    const V factor = V::set(A(s.factor)), g = V::load(labels.gate), rest = V::set(1) - g;
    V loss, gap;
    if (s.logits) {
      loss = mixed(s, rows, others, labels, factor, gap);
    } else {
      const V a = expert(s.a, s.da, rows, labels, factor * g), b = expert(s.b, s.db, rows, labels, factor * rest);
      loss = V::fma(g, a, rest * b);
      gap = a - b;
    }
    A lane[V::W];
    labels.kept(loss).store(lane);
    double sum = 0;
    for (int i = 0; i < count; ++i) sum += double(lane[i]);
    parts[size_t(first / V::W)] = sum;
    labels.kept(factor * gap).store(lane);
    std::copy_n(lane, count, dgate + first);
  });
  double total = 0;
  for (const double part : parts) total += part;
  return s.factor * total;
}

W2S_KERNELS(GatedMixedCeKernels, gated_mixed_ce_as<Real>)

#include "cpu/target_end.h"
