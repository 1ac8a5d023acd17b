// Included once a target (no include guard). Dual products: one read of W serves a product with W and one with |W|.
//
// Three register tiles, all of ROWS x COLS x 2 accumulators (24 of 32 registers with 64-byte vectors, 8 of 16 else):
//   dot_tile    contraction along the rows of W     (forward; a chain adds k / width + 5 terms, which keeps it tight)
//   outer_tile  contraction down the columns of W   (gradient of the box; W's rows are read as they lie, no transpose)
//   sign_tile   contraction over the batch          (gradient of W: Gm^T m + sign(W) o Gr^T r)

template <class A>
constexpr bool wide_file = sizeof(Vec<A>) == 64;
template <class A>
constexpr int ROWS = wide_file<A> ? 4 : 2;
template <class A>
constexpr int COLS = wide_file<A> ? 3 : 2;
template <class A>
constexpr int PANEL = COLS<A> * Vec<A>::W;  // columns of a register tile where vectors lie along them

#define W2S_UNROLL _Pragma("GCC unroll 8")

// m[p][j] = sum_k c[p][k] w[j][k], s[p][j] = sum_k r[p][k] |w[j][k]|; c and r are padded with zeros to whole vectors
template <class A, int R, int C>
inline void dot_tile(const A* c, const A* r, int64_t ldx, const A* w, int64_t ldw, int64_t k, A* m, A* s, int64_t ldo, bool add) {
  using V = Vec<A>;
  V am[R][C], as[R][C];
  W2S_UNROLL for (int p = 0; p < R; ++p) W2S_UNROLL for (int j = 0; j < C; ++j) am[p][j] = as[p][j] = V::set(0);
  const auto step = [&](const V* wv, int64_t i) __attribute__((always_inline)) {
    V av[C];
    W2S_UNROLL for (int j = 0; j < C; ++j) av[j] = wv[j].abs();
    W2S_UNROLL for (int p = 0; p < R; ++p) {
      const V cv = V::load(c + p * ldx + i), rv = V::load(r + p * ldx + i);
      W2S_UNROLL for (int j = 0; j < C; ++j) {
        am[p][j] = V::fma(cv, wv[j], am[p][j]);
        as[p][j] = V::fma(rv, av[j], as[p][j]);
      }
    }
  };
  int64_t i = 0;
  for (; i + V::W <= k; i += V::W) {
    V wv[C];
    W2S_UNROLL for (int j = 0; j < C; ++j) wv[j] = V::load(w + j * ldw + i);
    step(wv, i);
  }
  if (i < k) {
    V wv[C];
    W2S_UNROLL for (int j = 0; j < C; ++j) {
      A tail[V::W] = {};
      std::memcpy(tail, w + j * ldw + i, size_t(k - i) * sizeof(A));
      wv[j] = V::load(tail);
    }
    step(wv, i);
  }
  const auto put = [&](A* to, A value) __attribute__((always_inline)) { *to = add ? *to + value : value; };
  W2S_UNROLL for (int j = 0; j < C; ++j) {
    if constexpr (R == 4) {
      A x[4], y[4];
      V::sum4(am[0][j], am[1][j], am[2][j], am[3][j], x);
      V::sum4(as[0][j], as[1][j], as[2][j], as[3][j], y);
      W2S_UNROLL for (int p = 0; p < R; ++p) put(m + p * ldo + j, x[p]), put(s + p * ldo + j, y[p]);
    } else {
      W2S_UNROLL for (int p = 0; p < R; ++p) put(m + p * ldo + j, am[p][j].sum()), put(s + p * ldo + j, as[p][j].sum());
    }
  }
}

// dot products of R rows with n rows of w
template <class A, int R>
inline void dot_strip(const A* c, const A* r, int64_t ldx, const A* w, int64_t ldw, int64_t n, int64_t k, A* m, A* s, int64_t ldo, bool add) {
  int64_t j = 0;
  for (; j + COLS<A> <= n; j += COLS<A>) dot_tile<A, R, COLS<A>>(c, r, ldx, w + j * ldw, ldw, k, m + j, s + j, ldo, add);
  for (; j < n; ++j) dot_tile<A, R, 1>(c, r, ldx, w + j * ldw, ldw, k, m + j, s + j, ldo, add);
}

