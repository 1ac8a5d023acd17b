// Top-k, top-p and min-p of one row without sorting it. Included once a target, after fusion_kernel.h.
//
// The kept set of all three is {z > value} u {z = value, index <= last} (order: value descending, index ascending).
// 1. A threshold that the set cannot pass (from the tile maxima for top-k; z >= lse + log((1 - p) / V) for top-p,
//    since all below it weighs less than 1 - p) cuts the row to its candidates, packed in index order.
// 2. A histogram of the candidates' distance below the maximum (counts and masses) finds the bin of the boundary.
// 3. That bin alone is sorted and walked.
// Floor: one read of z for step 1; steps 2 and 3 touch candidates only.

template <class A>
struct Tiles {  // per tile of TILE columns: max, sum of exp(z - max), columns above -inf
  std::vector<A> max, sum;
  std::vector<int32_t> count;
  explicit Tiles(int64_t V = 0) : max(size_t((V + TILE - 1) / TILE)), sum(max.size()), count(max.size()) {}
  void set(int64_t t, const A* z, int n, const TileInfo<A>& info) {
    using W = Vec<A>;
    max[size_t(t)] = info.max;
    sum[size_t(t)] = exp_sum(z, n, info);
    int32_t columns = 0;
    for (int i = 0; i < padded(n); i += W::W)
      columns += __builtin_popcount(W::gt(W::load(z + i), W::set(-infinity<A>)).bits());
    count[size_t(t)] = columns;
  }
};

template <class A>
struct Candidates {
  std::unique_ptr<A[]> z;
  std::unique_ptr<int32_t[]> index;
  int64_t n = 0, room = 0;
  void reserve(int64_t wanted) {
    if (wanted <= room) return;
    room = wanted;
    z.reset(new A[size_t(room)]);
    index.reset(new int32_t[size_t(room)]);
  }
};

template <class A>
struct Selection {
  Cut<A> cut;
  A top = 0, by_min = -infinity<A>;  // and z - top >= by_min
};

constexpr int BINS = 1024;

// z of candidates >= level, packed in index order; whole tiles below it are skipped.
template <class A>
inline void collect(const A* z, int64_t V, const Tiles<A>& tiles, A level, Candidates<A>& found) {
  using W = Vec<A>;
  found.reserve(V + 2 * PAD);
  const auto least = W::set(level);
  int64_t n = 0;
  for (size_t t = 0; t < tiles.max.size(); ++t) {
    if (!(tiles.max[t] >= level) || tiles.max[t] == -infinity<A>) continue;
    const int64_t begin = int64_t(t) * TILE, end = std::min<int64_t>(V, begin + TILE);
    int64_t i = begin;
    for (; i + W::W <= end; i += W::W) {
      const W x = W::load(z + i);
      const auto m = W::ge(x, least);
      if (m.any()) n += W::compress(found.z.get() + n, found.index.get() + n, x, int32_t(i), m);
    }
    for (; i < end; ++i)
      if (z[i] >= level) {
        found.z[size_t(n)] = z[i];
        found.index[size_t(n++)] = int32_t(i);
      }
  }
  found.n = n;
}

// The largest value that surely is not above the k-th largest: the k-th largest tile maximum, if there are k tiles.
template <class A>
inline A top_k_level(const Tiles<A>& tiles, int64_t k) {
  if (k > int64_t(tiles.max.size())) return std::numeric_limits<A>::lowest();
  std::vector<A> best(tiles.max);
  std::nth_element(best.begin(), best.begin() + (k - 1), best.end(), std::greater<A>());
  return std::max(best[size_t(k - 1)], std::numeric_limits<A>::lowest());
}

template <class A>
struct Histogram {
  double mass[BINS];
  int64_t count[BINS];
  A top, scale;
  W2S_INLINE int bin(A z) const {
    const A x = (top - z) * scale;
    return x < A(BINS - 1) ? int(x) : BINS - 1;
  }
};

// Walks the sorted elements of one bin: prefix in (value descending, index ascending) order.
template <class A>
struct Walk {
  std::vector<std::pair<A, int32_t>> items;
  void load(const Candidates<A>& c, const Histogram<A>& h, int bin) {
    items.clear();
    for (int64_t i = 0; i < c.n; ++i)
      if (h.bin(c.z[size_t(i)]) == bin) items.emplace_back(c.z[size_t(i)], c.index[size_t(i)]);
    std::sort(items.begin(), items.end(),
              [](const auto& x, const auto& y) { return x.first > y.first || (x.first == y.first && x.second < y.second); });
  }
};

