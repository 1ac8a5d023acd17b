// The sparse products on panels of tokens.
//
// A panel holds NV vectors of tokens, so each stored value is one broadcast and NV multiply-adds: xT[column][token],
// yT[row][token]. One (tile, block) at a time: the block's columns of xT stay in L1 (or nearly: 256 x 64 x 4 bytes), the rows of yT
// in L2. Rows come in runs of equal length Q, unrolled; longer rows take the general loop.
#include "cpu/sparse_lowrank/pattern.h"

#include "cpu/target_begin.h"

#include "cpu/pack_kernel.h"

using namespace ::w2s::sparse;

// y[row] += sum_q v x[column]; a block's sum is made by itself, so that no row is one long chain of roundings
template <class A, int NV, int Q>
W2S_INLINE void gather_run(const Run& run, const A* v, const A* x, A* y) {
  using V = Vec<A>;
  constexpr int64_t P = NV * V::W;
  const int64_t q = Q ? Q : run.q;
  const uint8_t* column = run.column;
  for (int64_t i = 0; i < run.count; ++i, v += q, column += q) {
    A* p = y + (run.row ? run.row[i] : i) * P;
    V sum[NV];
    const V first = V::set(v[0]);
    for (int n = 0; n < NV; ++n) sum[n] = first * V::load(x + column[0] * P + n * V::W);
#pragma GCC unroll 8
    for (int64_t k = 1; k < q; ++k) {
      const V value = V::set(v[k]);
      const A* from = x + column[k] * P;
      for (int n = 0; n < NV; ++n) sum[n] = V::fma(value, V::load(from + n * V::W), sum[n]);
    }
    for (int n = 0; n < NV; ++n) (V::load(p + n * V::W) + sum[n]).store(p + n * V::W);
  }
}

// dx[column] += v g[row], and the products g x of every value, W partial sums each, into dots[value][W]
template <class A, int NV, int Q, bool DX, bool DV>
W2S_INLINE void scatter_run(const Run& run, int64_t begin, int64_t end, const A* v, const A* g, const A* x, A* dx, A* dots) {
  using V = Vec<A>;
  constexpr int64_t P = NV * V::W;
  const int64_t q = Q ? Q : run.q;
  const uint8_t* column = run.column + begin * q;
  v += begin * q;
  for (int64_t i = begin; i < end; ++i, v += q, column += q) {
    const A* p = g + (run.row ? run.row[i] : i) * P;
    V row[NV];
    for (int n = 0; n < NV; ++n) row[n] = V::load(p + n * V::W);
#pragma GCC unroll 8
    for (int64_t k = 0; k < q; ++k) {
      const int64_t c = column[k] * P;
      if (DV) {
        V dot = row[0] * V::load(x + c);
        for (int n = 1; n < NV; ++n) dot = V::fma(row[n], V::load(x + c + n * V::W), dot);
        dot.store(dots);
        dots += V::W;
      }
      if (DX) {
        const V value = V::set(v[k]);
        for (int n = 0; n < NV; ++n) V::fma(value, row[n], V::load(dx + c + n * V::W)).store(dx + c + n * V::W);
      }
    }
  }
}

#define W2S_BY_LENGTH(q, CALL)                                                                             \
  switch (q) {                                                                                             \
    case 1: CALL(1); break;                                                                                \
    case 2: CALL(2); break;                                                                                \
    case 3: CALL(3); break;                                                                                \
    case 4: CALL(4); break;                                                                                \
    case 5: CALL(5); break;                                                                                \
    case 6: CALL(6); break;                                                                                \
    case 8: CALL(8); break;                                                                                \
    default: CALL(0);                                                                                      \
  }

template <class A, int NV>
inline void gather_block(const Pattern& s, int64_t tile, int64_t b, const A* values, const A* x, A* y) {
  s.visit(tile, b, [&](const Run& run) {
#define W2S_CALL(Q) gather_run<A, NV, Q>(run, values + run.value, x, y)
    W2S_BY_LENGTH(run.q, W2S_CALL)
#undef W2S_CALL
  });
}

constexpr int64_t DOTS = 128;  // values whose partial sums wait at a time, at least

template <class A, int NV, bool DX, bool DV>
inline void scatter_block(const Pattern& s, int64_t tile, int64_t b, const A* values, const A* g, const A* x, A* dx, A* dv, A* dots) {
  using V = Vec<A>;
  s.visit(tile, b, [&](const Run& run) {
    const int64_t batch = DV ? std::max<int64_t>(1, DOTS / run.q) : run.count;
    for (int64_t i = 0; i < run.count; i += batch) {
      const int64_t end = std::min(run.count, i + batch), count = (end - i) * run.q;
#define W2S_CALL(Q) scatter_run<A, NV, Q, DX, DV>(run, i, end, values ? values + run.value : nullptr, g, x, dx, dots)
      W2S_BY_LENGTH(run.q, W2S_CALL)
#undef W2S_CALL
      if (!DV) continue;
      A* out = dv + run.value + i * run.q;
      int64_t k = 0;
      for (; k + V::W <= count; k += V::W) (V::load(out + k) + V::row_sums(dots + k * V::W)).store(out + k);
      for (; k < count; ++k) out[k] += V::load(dots + k * V::W).sum();
    }
  });
}

