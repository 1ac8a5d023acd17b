// One row of z in tiles. Included once a target (no include guard); see cpu/vec.h.
//
// A float32 row is read where it lies; other dtypes are widened tile by tile into L1. Only a row's last tile is copied
// and padded, so the loops have no tails. A tile where NaN appears is done again by the exact scalar rules.

// Columns outside {base > value} u {base = value, index <= last} are not plausible.
template <class A>
struct Cut {
  bool active = false;
  A value = 0;
  int64_t last = 0;
};

template <class A>
struct TileInfo {
  A max;
  bool nan;
};

// n columns from c of one tensor's row as A, padded with `fill` if that is needed; `buffer` holds a tile.
template <class A>
W2S_INLINE const A* fetch(const Rows& r, int64_t row, int64_t c, int n, A* buffer, A fill = A(0)) {
  const void* p = r.at(row, c);
  const bool same = (r.dtype == Dtype::f64) == (sizeof(A) == 8) && (r.dtype == Dtype::f32 || r.dtype == Dtype::f64);
  if (same && n == padded(n)) return static_cast<const A*>(p);
  widen<A>(p, r.dtype, n, fill, buffer);
  return buffer;
}

// Where the next tile of each model begins: asked for while this one's exponentials are made, as no prefetcher of the
// hardware goes from page to page by itself, and a row is read page after page.
struct Ahead {
  const char* start[3];
  int bytes[3], streams = 0;
  void add(const Rows& r, int64_t row, int64_t c) {
    if (streams == 3) return;
    start[streams] = static_cast<const char*>(r.at(row, c));
    bytes[streams++] = int(r.bytes);
  }
  // what holds columns [i, i + n) of it
  W2S_INLINE void ask(int i, int n) const {
    for (int s = 0; s < streams; ++s) {
      const char* p = start[s] + i * bytes[s];
      for (int at = 0; at < n * bytes[s]; at += 64) __builtin_prefetch(p + at);
    }
  }
};

template <class A>
struct FusedRow {
  static constexpr int MAX_BUFFERED = 3;
  const Fusion* f = nullptr;
  int64_t row = 0;
  A base_weight = 1, heat = 1;
  const double* w = nullptr;
  Cut<A> cut;
  A buffer[MAX_BUFFERED][TILE];

  void begin(const Fusion& fusion, int64_t r, double temperature, const Cut<A>& c) {
    f = &fusion;
    row = r;
    base_weight = A(fusion.base_weight);
    heat = A(temperature);
    w = fusion.weights.data() + r * fusion.K;
    cut = c;
  }

  template <bool FIRST, bool EXPERT, bool ANTI, bool LAST>
  W2S_INLINE void add(const A* base, const A* e, const A* a, A weight, int n, A* dst, TileInfo<A>& info) const {
    using V = Vec<A>;
    const V bw = V::set(base_weight), wk = V::set(weight);
    V top = V::set(-infinity<A>);
    auto bad = V::Mask::none();
    for (int i = 0; i < padded(n); i += V::W) {
      V s = FIRST ? V::load(base + i) * bw : V::load(dst + i);
      if constexpr (EXPERT) {
        V d = V::load(e + i);
        if constexpr (ANTI) d = d - V::load(a + i);
        s = V::fma(wk, d, s);
      }
      if constexpr (LAST) {
        bad = bad | V::nan(s);
        top = V::max(s, top);
      }
      s.store(dst + i);
    }
    if constexpr (LAST) info = {top.top(), bad.any()};
  }

  template <bool FIRST, bool LAST>
  W2S_INLINE void add_expert(const A* base, int k, int64_t c, int n, A* dst, TileInfo<A>& info) {
    const A* e = fetch(f->expert[size_t(k)], row, c, n, buffer[1]);
    if (const Rows* r = f->anti_of(k)) {
      add<FIRST, true, true, LAST>(base, e, fetch(*r, row, c, n, buffer[2]), A(w[k]), n, dst, info);
    } else {
      add<FIRST, true, false, LAST>(base, e, nullptr, A(w[k]), n, dst, info);
    }
  }

