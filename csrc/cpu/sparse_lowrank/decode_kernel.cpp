// Few tokens: every weight is read once, along its rows, no turning.
#include "cpu/sparse_lowrank/pattern.h"

#include "cpu/target_begin.h"

#include "cpu/pack_kernel.h"

using namespace ::w2s::sparse;

// Sums that are reached by a number live in memory: every loop over a tile of them is unrolled.
#define W2S_UNROLL _Pragma("GCC unroll 8")

// A vector of weights; OWN: they are of type A, and nothing is left to decide in the loop.
template <class A, bool OWN>
W2S_INLINE Vec<A> weights_at(const void* data, Dtype dtype, int64_t i) {
  return OWN ? Vec<A>::load(static_cast<const A*>(data) + i) : load_any<A>(data, dtype, i);
}
template <class A, bool OWN>
W2S_INLINE Vec<A> first_weights(const void* data, Dtype dtype, int64_t i, int n) {
  return OWN ? Vec<A>::load_first(static_cast<const A*>(data) + i, n) : first_as<A>(data, dtype, i, n);
}

// Partial sums of ROWS rows of m with x_t, W lanes each, to lanes[t][row][W]; x [T][depth]
template <class A, int T, int ROWS, bool OWN>
W2S_INLINE void dot_rows(const Operand& m, int64_t row, const A* x, A* lanes) {
  using V = Vec<A>;
  const int64_t depth = m.columns;
  V sum[ROWS][T];
  W2S_UNROLL for (int r = 0; r < ROWS; ++r)
    W2S_UNROLL for (int t = 0; t < T; ++t) sum[r][t] = V::set(0);
  int64_t k = 0;
  for (; k + V::W <= depth; k += V::W) {
    V weight[ROWS];
    W2S_UNROLL for (int r = 0; r < ROWS; ++r) {
      weight[r] = weights_at<A, OWN>(m.data, m.dtype, (row + r) * m.down + k);
      ahead(m.data, m.dtype, (row + r + ROWS) * m.down + k);  // short rows end before the hardware sees a stream
    }
    W2S_UNROLL for (int t = 0; t < T; ++t) {
      const V v = V::load(x + t * depth + k);
      W2S_UNROLL for (int r = 0; r < ROWS; ++r) sum[r][t] = V::fma(weight[r], v, sum[r][t]);
    }
  }
  if (k < depth) {
    const int rest = int(depth - k);
    W2S_UNROLL for (int t = 0; t < T; ++t) {
      const V v = V::load_first(x + t * depth + k, rest);
      W2S_UNROLL for (int r = 0; r < ROWS; ++r)
        sum[r][t] = V::fma(first_weights<A, OWN>(m.data, m.dtype, (row + r) * m.down + k, rest), v, sum[r][t]);
    }
  }
  W2S_UNROLL for (int r = 0; r < ROWS; ++r)
    W2S_UNROLL for (int t = 0; t < T; ++t) sum[r][t].store(lanes + (t * V::W + r) * V::W);
}

// y[t * ld + row] = alpha * sums (or += sums) of W rows whose partial sums wait in lanes[t][row][W]
template <class A, int T>
W2S_INLINE void put_rows(const A* lanes, int64_t rows, A alpha, bool add, A* y, int64_t ld) {
  using V = Vec<A>;
  for (int t = 0; t < T; ++t) {
    const V sum = V::set(alpha) * V::row_sums(lanes + t * V::W * V::W);
    A* p = y + t * ld;
    if (rows == V::W) {
      (add ? V::load(p) + sum : sum).store(p);
      continue;
    }
    A one[V::W];
    sum.store(one);
    for (int64_t r = 0; r < rows; ++r) p[r] = add ? p[r] + one[r] : one[r];
  }
}

// out[t * ld + row] = alpha x_t . m[row] for rows [begin, end); W rows are reduced together
template <class A, int T, bool OWN>
inline void dots_of(const Operand& m, int64_t begin, int64_t end, const A* x, A alpha, A* out, int64_t ld) {
  constexpr int64_t W = Vec<A>::W, ROWS = T <= 2 ? 4 : 2;
  A lanes[T * W * W] = {};
  for (int64_t row = begin; row < end; row += W) {
    const int64_t rows = end - row < W ? end - row : W;
    int64_t r = 0;
    for (; r + ROWS <= rows; r += ROWS) dot_rows<A, T, ROWS, OWN>(m, row + r, x, lanes + r * W);
    for (; r < rows; ++r) dot_rows<A, T, 1, OWN>(m, row + r, x, lanes + r * W);
    put_rows<A, T>(lanes, rows, alpha, false, out + row, ld);
  }
}

template <class A, int T>
inline void dots(const Operand& m, int64_t begin, int64_t end, const A* x, A alpha, A* out, int64_t ld) {
  if (m.dtype == own_dtype<A>) dots_of<A, T, true>(m, begin, end, x, alpha, out, ld);
  else dots_of<A, T, false>(m, begin, end, x, alpha, out, ld);
}