// m, s [rows, n] (row stride ldo) from x [rows, k] and w [n, k], rows <= ROWS
template <class A>
inline void dot_block(const A* c, const A* r, int64_t ldx, int rows, const A* w, int64_t ldw, int64_t n, int64_t k, A* m, A* s, int64_t ldo, bool add) {
  if (rows == ROWS<A>) return dot_strip<A, ROWS<A>>(c, r, ldx, w, ldw, n, k, m, s, ldo, add);
  for (int p = 0; p < rows; ++p) dot_strip<A, 1>(c + p * ldx, r + p * ldx, ldx, w, ldw, n, k, m + p * ldo, s + p * ldo, ldo, add);
}

// the same of any number of rows, C rows of w at a time with all of them
template <class A, int C>
inline void dot_columns(const A* c, const A* r, int64_t ldx, int64_t rows, const A* w, int64_t ldw, int64_t k, A* m, A* s, int64_t ldo) {
  int64_t p = 0;
  for (; p + ROWS<A> <= rows; p += ROWS<A>) dot_tile<A, ROWS<A>, C>(c + p * ldx, r + p * ldx, ldx, w, ldw, k, m + p * ldo, s + p * ldo, ldo, false);
  for (; p < rows; ++p) dot_tile<A, 1, C>(c + p * ldx, r + p * ldx, ldx, w, ldw, k, m + p * ldo, s + p * ldo, ldo, false);
}
template <class A>
inline void dot_rows(const A* c, const A* r, int64_t ldx, int64_t rows, const A* w, int64_t ldw, int64_t n, int64_t k, A* m, A* s, int64_t ldo) {
  int64_t j = 0;
  for (; j + COLS<A> <= n; j += COLS<A>) dot_columns<A, COLS<A>>(c, r, ldx, rows, w + j * ldw, ldw, k, m + j, s + j, ldo);
  for (; j < n; ++j) dot_columns<A, 1>(c, r, ldx, rows, w + j * ldw, ldw, k, m + j, s + j, ldo);
}

// m[p][j] (+)= sum_i gm[p][i] w[row_i][j], s[p][j] (+)= sum_i gr[p][i] |w[row_i][j]| over `width` columns. `row` lists
// the rows of w that count (null: all of them in order); a w of C vectors a row must be readable.
template <class A, int R, int C>
inline void outer_tile(const A* gm, const A* gr, int64_t ldg, const A* w, int64_t ldw, int64_t count, const int32_t* row, A* m, A* s,
                       int64_t ldo, bool add) {
  using V = Vec<A>;
  V am[R][C], as[R][C];
  W2S_UNROLL for (int p = 0; p < R; ++p) W2S_UNROLL for (int j = 0; j < C; ++j) {
    am[p][j] = add ? V::load(m + p * ldo + j * V::W) : V::set(0);
    as[p][j] = add ? V::load(s + p * ldo + j * V::W) : V::set(0);
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = row ? row[i] : i;
    V wv[C], av[C];
    W2S_UNROLL for (int j = 0; j < C; ++j) {
      wv[j] = V::load(w + at * ldw + j * V::W);
      av[j] = wv[j].abs();
    }
    W2S_UNROLL for (int p = 0; p < R; ++p) {
      const V x = V::set(gm[p * ldg + at]), y = V::set(gr[p * ldg + at]);
      W2S_UNROLL for (int j = 0; j < C; ++j) {
        am[p][j] = V::fma(x, wv[j], am[p][j]);
        as[p][j] = V::fma(y, av[j], as[p][j]);
      }
    }
  }
  W2S_UNROLL for (int p = 0; p < R; ++p) W2S_UNROLL for (int j = 0; j < C; ++j) {
    am[p][j].store(m + p * ldo + j * V::W);
    as[p][j].store(s + p * ldo + j * V::W);
  }
}

// m, s [rows, PANEL] from g [rows, count] and one panel of w
template <class A>
inline void outer_block(const A* gm, const A* gr, int64_t ldg, int64_t rows, const A* w, int64_t ldw, int64_t count, const int32_t* row,
                        A* m, A* s, int64_t ldo, bool add) {
  int64_t p = 0;
  for (; p + ROWS<A> <= rows; p += ROWS<A>)
    outer_tile<A, ROWS<A>, COLS<A>>(gm + p * ldg, gr + p * ldg, ldg, w, ldw, count, row, m + p * ldo, s + p * ldo, ldo, add);
  for (; p < rows; ++p)
    outer_tile<A, 1, COLS<A>>(gm + p * ldg, gr + p * ldg, ldg, w, ldw, count, row, m + p * ldo, s + p * ldo, ldo, add);
}