  // What `tile` reads for the columns from c on.
  Ahead ahead(int64_t c) const {
    Ahead next;
    if (c >= f->V) return next;
    next.add(f->base, row, c);
    for (int k = 0; k < f->K; ++k) {
      next.add(f->expert[size_t(k)], row, c);
      if (const Rows* r = f->anti_of(k)) next.add(*r, row, c);
    }
    return next;
  }

  // One expert, all of one type of 16 bits: they are widened in registers, not by way of tiles in L1.
  bool short_of_one_type() const {
    const Dtype dtype = f->base.dtype;
    if (sizeof(A) == 8 || f->K != 1 || (dtype != Dtype::bf16 && dtype != Dtype::f16)) return false;
    const Rows* r = f->anti_of(0);
    return f->expert[0].dtype == dtype && (!r || r->dtype == dtype);
  }

  template <bool BF16, bool ANTI>
  W2S_INLINE void add_short(const uint16_t* base, const uint16_t* e, const uint16_t* a, int n, A* dst, TileInfo<A>& info) const {
    using V = Vec<A>;
    const V bw = V::set(base_weight), wk = V::set(A(w[0]));
    V top = V::set(-infinity<A>);
    auto bad = V::Mask::none();
    const auto wide = [](const uint16_t* p) { return BF16 ? V::load_bf16(p) : V::load_f16(p); };
    const auto step = [&](const uint16_t* b0, const uint16_t* e0, const uint16_t* a0, int i) {
      V d = wide(e0);
      if constexpr (ANTI) d = d - wide(a0);
      const V s = V::fma(wk, d, wide(b0) * bw);
      bad = bad | V::nan(s);
      top = V::max(s, top);
      s.store(dst + i);
    };
    int i = 0;
    for (; i + V::W <= n; i += V::W) step(base + i, e + i, ANTI ? a + i : nullptr, i);
    if (i < n) {
      uint16_t last[3][V::W] = {};
      const size_t bytes = size_t(n - i) * sizeof(uint16_t);
      std::memcpy(last[0], base + i, bytes), std::memcpy(last[1], e + i, bytes);
      if constexpr (ANTI) std::memcpy(last[2], a + i, bytes);
      step(last[0], last[1], last[2], i);
    }
    info = {top.top(), bad.any()};
  }

  W2S_INLINE TileInfo<A> tile_short(int64_t c, int n, A* dst) const {
    TileInfo<A> info{-infinity<A>, false};
    if constexpr (sizeof(A) == 4) {
      const Rows* r = f->anti_of(0);
      const auto at = [this, c](const Rows& rows) { return static_cast<const uint16_t*>(rows.at(row, c)); };
      const uint16_t *base = at(f->base), *e = at(f->expert[0]), *a = r ? at(*r) : nullptr;
      const bool bf16 = f->base.dtype == Dtype::bf16;
      if (bf16 && a) add_short<true, true>(base, e, a, n, dst, info);
      else if (bf16) add_short<true, false>(base, e, a, n, dst, info);
      else if (a) add_short<false, true>(base, e, a, n, dst, info);
      else add_short<false, false>(base, e, a, n, dst, info);
    }
    return info;
  }

  W2S_INLINE TileInfo<A> tile_wide(const A* base, int64_t c, int n, A* dst) {
    TileInfo<A> info{-infinity<A>, false};
    const int K = f->K;
    if (K == 0) add<true, false, false, true>(base, nullptr, nullptr, A(0), n, dst, info);
    else if (K == 1) add_expert<true, true>(base, 0, c, n, dst, info);
    else {
      add_expert<true, false>(base, 0, c, n, dst, info);
      for (int k = 1; k + 1 < K; ++k) add_expert<false, false>(base, k, c, n, dst, info);
      add_expert<false, true>(base, K - 1, c, n, dst, info);
    }
    return info;
  }