template <class A>
inline int64_t vector_width() { return Vec<A>::W; }

// One tile of yT (zero or a bias before) for vectors = 1, 2 or 4: all blocks in turn.
template <class A>
inline void gather_tile(const Pattern& s, int64_t tile, int vectors, const A* values, const A* x, A* y) {
  for (int64_t b = 0; b < s.blocks; ++b) {
    const A* from = x + b * s.block * vectors * Vec<A>::W;
    if (vectors == 4) gather_block<A, 4>(s, tile, b, values, from, y);
    else if (vectors == 2) gather_block<A, 2>(s, tile, b, values, from, y);
    else gather_block<A, 1>(s, tile, b, values, from, y);
  }
}

// The blocks [b0, b1) of one tile; x and dx begin at block b0. dx or dv may be null.
template <class A>
inline void scatter_tile(const Pattern& s, int64_t tile, int64_t b0, int64_t b1, int vectors, const A* values, const A* g, const A* x,
                         A* dx, A* dv, A* dots) {
  for (int64_t b = b0; b < b1; ++b) {
    const int64_t at = (b - b0) * s.block * vectors * Vec<A>::W;
#define W2S_CALL(NV)                                                                                                \
  if (dx && dv) scatter_block<A, NV, true, true>(s, tile, b, values, g, x + at, dx + at, dv, dots);               \
  else if (dx) scatter_block<A, NV, true, false>(s, tile, b, values, g, nullptr, dx + at, nullptr, nullptr);      \
  else scatter_block<A, NV, false, true>(s, tile, b, nullptr, g, x + at, nullptr, dv, dots)
    if (vectors == 4) {
      W2S_CALL(4);
    } else if (vectors == 2) {
      W2S_CALL(2);
    } else {
      W2S_CALL(1);
    }
#undef W2S_CALL
  }
}

template <class A, class Number>
W2S_INLINE void add_rows_of(const Pattern& s, int64_t row, int64_t count, A* w, const Number& number) {
  for (int64_t i = 0; i < count; ++i, w += s.columns) s.row_values(row + i, [&](int64_t column, int64_t k) { w[column] += number(k); });
}

template <class A>
inline void add_rows(const Pattern& s, int64_t row, int64_t count, const void* values, Dtype dtype, A* w) {
  const float* single = static_cast<const float*>(values);
  const double* twice = static_cast<const double*>(values);
  const uint16_t* half = static_cast<const uint16_t*>(values);
  if (dtype == Dtype::f32) add_rows_of(s, row, count, w, [&](int64_t k) { return A(single[k]); });
  else if (dtype == Dtype::f64) add_rows_of(s, row, count, w, [&](int64_t k) { return A(twice[k]); });
  else if (dtype == Dtype::bf16) add_rows_of(s, row, count, w, [&](int64_t k) { return A(bf16_to_float(half[k])); });
  else add_rows_of(s, row, count, w, [&](int64_t k) { return A(half_to_float(half[k])); });
}

template <class A, class Put>
W2S_INLINE void pick_rows_of(const Pattern& s, int64_t row, int64_t count, const A* w, const Put& put) {
  for (int64_t i = 0; i < count; ++i, w += s.columns) s.row_values(row + i, [&](int64_t column, int64_t k) { put(k, w[column]); });
}

template <class A>
inline void pick_rows(const Pattern& s, int64_t row, int64_t count, const A* w, void* values, Dtype dtype) {
  float* single = static_cast<float*>(values);
  double* twice = static_cast<double*>(values);
  uint16_t* half = static_cast<uint16_t*>(values);
  if (dtype == Dtype::f32) pick_rows_of(s, row, count, w, [&](int64_t k, A x) { single[k] = float(x); });
  else if (dtype == Dtype::f64) pick_rows_of(s, row, count, w, [&](int64_t k, A x) { twice[k] = double(x); });
  else if (dtype == Dtype::bf16) pick_rows_of(s, row, count, w, [&](int64_t k, A x) { half[k] = float_to_bf16(float(x)); });
  else pick_rows_of(s, row, count, w, [&](int64_t k, A x) { half[k] = float_to_half(float(x)); });
}

W2S_KERNELS(PanelKernels, vector_width<Real>, pack<Real>, unpack<Real>, widen_values<Real>, add_rows<Real>, pick_rows<Real>,
            gather_tile<Real>, scatter_tile<Real>)

#include "cpu/target_end.h"