// PANEL columns of `count` rows of w, zeros past `columns`
template <class A>
inline void copy_panel(const A* w, int64_t ldw, int64_t count, int64_t columns, A* out, int64_t ldo) {
  using V = Vec<A>;
  for (int64_t i = 0; i < count; ++i, w += ldw, out += ldo) {
    if (columns >= PANEL<A>) {
      W2S_UNROLL for (int j = 0; j < COLS<A>; ++j) V::load(w + j * V::W).store(out + j * V::W);
    } else {
      std::memcpy(out, w, size_t(columns) * sizeof(A));
      for (int64_t j = columns; j < PANEL<A>; ++j) out[j] = 0;
    }
  }
}

// am[p][j] = sum_b g[b][p] x[b][j], as[p][j] = sum_b g[b][ROWS + p] x[b][PANEL + j]
template <class A>
W2S_INLINE void cross_products(const A* g, const A* x, int64_t count, Vec<A> (&am)[ROWS<A>][COLS<A>], Vec<A> (&as)[ROWS<A>][COLS<A>]) {
  using V = Vec<A>;
  constexpr int R = ROWS<A>, C = COLS<A>;
  W2S_UNROLL for (int p = 0; p < R; ++p) W2S_UNROLL for (int j = 0; j < C; ++j) am[p][j] = as[p][j] = V::set(0);
  for (int64_t b = 0; b < count; ++b, g += 2 * R, x += 2 * PANEL<A>) {
    V mv[C], rv[C];
    W2S_UNROLL for (int j = 0; j < C; ++j) {
      mv[j] = V::load(x + j * V::W);
      rv[j] = V::load(x + (C + j) * V::W);
    }
    W2S_UNROLL for (int p = 0; p < R; ++p) {
      const V gm = V::set(g[p]), gr = V::set(g[R + p]);
      W2S_UNROLL for (int j = 0; j < C; ++j) {
        am[p][j] = V::fma(gm, mv[j], am[p][j]);
        as[p][j] = V::fma(gr, rv[j], as[p][j]);
      }
    }
  }
}

// dw[p][j] (+)= sum_b gm[b][p] m[b][j] + sign(w[p][j]) sum_b gr[b][p] r[b][j]; sign(0) = 0.
// g: [batch][2 ROWS], gm then gr. x: [batch][2 PANEL], m then r. w, dw: rows of at least `columns` columns.
template <class A>
inline void sign_tile(const A* g, const A* x, int64_t batch, const A* w, int64_t ldw, A* dw, int64_t ldd, int rows, int64_t columns, bool add) {
  using V = Vec<A>;
  constexpr int R = ROWS<A>, C = COLS<A>;
  V am[R][C], as[R][C];
  cross_products<A>(g, x, batch, am, as);
  const V zero = V::set(0);
  const auto signed_by = [&](V weight, V value) {
    return V::select(V::gt(weight, zero), value, V::select(V::gt(zero, weight), zero - value, zero));
  };
  if (columns >= PANEL<A>) {
    W2S_UNROLL for (int p = 0; p < R; ++p) {
      if (p >= rows) return;
      W2S_UNROLL for (int j = 0; j < C; ++j) {
        const V total = am[p][j] + signed_by(V::load(w + p * ldw + j * V::W), as[p][j]);
        A* to = dw + p * ldd + j * V::W;
        (add ? V::load(to) + total : total).store(to);
      }
    }
    return;
  }
  for (int p = 0; p < rows; ++p) {
    A weight[PANEL<A>] = {}, total[PANEL<A>];
    std::memcpy(weight, w + p * ldw, size_t(columns) * sizeof(A));
    for (int j = 0; j < C; ++j) (am[p][j] + signed_by(V::load(weight + j * V::W), as[p][j])).store(total + j * V::W);
    for (int64_t j = 0; j < columns; ++j) dw[p * ldd + j] = (add ? dw[p * ldd + j] : A(0)) + total[j];
  }
}
