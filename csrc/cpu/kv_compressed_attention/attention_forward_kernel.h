// Included once a target (no include guard). S = scale Q K^T, P = exp(S - top), O = P V / sum P for a block of QB queries.
//
// Queries lie in the lanes: Q^T [D, QB], S^T and P^T [keys, QB], O^T [D, QB], so that softmax needs no reduction across
// lanes and a head of 72 = 9 x 8 columns wastes nothing. Both products are one micro-kernel: R rows (keys, or columns of
// O) by 3 vectors of queries in registers, the R values of a step broadcast from a panel [steps, R]. K and V are widened
// and packed into such panels once a head.

using attention::Heads;
using attention::Problem;

// Uninitialised memory on a cache line.
template <class A>
struct Buffer {
  A* data = nullptr;
  explicit Buffer(int64_t n)
      : data(static_cast<A*>(::operator new(size_t(n + 64) * sizeof(A), std::align_val_t(64)))) {}
  ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

template <class A>
struct Shape {
  static constexpr int W = Vec<A>::W, WIDE = W * int(sizeof(A)) == 64, R = WIDE ? 8 : 4, VECTORS = 3, QB = VECTORS * W;
};

constexpr int KEYS = 64;  // keys of a block of scores: S^T, Q^T and O^T of D = 72 stay in L1

// out[r QB + lanes j] (+)= sum_t panel[t R + r] x[t QB + lanes j]; the sum starts at 0, so that long sums are blocked.
// Not inlined: among a caller's loops GCC moves the sums through memory before and after every tile.
template <class A, bool add>
__attribute__((noinline)) void product_tile(const A* __restrict panel, const A* __restrict x, int64_t steps, A* __restrict out) {
  using V = Vec<A>;
  constexpr int R = Shape<A>::R, QB = Shape<A>::QB;
  V acc[R][3];  // every loop unrolled: GCC keeps the sums in memory beside a loop that it leaves
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = acc[r][2] = V::set(0);
  for (int64_t t = 0; t < steps; ++t) {
    const V x0 = V::load(x + t * QB), x1 = V::load(x + t * QB + V::W), x2 = V::load(x + t * QB + 2 * V::W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V b = V::set(panel[t * R + r]);
      acc[r][0] = V::fma(b, x0, acc[r][0]);
      acc[r][1] = V::fma(b, x1, acc[r][1]);
      acc[r][2] = V::fma(b, x2, acc[r][2]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
      A* o = out + r * QB + j * V::W;
      (add ? V::load(o) + acc[r][j] : acc[r][j]).store(o);
    }
  }
}

// out[r QB + lanes] = sum_d panel[d R + r] x[d QB + lanes], a long D in parts: the library's dot products are blocked too
template <class A>
W2S_INLINE void dot_tile(const A* panel, const A* x, int64_t D, A* out) {
  constexpr int R = Shape<A>::R, QB = Shape<A>::QB, W = Vec<A>::W;
  const int64_t step = pieces(D, pieces(D, W > 4 ? 96 : 48));  // four lanes come without fma: shorter sums
  product_tile<A, false>(panel, x, std::min(step, D), out);
  for (int64_t d = step; d < D; d += step) product_tile<A, true>(panel + d * R, x + d * QB, std::min(step, D - d), out);
}

// dst[c * ldd + r] = src[r * lds + c], a square of one vector
template <class V>
W2S_INLINE void transpose_block(const typename V::Scalar* src, int64_t lds, typename V::Scalar* dst, int64_t ldd) {
  V square[V::W];
  for (int r = 0; r < V::W; ++r) square[r] = V::load(src + r * lds);
  V::transpose(square);
  for (int c = 0; c < V::W; ++c) square[c].store(dst + c * ldd);
}

// dst[c * ldd + r] = src[r * lds + c] for `rows` (whole vectors) by `columns`; src may be read up to a whole vector of
// columns, dst has `columns` rows
template <class A>
inline void transpose(const A* src, int64_t lds, int64_t rows, int64_t columns, A* dst, int64_t ldd) {
  using V = Vec<A>;
  A spare[V::W * V::W];
  for (int64_t r = 0; r < rows; r += V::W)
    for (int64_t c = 0; c < columns; c += V::W) {
      if (c + V::W <= columns) {
        transpose_block<V>(src + r * lds + c, lds, dst + c * ldd + r, ldd);
        continue;
      }
      transpose_block<V>(src + r * lds + c, lds, spare, V::W);
      for (int64_t i = 0; i < columns - c; ++i)
        std::memcpy(dst + (c + i) * ldd + r, spare + i * V::W, sizeof(A) * V::W);
    }
}

// `rows` rows of D columns as A times factor, padded with zeros to `to` rows of padded(D) columns, ld apart
template <class A>
inline void load_rows(const Heads& x, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t to, int64_t D, A factor, A* dst, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r) {
    A* row = dst + r * ld;
    widen<A>(x.at(b, first + r, h), x.dtype, int(D), A(0), row);
    if (factor != A(1))
      for (int64_t i = 0; i < D; ++i) row[i] *= factor;
  }
  for (int64_t r = rows; r < to; ++r) std::memset(dst + r * ld, 0, size_t(padded(int(D))) * sizeof(A));
}

// keys as panels [M / R][D][R] (`down`: the steps are columns of the head) or [D / R][M][R] (the steps are keys)
template <class A>
inline void pack_panels(const Heads& x, int64_t b, int64_t h, int64_t M, int64_t D, A* down, A* across) {
  using V = Vec<A>;
  constexpr int R = Shape<A>::R, W = V::W, STEP = W > R ? W : R;
  static_assert(STEP % R == 0);
  A rows[STEP][256];
  for (int64_t m = 0; m < M; m += STEP) {  // W / R panels at once: squares of a vector are turned in registers
    const int64_t n = std::min<int64_t>(STEP, M - m);
    load_rows<A>(x, b, h, m, n, STEP, D, A(1), &rows[0][0], 256);
    if constexpr (W < R) {  // vectors of two lanes
      for (int64_t d = 0; d < D && down; ++d)
        for (int r = 0; r < R; ++r) down[m * D + d * R + r] = rows[r][d];
    }
    for (int64_t d = 0; d < D && down && W >= R; d += W) {
      alignas(64) A turned[W * W];
      transpose_block<V>(&rows[0][d], 256, turned, W);
      for (int64_t r = 0; r < n; r += R)
        for (int64_t c = 0; c < std::min<int64_t>(W, D - d); ++c)
          std::memcpy(down + (m + r) * D + (d + c) * R, turned + c * W + r, sizeof(A) * R);
    }
    if (across)
      for (int64_t d = 0; d < D; d += R)
        for (int64_t r = 0; r < n; ++r) std::memcpy(across + d * M + (m + r) * R, &rows[r][d], sizeof(A) * R);
  }
}

// exp(x) for x below 88 as vexp, in two operations fewer where a product is not rounded before it is added: the float next
// to ln 2 is 1.9e-9 from it, so that one constant leaves an error of 1.9e-9 |x / ln 2|, a third of an ulp at x = -14.
template <class V>
W2S_INLINE V power(V x) {
  if constexpr (V::scale_underflows) {
    const V magic = V::set(12582912.0f), clamped = V::max(V::set(-104.0f), x);
    const V n = V::fma(clamped, V::set(1.44269504f), magic) - magic, r = V::fma(n, V::set(-0.69314718056f), clamped);
    return V::scale(exp_near_zero(r), n);
  } else {
    return vexp(x);
  }
}

template <class A>
struct ForwardScratch {
  int64_t Dr, ld;
  Buffer<A> keys, values, rows, q, o, s;
  ForwardScratch(int64_t M, int64_t D)
      : Dr(round_up(D, Shape<A>::R)), ld(round_up(D, PAD) + PAD), keys(round_up(M, Shape<A>::R) * D), values(M * Dr),
        rows(Shape<A>::QB * ld), q(D * Shape<A>::QB), o(Dr * Shape<A>::QB), s(KEYS * Shape<A>::QB) {}
};

// s = scores of keys [first, first + n); top = max(top, scores)
template <class A>
inline void score_block(const A* panels, const A* q, int64_t D, int64_t first, int64_t n, A* s, A* top) {
  using V = Vec<A>;
  constexpr int R = Shape<A>::R, QB = Shape<A>::QB;
  for (int64_t k = 0; k < n; k += R) {
    dot_tile<A>(panels + (first + k) * D, q, D, s + k * QB);
    const int64_t valid = std::min<int64_t>(R, n - k);
    for (int j = 0; j < 3; ++j) {
      V t = V::load(top + j * V::W);
      for (int64_t r = 0; r < valid; ++r) t = V::max(V::load(s + (k + r) * QB + j * V::W), t);
      t.store(top + j * V::W);
    }
  }
}

// columns of x [D, QB] to rows of out
template <class A>
inline void store_columns(const A* x, int64_t QB, const Heads& out, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t D, A* spare, int64_t ld) {
  using V = Vec<A>;
  for (int64_t d = 0; d < D; d += V::W) {
    const int64_t n = std::min<int64_t>(V::W, D - d);
    for (int64_t r = 0; r < QB; r += V::W) {
      if (n == V::W) {
        transpose_block<V>(x + d * QB + r, QB, spare + r * ld + d, ld);
        continue;
      }
      A block[V::W * V::W] = {};
      for (int64_t i = 0; i < n; ++i) std::memcpy(block + i * V::W, x + (d + i) * QB + r, sizeof(A) * V::W);
      transpose_block<V>(block, V::W, spare + r * ld + d, ld);
    }
  }
  for (int64_t r = 0; r < rows; ++r) narrow<A>(spare + r * ld, int(D), out.dtype, out.at(b, first + r, h));
}

template <class A>
inline void finish_block(const Problem& p, int64_t b, int64_t h, int64_t first, int64_t rows, const A* top, const A* total, ForwardScratch<A>& s) {
  using V = Vec<A>;
  constexpr int QB = Shape<A>::QB;
  for (int j = 0; j < 3; ++j) {
    const V inverse = V::set(1) / V::load(total + j * V::W);
    for (int64_t d = 0; d < p.D; ++d) {
      A* o = s.o.data + d * QB + j * V::W;
      (V::load(o) * inverse).store(o);
    }
  }
  store_columns<A>(s.o.data, QB, p.out, b, h, first, rows, p.D, s.rows.data, s.ld);
  A* kept = static_cast<A*>(p.softmax) + (b * p.H + h) * p.N + first;
  std::memcpy(kept, top, size_t(rows) * sizeof(A));
  std::memcpy(kept + p.B * p.H * p.N, total, size_t(rows) * sizeof(A));
}

template <class A>
inline void forward_block(const Problem& p, int64_t b, int64_t h, int64_t first, ForwardScratch<A>& s) {
  using V = Vec<A>;
  constexpr int R = Shape<A>::R, QB = Shape<A>::QB;
  const int64_t rows = std::min<int64_t>(QB, p.N - first), D = p.D;
  load_rows<A>(p.q, b, h, first, rows, QB, D, A(p.scale), s.rows.data, s.ld);
  transpose<A>(s.rows.data, s.ld, QB, D, s.q.data, QB);
  A top[QB], total[QB], newest[QB];
  for (int i = 0; i < QB; ++i) top[i] = -infinity<A>, total[i] = 0;
  std::memset(s.o.data, 0, size_t(s.Dr * QB) * sizeof(A));
  for (int64_t k0 = 0; k0 < p.M; k0 += KEYS) {
    const int64_t n = std::min<int64_t>(KEYS, p.M - k0);
    std::memcpy(newest, top, sizeof(top));
    score_block<A>(s.keys.data, s.q.data, D, k0, n, s.s.data, newest);
    bool grew = false;
    for (int j = 0; j < 3; ++j) grew |= V::gt(V::load(newest + j * V::W), V::load(top + j * V::W)).any();
    if (grew && k0 > 0) {
      for (int j = 0; j < 3; ++j) {
        const V shrink = vexp(V::load(top + j * V::W) - V::load(newest + j * V::W));
        (V::load(total + j * V::W) * shrink).store(total + j * V::W);
        for (int64_t d = 0; d < D; ++d) {
          A* o = s.o.data + d * QB + j * V::W;
          (V::load(o) * shrink).store(o);
        }
      }
    }
    std::memcpy(top, newest, sizeof(top));
    for (int j = 0; j < 3; ++j) {
      const V t = V::load(top + j * V::W);
      V sum = V::load(total + j * V::W);
      for (int64_t k = 0; k < n; ++k) {
        A* x = s.s.data + k * QB + j * V::W;
        const V e = power(V::load(x) - t);
        e.store(x);
        sum = sum + e;
      }
      sum.store(total + j * V::W);
    }
    for (int64_t d = 0; d < D; d += R) product_tile<A, true>(s.values.data + d * p.M + k0 * R, s.s.data, n, s.o.data + d * QB);
  }
  finish_block<A>(p, b, h, first, rows, top, total, s);
}

template <class A>
inline void run_forward(const Problem& p) {
  constexpr int QB = Shape<A>::QB;
  const int64_t blocks = pieces(p.N, QB), items = p.B * p.H * blocks;
  if (items == 0) return;
  parallel_ranges(items, 1, [&](int64_t begin, int64_t end) {
    ForwardScratch<A> s(p.M, p.D);
    int64_t packed = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t bh = i / blocks, b = bh / p.H, h = bh % p.H;
      if (bh != packed) {
        pack_panels<A>(p.k, b, h, p.M, p.D, s.keys.data, nullptr);
        pack_panels<A>(p.v, b, h, p.M, p.D, nullptr, s.values.data);
        packed = bh;
      }
      forward_block<A>(p, b, h, (i % blocks) * QB, s);
    }
  });
}
