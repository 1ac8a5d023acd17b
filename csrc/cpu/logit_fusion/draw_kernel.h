// The end of a row of fused_sample or dynamic_sample, from its tiles' (max, sum). Included once a target.

template <class A>
struct RowDraw {
  const Fusion& f;
  int64_t row;
  double heat;
  const Cut<A>& cut;
  const Tiles<A>& tiles;

  void finish(const Draws& draws, bool greedy, const A* stage, const SampleOutput& out) const {
    LogSumExp total;
    int64_t columns = 0;
    for (size_t t = 0; t < tiles.max.size(); ++t) {
      total.add(tiles.max[t], tiles.sum[t]);
      columns += tiles.count[t];
    }
    const double lse = total.value();
    int64_t token = -1, kept = 0;
    A z = std::numeric_limits<A>::quiet_NaN();
    if (std::isfinite(lse)) {
      if (greedy) {
        kept = 1;
        token = first_of(A(total.max), z);
      } else if (draws.filters.any(f.V)) {
        thread_local Candidates<A> found;
        thread_local Nucleus<A> nucleus;
        if (draws.filters.mass_alone(f.V) && nucleus_row(stage, f.V, tiles, draws.filters.top_p, lse, found, nucleus)) {
          kept = nucleus.kept;
          token = inside(nucleus, stage, draws.uniform[size_t(row)], z);
        } else {
          kept = keep(filter_row(stage, f.V, tiles, draws.filters, lse, found), found);
          token = among(found, draws.uniform[size_t(row)], z);
        }
      } else {
        kept = columns;
        token = anywhere(total, draws.uniform[size_t(row)], z);
      }
    }
    out.write(row, token, (double(z) - total.max) - total.log_sum(), lse, kept);
  }

  // z of one tile again
  int again(size_t t, A* dst) const {
    const int64_t c = int64_t(t) * TILE;
    const int n = int(std::min<int64_t>(TILE, f.V - c));
    FusedRow<A> z;
    z.begin(f, row, heat, cut);
    z.tile(c, n, dst);
    return n;
  }

  int64_t first_of(A top, A& value) const {
    size_t t = 0;
    while (tiles.max[t] != top) ++t;
    A z[TILE];
    const int n = again(t, z);
    int i = 0;
    while (i < n - 1 && z[i] != top) ++i;
    value = z[i];
    return int64_t(t) * TILE + i;
  }

  // First of n values at which `before` plus the mass so far exceeds the goal; if rounding leaves none, the last with mass.
  static int64_t scan(const A* z, int64_t n, A top, double before, double goal) {
    using V = Vec<A>;
    A e[V::W];
    int64_t last = -1;
    for (int64_t i = 0; i < n; i += V::W) {
      vexp(V::load(z + i) - V::set(top)).store(e);
      for (int64_t j = 0; j < std::min<int64_t>(V::W, n - i); ++j) {
        if (!(e[j] > 0)) continue;
        last = i + j;
        before += double(e[j]);
        if (before > goal) return last;
      }
    }
    return last;
  }

  int64_t anywhere(const LogSumExp& total, double u, A& value) const {
    const double goal = u * total.sum;
    double before = 0;
    size_t chosen = 0;
    for (size_t t = 0; t < tiles.max.size(); ++t) {
      const double mass = tiles.max[t] == -infinity<A> ? 0 : double(tiles.sum[t]) * std::exp(double(tiles.max[t]) - total.max);
      if (mass > 0) chosen = t;
      if (before + mass > goal) break;
      before += mass;
    }
    A z[TILE];
    const int n = again(chosen, z);
    // in units of the tile's own maximum, where no exponential underflows; a goal past the tile gives its last column
    const double unit = std::exp(total.max - double(tiles.max[chosen]));
    const int64_t i = scan(z, n, tiles.max[chosen], 0, std::max(0.0, goal - before) * unit);
    value = z[i];
    return int64_t(chosen) * TILE + i;
  }

  // Of a nucleus and the row it is of: a tile by its mass, then a column of the tile.
  int64_t inside(const Nucleus<A>& nucleus, const A* row_z, double u, A& value) const {
    using V = Vec<A>;
    double total = 0, before = 0;
    for (const double mass : nucleus.mass) total += mass;
    const double goal = u * total;
    size_t chosen = 0;
    for (size_t t = 0; t < nucleus.mass.size(); ++t) {
      const double mass = nucleus.mass[t];
      if (mass > 0) chosen = t;
      if (before + mass > goal) break;
      before += mass;
    }
    const int64_t begin = int64_t(chosen) * TILE, end = std::min<int64_t>(f.V, begin + TILE);
    before = std::min(before, goal);  // past the last tile with mass it is the whole
    int64_t token = -1;
    A e[V::W];
    for (int64_t i = begin; i < end; i += V::W) {
      vexp(V::load(row_z + i) - V::set(nucleus.top)).store(e);
      for (int64_t j = i; j < std::min<int64_t>(i + V::W, end); ++j) {
        if (!(e[j - i] > 0) || !nucleus.has(row_z[j], j)) continue;
        token = j, value = row_z[j];
        before += double(e[j - i]);
        if (before > goal) return token;
      }
    }
    return token;
  }

  static int64_t among(const Candidates<A>& c, double u, A& value) {
    using V = Vec<A>;
    std::vector<double> part(size_t((c.n + TILE - 1) / TILE));
    double total = 0;
    size_t last = 0;
    for (size_t p = 0; p < part.size(); ++p) {
      V sum = V::set(0);
      const int64_t end = std::min<int64_t>(c.n, int64_t(p + 1) * TILE);
      for (int64_t i = int64_t(p) * TILE; i < end; i += V::W) sum = sum + V::load(c.mass.get() + i);
      part[p] = double(sum.sum());
      total += part[p];
      if (part[p] > 0) last = p;
    }
    const double goal = u * total;
    double before = 0;
    size_t p = 0;
    for (; p < last && before + part[p] <= goal; ++p) before += part[p];
    int64_t chosen = int64_t(p) * TILE;
    for (int64_t i = chosen; i < std::min<int64_t>(c.n, int64_t(p + 1) * TILE); ++i) {
      if (!(c.mass[size_t(i)] > 0)) continue;
      chosen = i;
      before += double(c.mass[size_t(i)]);
      if (before > goal) break;
    }
    value = c.z[size_t(chosen)];
    return c.index[size_t(chosen)];
  }
};
