// Included once a target by for_each_target.h. The inner loops of gemm.cpp; see gemm.h.
#include "cpu/pack_kernel.h"

// Rows of a register tile: 14 x 2 vectors of 16 (28 of 32 registers), 6 x 2 of 8 or 4 (12 of 16).
template <class A>
constexpr int tile_rows = Vec<A>::W * sizeof(A) == 64 ? 14 : 6;
template <class A>
constexpr int tile_columns = 2 * Vec<A>::W;

template <class A>
inline Tile tile_shape() { return {tile_rows<A>, tile_columns<A>}; }

// A register tile of M rows: c (+)= alpha sum_k a[k * lda + i * si] b[k * ldb + 0..NV W).
template <class A, int M, int NV>
W2S_INLINE void accumulate(int64_t depth, const A* a, int64_t lda, int64_t si, const A* b, int64_t ldb, Vec<A> (&sum)[M][NV]) {
  using V = Vec<A>;
  for (int i = 0; i < M; ++i)
    for (int n = 0; n < NV; ++n) sum[i][n] = V::set(0);
  for (int64_t k = 0; k < depth; ++k) {
    V column[NV];
#pragma GCC unroll 2
    for (int n = 0; n < NV; ++n) column[n] = V::load(b + k * ldb + n * V::W);
#pragma GCC unroll 14
    for (int i = 0; i < M; ++i) {
      const V x = V::set(a[k * lda + i * si]);
#pragma GCC unroll 2
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
    for (int i = 0; i < M; ++i) {
      if (i >= rows) return;
      A* p = c.data + i * c.down;
      for (int n = 0; n < NV; ++n) {
        const V x = scale * sum[i][n];
        (add ? V::load(p + n * V::W) + x : x).store(p + n * V::W);
      }
    }
    return;
  }
  A lanes[M][NV * V::W];
  for (int i = 0; i < M; ++i)
    for (int n = 0; n < NV; ++n) (scale * sum[i][n]).store(&lanes[i][n * V::W]);
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t i = 0; i < rows; ++i) {
      A& p = c.data[i * c.down + j * c.across];
      p = add ? p + lanes[i][j] : lanes[i][j];
    }
}

template <class A, int M>
inline void tile(int64_t depth, const A* a, int64_t lda, int64_t si, const A* b, int64_t ldb, int64_t rows, int64_t columns,
                 Target<A> c, A alpha, bool add) {
  if (columns > Vec<A>::W) {
    Vec<A> sum[M][2];
    accumulate<A, M, 2>(depth, a, lda, si, b, ldb, sum);
    put_tile<A, M, 2>(sum, rows, columns, c, alpha, add);
  } else {
    Vec<A> sum[M][1];
    accumulate<A, M, 1>(depth, a, lda, si, b, ldb, sum);
    put_tile<A, M, 1>(sum, rows, columns, c, alpha, add);
  }
}

// A tile of `height` rows (packed or strided a), of which `rows` are stored; height is even or 1, at most tile_rows.
template <class A>
inline void run_tile(int height, int64_t depth, const A* a, int64_t lda, int64_t si, const A* b, int64_t ldb, int64_t rows,
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
