// Included once a target by for_each_target.h. The inner loops of gemm.cpp; see gemm.h.
#include "cpu/pack_kernel.h"

// Rows of a register tile: 14 x 2 vectors of 16 (28 of 32 registers), 6 x 2 of 8 or 4 (12 of 16).
template <class A>
constexpr int tile_rows = Vec<A>::W * sizeof(A) == 64 ? 14 : 6;
template <class A>
constexpr int tile_columns = 2 * Vec<A>::W;

// Vectors of columns of a tile that widens what it reads: sums enough in flight, and whole lines.
template <class A>
constexpr int tile_vectors(int rows) { return tile_rows<A> == 6 ? (rows <= 2 ? 4 : 2) : rows <= 2 ? 8 : rows <= 6 ? 4 : 2; }

template <class A>
inline Tile tile_shape() { return {tile_rows<A>, tile_columns<A>}; }
template <class A>
inline int widening_columns(int rows) { return tile_vectors<A>(rows) * Vec<A>::W; }

template <class A, class B>
W2S_INLINE Vec<A> loaded(const B* p) {
  if constexpr (std::is_same_v<B, Bf16>) return Vec<A>::load_bf16(&p->bits);
  else if constexpr (std::is_same_v<B, F16>) return Vec<A>::load_f16(&p->bits);
  else return Vec<A>::load(p);
}
template <class A, class B>
W2S_INLINE A number(B x) {
  if constexpr (std::is_same_v<B, Bf16>) return A(bf16_to_float(x.bits));
  else if constexpr (std::is_same_v<B, F16>) return A(half_to_float(x.bits));
  else return x;
}

// A register tile of M rows: c (+)= alpha sum_k a[k * lda + i * si] b[k * ldb + 0..NV W).
template <class A, int M, int NV, class B>
W2S_INLINE void accumulate(int64_t depth, const A* a, int64_t lda, int64_t si, const B* b, int64_t ldb, Vec<A> (&sum)[M][NV]) {
  using V = Vec<A>;
#pragma GCC unroll 14
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) sum[i][n] = V::set(0);
  for (int64_t k = 0; k < depth; ++k) {
    V column[NV];
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) column[n] = loaded<A>(b + k * ldb + n * V::W);
#pragma GCC unroll 14
    for (int i = 0; i < M; ++i) {
      const V x = V::set(a[k * lda + i * si]);
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) sum[i][n] = V::fma(x, column[n], sum[i][n]);
    }
  }
}

// Stores a tile: whole vectors where c's columns are contiguous and all there, else element by element.
template <class A, int M, int NV>
W2S_INLINE void put_tile(const Vec<A> (&sum)[M][NV], int64_t rows, int64_t columns, Target<A> c, A alpha, bool add) {
  using V = Vec<A>;
  const V scale = V::set(alpha);
  if (c.across == 1 && columns == NV * V::W) {
#pragma GCC unroll 14
    for (int i = 0; i < M; ++i) {
      if (i >= rows) return;
      A* p = c.data + i * c.down;
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) {
        const V x = scale * sum[i][n];
        (add ? V::load(p + n * V::W) + x : x).store(p + n * V::W);
      }
    }
    return;
  }
  A lanes[M][NV * V::W];
#pragma GCC unroll 14
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) (scale * sum[i][n]).store(&lanes[i][n * V::W]);
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t i = 0; i < rows; ++i) {
      A& p = c.data[i * c.down + j * c.across];
      p = add ? p + lanes[i][j] : lanes[i][j];
    }
}

template <class A, int M, int NV, class B>
inline void tile_of(int64_t depth, const A* a, int64_t lda, int64_t si, const B* b, int64_t ldb, int64_t rows, int64_t columns,
                    Target<A> c, A alpha, bool add) {
  Vec<A> sum[M][NV];
  accumulate<A, M, NV>(depth, a, lda, si, b, ldb, sum);
  put_tile<A, M, NV>(sum, rows, columns, c, alpha, add);
}