// Boundary of top-k and top-p (k = 0 and p >= 1 are off) among candidates; `total` is the row's mass over exp(top).
template <class A>
inline Selection<A> boundary(const Candidates<A>& c, A top, A level, int64_t k, double p, double total) {
  thread_local Histogram<A> h;
  thread_local Walk<A> walk;
  std::fill_n(h.mass, BINS, 0.0);
  std::fill_n(h.count, BINS, 0);
  const A range = std::min<A>(top - level, A(64));
  h.top = top;
  h.scale = range > 0 ? A(BINS) / range : A(0);
  const A* z = c.z.get();
  using V = Vec<A>;
  A e[V::W], b[V::W];
  for (int64_t i = 0; i < c.n; i += V::W) {
    const int m = int(std::min<int64_t>(V::W, c.n - i));
    const V below = V::load(z + i) - V::set(top);  // the buffer has room past n
    vexp(below).store(e);
    below.store(b);
    for (int j = 0; j < m; ++j) {
      const A x = -b[j] * h.scale;
      const int at = x < A(BINS - 1) ? int(x) : BINS - 1;
      h.mass[at] += double(e[j]);
      ++h.count[at];
    }
  }
  Selection<A> s;
  s.cut.active = true;
  int64_t limit = c.n, before = 0;
  double mass = 0, mass_k = total;
  int bin = 0, bin_k = -1;
  if (k > 0 && k < c.n) {
    limit = k;
    for (bin = 0; before + h.count[bin] < k; ++bin) {
      before += h.count[bin];
      mass += h.mass[bin];
    }
    bin_k = bin;
    walk.load(c, h, bin);
    mass_k = mass;
    for (int64_t i = 0; i < k - before; ++i) mass_k += std::exp(double(walk.items[size_t(i)].first) - double(top));
    s.cut.value = walk.items[size_t(k - before - 1)].first;
    s.cut.last = walk.items[size_t(k - before - 1)].second;
  } else if (k > 0) {
    mass_k = 0;
    for (int i = 0; i < BINS; ++i) mass_k += h.mass[i];
  }
  if (p >= 1) return s;
  const double target = p * mass_k;
  before = 0;
  mass = 0;
  for (bin = 0; bin < BINS - 1 && before + h.count[bin] < limit && mass + h.mass[bin] < target; ++bin) {
    before += h.count[bin];
    mass += h.mass[bin];
  }
  while (bin > 0 && h.count[bin] == 0) --bin, before -= h.count[bin], mass -= h.mass[bin];
  if (bin != bin_k) walk.load(c, h, bin);
  size_t i = 0;
  for (; i < walk.items.size(); ++i) {
    mass += std::exp(double(walk.items[i].first) - double(top));
    ++before;
    if (mass >= target || before == limit) break;
  }
  i = std::min(i, walk.items.size() - 1);
  s.cut.value = walk.items[i].first;
  s.cut.last = walk.items[i].second;
  return s;
}

// The filters' kept set of a row of finite lse, and candidates among which it is. z: V contiguous values.
template <class A>
inline Selection<A> filter_row(const A* z, int64_t V, const Tiles<A>& tiles, const FilterValues& f, double lse,
                               Candidates<A>& found) {
  const A top = *std::max_element(tiles.max.begin(), tiles.max.end());
  const double total = std::exp(lse - double(top));
  const bool k_on = f.top_k > 0 && f.top_k < V, p_on = f.top_p < 1, m_on = f.min_p > 0;
  const A least = std::numeric_limits<A>::lowest();
  const A by_min = m_on ? A(std::log(f.min_p)) : -infinity<A>;
  A level = least;
  if (k_on) level = top_k_level(tiles, f.top_k);
  else if (p_on) level = std::max(least, A(lse + std::log((1 - f.top_p) / double(V)) - 1e-3));
  else level = std::max(least, A(double(top) + by_min - 1e-3 * std::max(1.0, std::abs(double(top)))));
  collect(z, V, tiles, level, found);
  Selection<A> s;
  s.cut = {true, least, V};
  if (p_on || (k_on && f.top_k < found.n)) s = boundary(found, top, level, k_on ? f.top_k : 0, f.top_p, total);
  s.top = top;
  s.by_min = by_min;
  return s;
}

// Packs the candidates down to the kept set, in index order.
template <class A>
inline void keep(const Selection<A>& s, Candidates<A>& c) {
  int64_t n = 0;
  for (int64_t i = 0; i < c.n; ++i) {
    const A x = c.z[size_t(i)];
    const int32_t at = c.index[size_t(i)];
    const bool in = x > s.cut.value || (x == s.cut.value && at <= s.cut.last);
    c.z[size_t(n)] = x;
    c.index[size_t(n)] = at;
    n += in && x - s.top >= s.by_min;
  }
  c.n = n;
}

// The plausible set of a row of the base (kind 1: P >= level max P; kind 2: its nucleus), or no cut for a row that has
// none. `row` (V + PAD entries) is scratch for rows that are not of type A.
template <class A>
inline Cut<A> plausible_cut(const Fusion& f, int64_t r) {
  if (f.plausible == 0 || (f.plausible == 2 && f.level >= 1)) return {};
  const int64_t V = f.V;
  const bool direct = f.base.dtype == (sizeof(A) == 8 ? Dtype::f64 : Dtype::f32);
  std::unique_ptr<A[]> copy(direct ? nullptr : new A[size_t(V + PAD)]);
  A buffer[TILE];
  Tiles<A> tiles(V);
  LogSumExp total;
  for (size_t t = 0; t < tiles.max.size(); ++t) {
    const int64_t c = int64_t(t) * TILE;
    const int n = int(std::min<int64_t>(TILE, V - c));
    A* z = direct ? buffer : copy.get() + c;
    widen<A>(f.base.at(r, c), f.base.dtype, n, -infinity<A>, z);
    tiles.max[t] = tile_max(z, n);
    tiles.sum[t] = tile_exp_sum(z, n, tiles.max[t]);
    total.add(tiles.max[t], tiles.sum[t]);
  }
  if (!std::isfinite(total.value())) return {};
  if (f.plausible == 1) return {true, A(total.max + std::log(f.level)), V};
  thread_local Candidates<A> found;
  const A* z = direct ? static_cast<const A*>(f.base.at(r, 0)) : copy.get();
  return filter_row(z, V, tiles, FilterValues{0, f.level, 0}, total.value(), found).cut;
}
