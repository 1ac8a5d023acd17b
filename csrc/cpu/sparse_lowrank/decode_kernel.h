// Included once a target by for_each_target.h. Few tokens: every weight is read once, along its rows, no turning.
#include "cpu/pack_kernel.h"

// out[t * ld + row] = alpha x_t . m[row] for rows [begin, end); x [T][depth]
template <class A, int T, int ROWS>
W2S_INLINE void dot_rows(const Operand& m, int64_t row, const A* x, A alpha, A* out, int64_t ld) {
  using V = Vec<A>;
  const int64_t depth = m.columns;
  V sum[ROWS][T];
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < T; ++t) sum[r][t] = V::set(0);
  int64_t k = 0;
  for (; k + V::W <= depth; k += V::W) {
    V weight[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      weight[r] = load_any<A>(m.data, m.dtype, (row + r) * m.down + k);
      ahead(m.data, m.dtype, (row + r + ROWS) * m.down + k);  // short rows end before the hardware sees a stream
    }
    for (int t = 0; t < T; ++t) {
      const V v = V::load(x + t * depth + k);
      for (int r = 0; r < ROWS; ++r) sum[r][t] = V::fma(weight[r], v, sum[r][t]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < T; ++t) {
      A s = sum[r][t].sum();
      for (int64_t j = k; j < depth; ++j) s += scalar_as<A>(m.data, m.dtype, (row + r) * m.down + j) * x[t * depth + j];
      out[t * ld + row + r] = alpha * s;
    }
}

template <class A, int T>
inline void dots(const Operand& m, int64_t begin, int64_t end, const A* x, A alpha, A* out, int64_t ld) {
  constexpr int ROWS = T <= 2 ? 4 : 2;
  int64_t row = begin;
  for (; row + ROWS <= end; row += ROWS) dot_rows<A, T, ROWS>(m, row, x, alpha, out, ld);
  for (; row < end; ++row) dot_rows<A, T, 1>(m, row, x, alpha, out, ld);
}

// y[t * ld + row] += sum of value x_t[column] over one row of a csr support
template <class A, int T, class I>
inline void csr_rows(const Pattern& s, const I* column, const void* values, Dtype dtype, int64_t begin, int64_t end, const A* x, A* y, int64_t ld) {
  using V = Vec<A>;
  for (int64_t row = begin; row < end; ++row) {
    int64_t k = s.row_ptr[row];
    const int64_t stop = s.row_ptr[row + 1];
    V sum[T];
    for (int t = 0; t < T; ++t) sum[t] = V::set(0);
    for (; k + V::W <= stop; k += V::W) {
      const V v = load_any<A>(values, dtype, k);
      for (int t = 0; t < T; ++t) sum[t] = V::fma(v, V::gather(x + t * s.columns, column + k), sum[t]);
    }
    if (k < stop) {  // a row has a few dozen values: the rest counts
      const V v = first_as<A>(values, dtype, k, int(stop - k));
      for (int t = 0; t < T; ++t) sum[t] = V::fma(v, V::gather_first(x + t * s.columns, column + k, int(stop - k)), sum[t]);
    }
    for (int t = 0; t < T; ++t) y[t * ld + row] += sum[t].sum();
  }
}

// The same for a balanced support: the rows' values in one block follow each other, so vectors run across rows.
// part: q x (end - begin) partial sums, one a place in the row's block
template <class A>
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
        V::fma(load_any<A>(values, dtype, first + i), V::gather(from, s.bytes + first + i), V::load(part + i)).store(part + i);
      for (; i < count; ++i) part[i] += scalar_as<A>(values, dtype, first + i) * from[s.bytes[first + i]];
    }
    for (int64_t row = begin; row < end; ++row)
      for (int64_t i = 0; i < q; ++i) y[row] += part[(row - begin) * q + i];
    b0 = b1;
  }
}

template <class A, int T>
inline void sparse_rows(const Pattern& s, const void* values, Dtype dtype, int64_t begin, int64_t end, const A* x, A* part, A* y, int64_t ld) {
  if (s.bytes) {
    for (int t = 0; t < T; ++t) balanced_rows<A>(s, values, dtype, begin, end, x + t * s.columns, part, y + t * ld);
  } else if (s.narrow) {
    csr_rows<A, T>(s, s.narrow, values, dtype, begin, end, x, y, ld);
  } else {
    csr_rows<A, T>(s, s.wide, values, dtype, begin, end, x, y, ld);
  }
}

#define W2S_TOKENS(CALL) \
  switch (tokens) {      \
    case 1: CALL(1); break; \
    case 2: CALL(2); break; \
    case 3: CALL(3); break; \
    case 4: CALL(4); break; \
    case 5: CALL(5); break; \
    case 6: CALL(6); break; \
    case 7: CALL(7); break; \
    default: CALL(8);       \
  }

template <class A>
inline void decode_hidden(const Operand& a, int64_t begin, int64_t end, int tokens, const A* x, A* h) {
#define W2S_CALL(T) dots<A, T>(a, begin, end, x, A(1), h, a.rows)
  W2S_TOKENS(W2S_CALL)
#undef W2S_CALL
}

template <class A>
inline void decode_output(const Pattern& s, const Operand& b, A scale, const void* values, Dtype dtype, int64_t begin, int64_t end, int tokens,
                          const A* x, const A* h, A* part, A* y) {
#define W2S_CALL(T)                                                                           \
  {                                                                                           \
    dots<A, T>(b, begin, end, h, scale, y, s.rows);                                           \
    if (s.nnz) sparse_rows<A, T>(s, values, dtype, begin, end, x, part, y, s.rows);           \
  }
  W2S_TOKENS(W2S_CALL)
#undef W2S_CALL
}
#undef W2S_TOKENS