template <class A, int M, class B>
inline void tile(int64_t depth, const A* a, int64_t lda, int64_t si, const B* b, int64_t ldb, int64_t rows, int64_t columns,
                 Target<A> c, A alpha, bool add) {
  if constexpr (!std::is_same_v<A, B> && tile_vectors<A>(M) > 2) {
    if (columns > tile_columns<A>) return tile_of<A, M, tile_vectors<A>(M)>(depth, a, lda, si, b, ldb, rows, columns, c, alpha, add);
  }
  if (columns > Vec<A>::W) tile_of<A, M, 2>(depth, a, lda, si, b, ldb, rows, columns, c, alpha, add);
  else tile_of<A, M, 1>(depth, a, lda, si, b, ldb, rows, columns, c, alpha, add);
}

// out[i * J + j] = sum_k a_i[k] b_j[k]: rows whose depth lies in one piece, a vector of it a step.
template <class A, class B, int I, int J>
W2S_INLINE void dot_block(int64_t depth, const B* const (&a)[I], const A* const (&b)[J], A* out) {
  using V = Vec<A>;
  V sum[I][J];
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) sum[i][j] = V::set(0);
  const int64_t whole = depth / V::W * V::W;
  for (int64_t k = 0; k < whole; k += V::W) {
    V y[J];
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) y[j] = V::load(b[j] + k);
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) {
      const V x = loaded<A>(a[i] + k);
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) sum[i][j] = V::fma(x, y[j], sum[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) {
      A rest = 0;
      for (int64_t k = whole; k < depth; ++k) rest += number<A>(a[i][k]) * b[j][k];
      out[i * J + j] = sum[i][j].sum() + rest;
    }
}

// Rows that one block takes beside J others.
template <class A>
constexpr int dot_rows = tile_rows<A> > 6 ? 4 : 2;

template <class A, class B, int J>
inline void dot_rows_times(int64_t depth, const B* a, int64_t a_down, int64_t rows, const A* b, int64_t b_down, int64_t columns,
                           Target<A> c, A alpha, bool add) {
  constexpr int I = J == 4 ? dot_rows<A> : 2 * dot_rows<A>;
  const B* left[I];
  const A* right[J];
  for (int i = 0; i < I; ++i) left[i] = a + std::min<int64_t>(i, rows - 1) * a_down;  // rows that are not there: the last
  for (int j = 0; j < J; ++j) right[j] = b + std::min<int64_t>(j, columns - 1) * b_down;
  A found[I * J];
  dot_block<A, B, I, J>(depth, left, right, found);
  for (int i = 0; i < I && i < rows; ++i)
    for (int j = 0; j < J && j < columns; ++j) {
      A& p = c.data[i * c.down + j * c.across];
      p = (add ? p : A(0)) + alpha * found[i * J + j];
    }
}

// c [rows, few] (+)= alpha a b^T, where a and b are stored by rows.
template <class A, class B>
inline void dots(int64_t depth, const B* a, int64_t a_down, int64_t rows, const A* b, int64_t b_down, int64_t few, Target<A> c, A alpha,
                 bool add) {
  const int J = few == 1 ? 1 : few == 2 ? 2 : 4, I = J == 4 ? dot_rows<A> : 2 * dot_rows<A>;
  const auto run = J == 1 ? dot_rows_times<A, B, 1> : J == 2 ? dot_rows_times<A, B, 2> : dot_rows_times<A, B, 4>;
  for (int64_t i = 0; i < rows; i += I)
    for (int64_t j = 0; j < few; j += J)
      run(depth, a + i * a_down, a_down, rows - i, b + j * b_down, b_down, few - j, {c.data + i * c.down + j * c.across, c.down, c.across}, alpha,
          add);
}

// A tile of `height` rows (packed or strided a), of which `rows` are stored; height is even or 1, at most tile_rows.
template <class A, class B>
inline void run_tile(int height, int64_t depth, const A* a, int64_t lda, int64_t si, const B* b, int64_t ldb, int64_t rows,
                     int64_t columns, Target<A> c, A alpha, bool add) {
#define W2S_CASE(m) \
  case m: return tile<A, m>(depth, a, lda, si, b, ldb, rows, columns, c, alpha, add);
  switch (height) {
    W2S_CASE(1) W2S_CASE(2) W2S_CASE(4) W2S_CASE(6)
    default: break;
  }
  if constexpr (tile_rows<A> > 6) {
    switch (height) {
      W2S_CASE(8) W2S_CASE(10) W2S_CASE(12) W2S_CASE(14)
      default: break;
    }
  }
#undef W2S_CASE
}
