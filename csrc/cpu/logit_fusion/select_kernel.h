// Top-k, top-p and min-p of one row without sorting it. Included once a target, after fusion_kernel.h.
//
// The kept set of all three is {z > value} u {z = value, index <= last} (order: value descending, index ascending).
// 1. A threshold that the set cannot pass (from the tile maxima for top-k; z >= lse + log((1 - p) / V) for top-p,
//    since all below it weighs less than 1 - p) cuts the row to its candidates, packed in index order.
// 2. Bisection on the value, a vector pass over the candidates a step (count and mass at or above it), narrows the boundary
//    to a hundred values or to equal ones; candidates that it has left behind are passed over no more.
// 3. Those alone are sorted and walked.
// Top-p alone of a long row lists no candidates, which may be most of it: see `nucleus_row`.
// Floor: one read of z for step 1; steps 2 and 3 touch candidates only. A histogram with scattered adds in place of step 2
// cost 9 ns a candidate, ten times more.

template <class A>
struct Tiles {  // per tile of TILE columns: max, sum of exp(z - max), columns above -inf
  std::vector<A> max, sum;
  std::vector<int32_t> count;
  explicit Tiles(int64_t V = 0) : max(size_t((V + TILE - 1) / TILE)), sum(max.size()), count(max.size()) {}
  void set(int64_t t, const A* z, int n, const TileInfo<A>& info, const Ahead& next = {}) {
    using W = Vec<A>;
    max[size_t(t)] = info.max;
    sum[size_t(t)] = exp_sum(z, n, info, next);
    int32_t columns = 0;
    for (int i = 0; i < padded(n); i += W::W)
      columns += __builtin_popcount(W::gt(W::load(z + i), W::set(-infinity<A>)).bits());
    count[size_t(t)] = columns;
  }
};

template <class A>
struct Candidates {
  std::unique_ptr<A[]> z, mass;  // mass = exp(z - top)
  std::unique_ptr<int32_t[]> index;
  int64_t n = 0, room = 0;
  void reserve(int64_t wanted) {
    if (wanted <= room) return;
    room = wanted;
    z.reset(new A[size_t(room)]);
    mass.reset(new A[size_t(room)]);
    index.reset(new int32_t[size_t(room)]);
  }
};

template <class A>
struct Selection {
  Cut<A> cut;
  A top = 0, by_min = -infinity<A>;  // and z - top >= by_min
};

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

struct Above {
  int64_t count = 0;
  double mass = 0;
};

// Candidates with z >= level; the arrays are padded with -inf and 0.
template <class A>
inline Above above(const Candidates<A>& c, A level) {
  using V = Vec<A>;
  const V least = V::set(level), zero = V::set(0);
  Above found;
  for (int64_t begin = 0; begin < c.n; begin += TILE) {
    const int64_t end = std::min<int64_t>(c.n, begin + TILE);
    V sum = zero;
    for (int64_t i = begin; i < end; i += V::W) {
      const auto m = V::ge(V::load(c.z.get() + i), least);
      sum = sum + V::select(m, V::load(c.mass.get() + i), zero);
      found.count += __builtin_popcount(m.bits());
    }
    found.mass += double(sum.sum());
  }
  return found;
}

template <class A>
inline void weigh(Candidates<A>& c, A top) {
  using V = Vec<A>;
  for (int64_t i = c.n; i < c.n + PAD; ++i) c.z[size_t(i)] = -infinity<A>;
  for (int64_t i = 0; i < c.n; i += V::W) vexp(V::load(c.z.get() + i) - V::set(top)).store(c.mass.get() + i);
}

// z and mass of the candidates with low <= z < high; from what these hold themselves
template <class A>
inline void between(const Candidates<A>& c, A low, A high, Candidates<A>& found) {
  using V = Vec<A>;
  const V least = V::set(low), end = V::set(high);
  int64_t n = 0;
  int32_t places[PAD];
  found.reserve(c.n + 2 * PAD);
  for (int64_t i = 0; i < c.n; i += V::W) {
    const V z = V::load(c.z.get() + i), mass = V::load(c.mass.get() + i);
    const auto in = V::ge(z, least) & V::gt(end, z);
    V::compress(found.mass.get() + n, places, mass, 0, in);
    n += V::compress(found.z.get() + n, places, z, 0, in);
  }
  for (int64_t i = n; i < n + PAD; ++i) found.z[size_t(i)] = -infinity<A>, found.mass[size_t(i)] = 0;
  found.n = n;
}