// y[t * ld + row] += sum of value x_t[column] over the rows of a csr support
template <class A, int T, bool OWN, class I>
inline void csr_rows(const Pattern& s, const I* column, const void* values, Dtype dtype, int64_t begin, int64_t end, const A* x, A* y, int64_t ld) {
  using V = Vec<A>;
  A lanes[T * V::W * V::W] = {};
  for (int64_t first = begin; first < end; first += V::W) {
    const int64_t rows = end - first < V::W ? end - first : V::W;
    for (int64_t r = 0; r < rows; ++r) {
      int64_t k = s.row_ptr[first + r];
      const int64_t stop = s.row_ptr[first + r + 1];
      V sum[T];
      W2S_UNROLL for (int t = 0; t < T; ++t) sum[t] = V::set(0);
      for (; k + V::W <= stop; k += V::W) {
        const V v = weights_at<A, OWN>(values, dtype, k);
        W2S_UNROLL for (int t = 0; t < T; ++t) sum[t] = V::fma(v, V::gather(x + t * s.columns, column + k), sum[t]);
      }
      if (k < stop) {  // a row has a few dozen values: the rest counts
        const V v = first_weights<A, OWN>(values, dtype, k, int(stop - k));
        W2S_UNROLL for (int t = 0; t < T; ++t) sum[t] = V::fma(v, V::gather_first(x + t * s.columns, column + k, int(stop - k)), sum[t]);
      }
      W2S_UNROLL for (int t = 0; t < T; ++t) sum[t].store(lanes + (t * V::W + r) * V::W);
    }
    put_rows<A, T>(lanes, rows, A(1), true, y + first, ld);
  }
}

// Whether all n are finite, and what follows them up to a whole vector
template <class A>
inline bool finite(const A* x, int64_t n) {
  using V = Vec<A>;
  V sum = V::set(0);
  for (int64_t i = 0; i < n; i += V::W) sum = V::fma(V::load(x + i), V::set(0), sum);
  return sum.sum() == A(0);
}

// The same where a row's columns are bits: its values are read in order and spread to their lanes, without a gather. An
// infinity of x times a lane without a value must not become NaN: x that holds one is read under the mask.
template <class A, int T, bool OWN, bool MASKED>
inline void bit_rows(const Pattern& s, const void* values, Dtype dtype, int64_t begin, int64_t end, const A* x, A* y, int64_t ld) {
  using V = Vec<A>;
  constexpr int CHAINS = T <= 2 ? 2 : 1, PARTS = 64 / V::W;
  const int64_t words = pieces(s.columns, 64);
  A lanes[T * V::W * V::W] = {};
  for (int64_t first = begin; first < end; first += V::W) {
    const int64_t rows = end - first < V::W ? end - first : V::W;
    for (int64_t r = 0; r < rows; ++r) {
      const uint64_t* word = s.bits + (first + r) * words;
      int64_t k = s.row_ptr[first + r];
      V sum[T][CHAINS];
      W2S_UNROLL for (int t = 0; t < T; ++t)
        W2S_UNROLL for (int c = 0; c < CHAINS; ++c) sum[t][c] = V::set(0);
      const auto walk = [&](const auto& next) __attribute__((always_inline)) {
        for (int64_t w = 0; w < words; ++w) {
          const A* p = x + w * 64;
#pragma GCC unroll 4
          for (int j = 0; j < PARTS; ++j) {
            const uint32_t there = uint32_t(word[w] >> (j * V::W)) & ((1u << V::W) - 1);
            const V v = V::expand(next(), there);
            k += __builtin_popcount(there);
            W2S_UNROLL for (int t = 0; t < T; ++t) {
              const A* at = p + t * s.columns + j * V::W;
              sum[t][j % CHAINS] = V::fma(v, MASKED ? V::load_lanes(at, there) : V::load(at), sum[t][j % CHAINS]);
            }
          }
        }
      };
      const bool whole = s.row_ptr[first + r + 1] + V::W <= s.nnz;  // no load reaches behind the values
      if (T == 1 && whole && !OWN && dtype == Dtype::bf16) walk([&] { return weights_at<A, OWN>(values, Dtype::bf16, k); });
      else if (whole) walk([&] { return weights_at<A, OWN>(values, dtype, k); });
      else walk([&] { return first_weights<A, OWN>(values, dtype, k, int(std::min<int64_t>(V::W, s.nnz - k))); });
      W2S_UNROLL for (int t = 0; t < T; ++t) {
        W2S_UNROLL for (int c = 1; c < CHAINS; ++c) sum[t][0] = sum[t][0] + sum[t][c];
        sum[t][0].store(lanes + (t * V::W + r) * V::W);
      }
    }
    put_rows<A, T>(lanes, rows, A(1), true, y + first, ld);
  }
}