  // z of columns [c, c + n) to dst[0, padded(n)), padding -inf.
  TileInfo<A> tile(int64_t c, int n, A* dst) {
    const bool narrow = !cut.active && short_of_one_type();
    const A* base = narrow ? nullptr : fetch(f->base, row, c, n, buffer[0]);
    TileInfo<A> info = narrow ? tile_short(c, n, dst) : tile_wide(base, c, n, dst);
    if (info.nan || base_weight < 0) info = exact(base ? base : fetch(f->base, row, c, n, buffer[0]), c, n, dst);
    else if (heat != 1) divide(dst, n, info);
    if (cut.active) apply_cut(base, c, n, dst);
    if (cut.active || n != padded(n)) {
      for (int i = n; i < padded(n); ++i) dst[i] = -infinity<A>;
      info.max = tile_max(dst, n);
    }
    return info;
  }

  // A true division: the reciprocal's rounding would show in z. It is monotone, so the maximum divides along.
  void divide(A* dst, int n, TileInfo<A>& info) const {
    using V = Vec<A>;
    for (int i = 0; i < padded(n); i += V::W) (V::load(dst + i) / V::set(heat)).store(dst + i);
    info.max /= heat;
  }

  // The rules for infinities: -inf - (-inf) = 0 in a difference; z = -inf where base = -inf; weight 0 adds exactly 0.
  __attribute__((noinline)) TileInfo<A> exact(const A* base, int64_t c, int n, A* dst) {
    TileInfo<A> info{-infinity<A>, false};
    for (int i = 0; i < n; ++i) dst[i] = base_weight != 0 ? base[i] * base_weight : A(0);
    for (int k = 0; k < f->K; ++k) {
      if (w[k] == 0) continue;
      const A* e = fetch(f->expert[size_t(k)], row, c, n, buffer[1]);
      const Rows* r = f->anti_of(k);
      const A* a = r ? fetch(*r, row, c, n, buffer[2]) : nullptr;
      for (int i = 0; i < n; ++i) dst[i] += A(w[k]) * difference(e[i], a ? a[i] : A(0));
    }
    for (int i = 0; i < n; ++i) {
      if (base_weight != 0 && base[i] == -infinity<A>) dst[i] = -infinity<A>;
      dst[i] /= heat;
      info.nan |= dst[i] != dst[i];
      info.max = dst[i] > info.max ? dst[i] : info.max;
    }
    return info;
  }

  static W2S_INLINE A difference(A e, A a) { return e == -infinity<A> && a == -infinity<A> ? A(0) : e - a; }

  void apply_cut(const A* base, int64_t c, int n, A* dst) const {
    using V = Vec<A>;
    const V level = V::set(cut.value), out = V::set(-infinity<A>);
    for (int i = 0; i < padded(n); i += V::W)
      V::select(V::ge(V::load(base + i), level), V::load(dst + i), out).store(dst + i);
    if (cut.last < c + n - 1)
      for (int i = int(std::max<int64_t>(0, cut.last + 1 - c)); i < n; ++i)
        if (base[i] == cut.value) dst[i] = -infinity<A>;
  }
};

// (max, sum exp(z - max)) of a tile; +inf is a sum of infinity. As tile_exp_sum, while the next tile is on its way.
template <class A>
W2S_INLINE A exp_sum(const A* z, int n, const TileInfo<A>& info, const Ahead& next = {}) {
  using V = Vec<A>;
  if (info.nan) return std::numeric_limits<A>::quiet_NaN();
  if (info.max == infinity<A>) return A(1);
  if (!next.streams) return tile_exp_sum(z, n, info.max);
  const V ref = V::set(info.max == -infinity<A> ? A(0) : info.max);
  V even = V::set(0), odd = even;
  int i = 0;
  for (; i + 2 * V::W <= padded(n); i += 2 * V::W) {
    next.ask(i, 2 * V::W);
    even = even + vexp(V::load(z + i) - ref);
    odd = odd + vexp(V::load(z + i + V::W) - ref);
  }
  for (; i < padded(n); i += V::W) even = even + vexp(V::load(z + i) - ref);
  return (even + odd).sum();
}