// The boundary value and index of the shortest prefix (value descending, index ascending) with `goal` columns or mass. All
// candidates are at least `level`.
template <class A, bool COUNT>
inline Above boundary(const Candidates<A>& c, A top, A level, double goal, Cut<A>& cut) {
  thread_local Candidates<A> narrowed;
  const Candidates<A>* some = &c;
  A low = level, high = std::nextafter(top, infinity<A>);
  int64_t from_low = c.n;
  Above at_high, over;  // over: at or above what was left behind
  // most boundaries are nearer to the top, and bisecting from the lowest number is slow
  A middle = level < top - A(64) ? top - A(64) : low + (high - low) / 2;
  for (int step = 0; step < 400 && from_low - at_high.count > 96 && low < middle && middle < high; ++step) {
    Above m = above(*some, middle);
    m.count += over.count, m.mass += over.mass;
    const bool enough = COUNT ? double(m.count) >= goal : m.mass >= goal;
    (enough ? low : high) = middle;
    if (enough) from_low = m.count;
    else at_high = m;
    middle = low + (high - low) / 2;
    if (2 * (from_low - at_high.count) > some->n) continue;
    between(*some, low, high, narrowed);
    some = &narrowed, over = at_high;
  }
  struct Item {
    A z, mass;  // the same mass as in sums over many: what is off in both does not count against the goal
    int32_t index;
    bool operator<(const Item& o) const { return z > o.z || (z == o.z && index < o.index); }
  };
  std::vector<Item> items;
  using V = Vec<A>;
  for (int64_t i = 0; i < c.n; i += V::W) {
    const V z = V::load(c.z.get() + i);
    for (uint32_t in = (V::ge(z, V::set(low)) & V::gt(V::set(high), z)).bits(); in; in &= in - 1) {
      const size_t at = size_t(i + __builtin_ctz(in));
      items.push_back({c.z[at], c.mass[at], c.index[at]});
    }
  }
  std::sort(items.begin(), items.end());
  Above at = at_high;
  for (const Item& item : items) {
    cut = {true, item.z, item.index};
    at.mass += double(item.mass);
    ++at.count;
    if (COUNT ? double(at.count) >= goal : at.mass >= goal) break;
  }
  return at;
}

// The filters' kept set of a row of finite lse, and candidates among which it is. z: V contiguous values.
template <class A>
inline Selection<A> filter_row(const A* z, int64_t V, const Tiles<A>& tiles, const FilterValues& f, double lse,
                               Candidates<A>& found) {
  const A top = *std::max_element(tiles.max.begin(), tiles.max.end());
  const bool k_on = f.top_k > 0 && f.top_k < V, p_on = f.top_p < 1, m_on = f.min_p > 0;
  const A least = std::numeric_limits<A>::lowest();
  const A by_min = m_on ? A(least_distance(f.min_p)) : -infinity<A>;
  A level = least;
  if (k_on) level = top_k_level(tiles, f.top_k);
  else if (p_on) level = std::max(least, A(lse + std::log((1 - f.top_p) / double(V)) - 1e-3));
  else level = std::max(least, A(double(top) + by_min - 1e-3 * std::max(1.0, std::abs(double(top)))));
  collect(z, V, tiles, level, found);
  Selection<A> s;
  s.cut = {true, least, V};
  weigh(found, top);
  double mass = std::exp(lse - double(top));
  if (k_on && f.top_k < found.n) mass = boundary<A, true>(found, top, level, double(f.top_k), s.cut).mass;
  else if (k_on) mass = above(found, level).mass;
  else if (p_on && found.n <= 96 && found.n == std::count_if(z, z + V, [](A x) { return x > -infinity<A>; }))
    mass = std::accumulate(found.mass.get(), found.mass.get() + found.n, 0.0);  // a few tokens: exactly, as they are walked
  if (p_on) {
    const Cut<A> by_count = s.cut;
    boundary<A, false>(found, top, level, nucleus_goal(f.top_p, mass), s.cut);
    if (s.cut.value < by_count.value || (s.cut.value == by_count.value && s.cut.last > by_count.last)) s.cut = by_count;
  }
  s.top = top;
  s.by_min = by_min;
  return s;
}

// What top-p keeps of a long row: {z > cut.value} u {z = cut.value, index <= cut.last}, and its mass in each tile.
template <class A>
struct Nucleus {
  Cut<A> cut;
  A top = 0;
  int64_t kept = 0;
  std::vector<double> mass;
  bool has(A z, int64_t index) const { return z > cut.value || (z == cut.value && index <= cut.last); }
};

constexpr int64_t LONG_ROW = 1 << 14, GROUPS = 256;  // of PAD neighbours each, which are a sample of a row

// The level below which `wanted` of the mass of all lies, as a sample has it; `scale`: of the whole row over the sample's.
template <class A>
inline A level_below(const Candidates<A>& sample, double all, double scale, double wanted, A low, A high) {
  for (int step = 0; step < 12; ++step) {  // to a thousandth of a nat
    const A middle = low + (high - low) / 2;
    const bool more = (all - above(sample, middle).mass) * scale > wanted;
    (more ? high : low) = middle;
  }
  return low + (high - low) / 2;
}