// The same for a balanced support: the rows' values in one block follow each other, so vectors run across rows.
// part: q x (end - begin) partial sums, one a place in the row's block
template <class A, bool OWN>
inline void balanced_rows(const Pattern& s, const void* values, Dtype dtype, int64_t begin, int64_t end, const A* x, A* part, A* y) {
  using V = Vec<A>;
  for (int64_t b0 = 0; b0 < s.blocks;) {  // all blocks of one q: the full ones, then perhaps a narrower last one
    const int64_t q = s.per_row(b0), count = (end - begin) * q;
    int64_t b1 = b0 + 1;
    while (b1 < s.blocks && s.per_row(b1) == q) ++b1;
    std::fill(part, part + count, A(0));
    for (int64_t b = b0; b < b1; ++b) {
      const int64_t first = b * s.rows * s.per_block + begin * q;
      const A* from = x + b * s.block;
      int64_t i = 0;
      for (; i + V::W <= count; i += V::W)
        V::fma(weights_at<A, OWN>(values, dtype, first + i), V::gather(from, s.bytes + first + i), V::load(part + i)).store(part + i);
      for (; i < count; ++i) part[i] += scalar_as<A>(values, dtype, first + i) * from[s.bytes[first + i]];
    }
    for (int64_t row = begin; row < end; ++row)
      for (int64_t i = 0; i < q; ++i) y[row] += part[(row - begin) * q + i];
    b0 = b1;
  }
}

template <class A, int T, bool OWN>
inline void sparse_rows(const Pattern& s, const void* values, Dtype dtype, int64_t begin, int64_t end, const A* x, A* part, A* y, int64_t ld) {
  if constexpr (Vec<A>::EXPANDS)
    if (s.bits)
      return finite(x, T * s.columns) ? bit_rows<A, T, OWN, false>(s, values, dtype, begin, end, x, y, ld)
                                      : bit_rows<A, T, OWN, true>(s, values, dtype, begin, end, x, y, ld);
  if (s.bytes) {
    W2S_UNROLL for (int t = 0; t < T; ++t) balanced_rows<A, OWN>(s, values, dtype, begin, end, x + t * s.columns, part, y + t * ld);
  } else if (s.narrow) {
    csr_rows<A, T, OWN>(s, s.narrow, values, dtype, begin, end, x, y, ld);
  } else {
    csr_rows<A, T, OWN>(s, s.wide, values, dtype, begin, end, x, y, ld);
  }
}

// tokens is 1, 2, 4 or 8 (decode.cpp fills up with zeros); float64, which is not for speed, takes them one by one
#define W2S_TOKENS(CALL)          \
  switch (tokens) {               \
    case 1: CALL(1); break;       \
    case 2: CALL(2); break;       \
    case 4: CALL(4); break;       \
    default: CALL(8);             \
  }

template <class A>
inline void decode_hidden(const Operand& a, int64_t begin, int64_t end, int tokens, const A* x, A* h) {
  if constexpr (sizeof(A) == 8) {
    for (int t = 0; t < tokens; ++t) dots<A, 1>(a, begin, end, x + t * a.columns, A(1), h + t * a.rows, a.rows);
  } else {
#define W2S_CALL(T) dots<A, T>(a, begin, end, x, A(1), h, a.rows)
    W2S_TOKENS(W2S_CALL)
#undef W2S_CALL
  }
}

template <class A, int T>
inline void output_rows(const Pattern& s, const Operand& b, A scale, const void* values, Dtype dtype, int64_t begin, int64_t end,
                        const A* x, const A* h, A* part, A* y) {
  dots<A, T>(b, begin, end, h, scale, y, s.rows);
  if (!s.nnz) return;
  if (dtype == own_dtype<A>) sparse_rows<A, T, true>(s, values, dtype, begin, end, x, part, y, s.rows);
  else sparse_rows<A, T, false>(s, values, dtype, begin, end, x, part, y, s.rows);
}

template <class A>
inline void decode_output(const Pattern& s, const Operand& b, A scale, const void* values, Dtype dtype, int64_t begin, int64_t end, int tokens,
                          const A* x, const A* h, A* part, A* y) {
  if constexpr (sizeof(A) == 8) {
    for (int t = 0; t < tokens; ++t)
      output_rows<A, 1>(s, b, scale, values, dtype, begin, end, x + t * s.columns, h + t * b.columns, part, y + t * s.rows);
  } else {
#define W2S_CALL(T) output_rows<A, T>(s, b, scale, values, dtype, begin, end, x, h, part, y)
    W2S_TOKENS(W2S_CALL)
#undef W2S_CALL
  }
}
#undef W2S_TOKENS

W2S_KERNELS(DecodeKernels, pack<Real>, decode_hidden<Real>, decode_output<Real>)

#include "cpu/target_end.h"