// Mass that is left out is made of small terms, which a sample tells well, however few tokens hold what is kept: it brackets
// the boundary. One pass sums up what is above the bracket, tile by tile, and lists what is inside, a few in a hundred; the
// sums say whether the boundary is inside. False, and nothing is found, where it is not.
template <class A>
inline bool nucleus_row(const A* z, int64_t V, const Tiles<A>& tiles, double top_p, double lse, Candidates<A>& found, Nucleus<A>& kept) {
  using W = Vec<A>;
  if (V < LONG_ROW) return false;
  const A top = *std::max_element(tiles.max.begin(), tiles.max.end());
  const double mass = std::exp(lse - double(top)), goal = nucleus_goal(top_p, mass), left = mass - goal;
  found.reserve(V + 2 * PAD);
  const int64_t step = V / GROUPS / PAD * PAD;
  for (int64_t g = 0; g < GROUPS; ++g) std::copy_n(z + g * step, PAD, found.z.get() + g * PAD);
  found.n = GROUPS * PAD;
  weigh(found, top);
  const double scale = double(V) / double(found.n);
  const double all = above(found, -infinity<A>).mass;
  const A least = std::max(std::numeric_limits<A>::lowest(), A(lse + std::log((1 - top_p) / double(V)) - 1)), most = top;
  const A guess = level_below(found, all, scale, left, least, most);
  double squares = 0;
  for (int64_t i = 0; i < found.n; ++i)
    if (found.z[size_t(i)] < guess) squares += double(found.mass[size_t(i)]) * double(found.mass[size_t(i)]);
  const double spread = 4 * scale * std::sqrt(squares);
  if (!(spread < left / 2)) return false;
  const A low = level_below(found, all, scale, left - spread, least, guess);
  const A high = level_below(found, all, scale, left + spread, guess, most);

  kept.mass.assign(tiles.max.size(), 0.0);
  kept.kept = 0, kept.top = top;
  const W vlow = W::set(low), vhigh = W::set(high), line = W::set(top), zero = W::set(0);
  double over = 0;
  int64_t n = 0;
  for (size_t t = 0; t < tiles.max.size(); ++t) {
    if (!(tiles.max[t] >= low)) continue;
    const int64_t begin = int64_t(t) * TILE, end = std::min<int64_t>(V, begin + TILE);
    W sum[2] = {zero, zero};
    for (int64_t i = begin; i < end; i += W::W) {  // what pads a row is -infinity
      const W x = W::load(z + i);
      const auto in = W::ge(x, vhigh);
      W& part = sum[(i / W::W) & 1];
      part = part + W::select(in, vexp(x - line), zero);
      kept.kept += __builtin_popcount(in.bits());
      const auto inside = W::ge(x, vlow) & W::gt(vhigh, x);
      if (inside.any()) n += W::compress(found.z.get() + n, found.index.get() + n, x, int32_t(i), inside);
    }
    kept.mass[t] = double((sum[0] + sum[1]).sum());
    over += kept.mass[t];
    if (n > V / 8) return false;
  }
  found.n = n;
  weigh(found, top);
  if (!(over < goal) || !(over + above(found, low).mass >= goal)) return false;
  boundary<A, false>(found, top, low, goal - over, kept.cut);
  for (int64_t i = 0; i < n; ++i)
    if (kept.has(found.z[size_t(i)], found.index[size_t(i)])) {
      kept.mass[size_t(found.index[size_t(i)] / TILE)] += double(found.mass[size_t(i)]);
      ++kept.kept;
    }
  return true;
}

// Takes the mass of candidates outside the kept set away; returns how many stay.
template <class A>
inline int64_t keep(const Selection<A>& s, Candidates<A>& c) {
  using V = Vec<A>;
  const V value = V::set(s.cut.value), top = V::set(s.top), least = V::set(s.by_min), zero = V::set(0);
  int64_t kept = 0;
  for (int64_t i = 0; i < c.n; i += V::W) {
    const V z = V::load(c.z.get() + i);
    const auto m = V::ge(z, value) & V::ge(z - top, least);
    uint32_t in = m.bits() & (c.n - i < V::W ? (1u << (c.n - i)) - 1 : ~0u);
    V::select(m, V::load(c.mass.get() + i), zero).store(c.mass.get() + i);
    for (uint32_t tie = (V::eq(z, value) & m).bits() & in; tie; tie &= tie - 1) {
      const int64_t at = i + __builtin_ctz(tie);
      if (c.index[size_t(at)] <= s.cut.last) continue;
      c.mass[size_t(at)] = 0;
      in &= ~(1u << (at - i));
    }
    kept += __builtin_popcount(in);
  }
  return kept;
}

// The least x with x - top >= distance: top + distance up to a rounding, which ties would show.
template <class A>
inline A least_value(A top, A distance) {
  const A lowest = std::numeric_limits<A>::lowest();
  if (distance == -infinity<A>) return distance;
  A x = std::max(lowest, top + distance);
  while (x > lowest && std::nextafter(x, lowest) - top >= distance) x = std::nextafter(x, lowest);
  while (!(x - top >= distance)) x = std::nextafter(x, top);
  return x;
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
  if (f.plausible == 1) return {true, least_value(A(total.max), A(least_distance(f.level))), V};
  thread_local Candidates<A> found;
  const A* z = direct ? static_cast<const A*>(f.base.at(r, 0)) : copy.get();
  return filter_row(z, V, tiles, FilterValues{0, f.level, 0}, total.value(), found).cut;
}
