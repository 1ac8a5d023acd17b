// worst-case margins z[i][k] = D m_i + |D| r_i + b_k - b_y with
// D = W_k - W_y, formed in registers. C classes of R samples at a time share their loads.
#include "cpu/interval_bounds/boxes.h"

#include "cpu/target_begin.h"

#include "cpu/interval_bounds/blocks_kernel.h"

constexpr int64_t MARGIN_BLOCK = 4;  // vectors of columns that a gradient keeps in registers

template <class A>
W2S_INLINE Vec<A> load_part(const A* p, int64_t left) {
  if (left >= Vec<A>::W) return Vec<A>::load(p);
  A lane[Vec<A>::W] = {};
  std::memcpy(lane, p, size_t(left) * sizeof(A));
  return Vec<A>::load(lane);
}

template <class A>
W2S_INLINE void store_part(Vec<A> x, A* p, int64_t left) {
  if (left >= Vec<A>::W) return x.store(p);
  A lane[Vec<A>::W];
  x.store(lane);
  std::memcpy(p, lane, size_t(left) * sizeof(A));
}

// m[p][k], s[p][k]: sums of D m and |D| r of R samples and C classes from w; SIZE: t[p][k], sums of |W| (|m| + r)
template <class A, int R, int C, bool SIZE>
inline void margin_tile(const A* c, const A* r, int64_t ldx, const A* const* own, const A* w, int64_t ldw, int64_t d, A* m, A* s, A* t,
                        int64_t ldo) {
  using V = Vec<A>;
  V am[R][C], as[R][C], at[R][C];
  W2S_UNROLL for (int p = 0; p < R; ++p) W2S_UNROLL for (int k = 0; k < C; ++k) am[p][k] = as[p][k] = at[p][k] = V::set(0);
  for (int64_t i = 0; i < d; i += V::W) {
    V wv[C];
    W2S_UNROLL for (int k = 0; k < C; ++k) wv[k] = load_part<A>(w + k * ldw + i, d - i);
    W2S_UNROLL for (int p = 0; p < R; ++p) {
      const V y = load_part<A>(own[p] + i, d - i), cv = V::load(c + p * ldx + i), rv = V::load(r + p * ldx + i);
      W2S_UNROLL for (int k = 0; k < C; ++k) {
        const V diff = wv[k] - y;
        am[p][k] = V::fma(diff, cv, am[p][k]);
        as[p][k] = V::fma(diff.abs(), rv, as[p][k]);
        if (SIZE) at[p][k] = V::fma(wv[k].abs(), cv.abs() + rv, at[p][k]);
      }
    }
  }
  // unrolled as all of it is: sums that are reached by a number live in memory
  W2S_UNROLL for (int p = 0; p < R; ++p)
    W2S_UNROLL for (int k = 0; k < C; ++k) {
      m[p * ldo + k] = am[p][k].sum();
      s[p * ldo + k] = as[p][k].sum();
      if (SIZE) t[p * ldo + k] = at[p][k].sum();
    }
}

template <class A, int R, bool SIZE>
inline void margin_strip(const A* c, const A* r, int64_t ldx, const A* const* own, const A* w, int64_t ldw, int64_t classes, int64_t d, A* m, A* s,
                         A* t) {
  int64_t k = 0;
  for (; k + 4 <= classes; k += 4) margin_tile<A, R, 4, SIZE>(c, r, ldx, own, w + k * ldw, ldw, d, m + k, s + k, t + k, classes);
  for (; k < classes; ++k) margin_tile<A, R, 1, SIZE>(c, r, ldx, own, w + k * ldw, ldw, d, m + k, s + k, t + k, classes);
}

template <class A, bool SIZE>
inline void margin_sums(const A* c, const A* r, int64_t ldx, int rows, const int64_t* y, const A* w, int64_t ldw, int64_t classes, int64_t d, A* m,
                        A* s, A* t) {
  const A* own[2] = {w + y[0] * ldw, w + y[rows - 1] * ldw};
  if (rows == 2) margin_strip<A, 2, SIZE>(c, r, ldx, own, w, ldw, classes, d, m, s, t);
  else margin_strip<A, 1, SIZE>(c, r, ldx, own, w, ldw, classes, d, m, s, t);
}

// margins of `rows` <= 2 samples to z; s, and with a spread t, is scratch of the same size
template <class A>
inline void margin_rows(const A* c, const A* r, int64_t ldx, int rows, const int64_t* y, const A* w, int64_t ldw, int64_t classes, int64_t d,
                        const A* bias, bool sound, int64_t terms, double spread, A* z, A* s, A* t) {
  if (t) margin_sums<A, true>(c, r, ldx, rows, y, w, ldw, classes, d, z, s, t);
  else margin_sums<A, false>(c, r, ldx, rows, y, w, ldw, classes, d, z, s, z);
  const Rounding<A> rounding = rounding_of<A>(sound, terms, spread);
  // what one logit may be off by: four times the sum of its terms overflows where partial sums may
  const auto lost = [&](int p, int64_t k) {
    return t ? 4 * (t[p * classes + k] + (bias ? std::abs(bias[k]) : A(0))) * (rounding.spread / 4 * rounding.grow) + 2 * rounding.tiny : A(0);
  };
  for (int p = 0; p < rows; ++p) {
    const A own = lost(p, y[p]);
    for (int64_t k = 0; k < classes; ++k) {
      A& to = z[p * classes + k];
      const A radius = s[p * classes + k], shift = bias ? bias[k] - bias[y[p]] : A(0);
      if (k == y[p]) {
        to = 0;
      } else if (!sound) {
        to = to + radius + shift;
      } else {  // upwards; 8 u cover the two sums and the roundings of D and of the biases' difference
        const A grown = radius * rounding.grow + rounding.tiny + (lost(p, k) + own);
        const A bound = to + grown + shift + 2 * rounding.slack * (std::abs(to) + grown + std::abs(shift));
        to = std::abs(to) + grown + std::abs(shift) < infinity<A> ? bound : infinity<A>;
      }
    }
  }
}

// loss = log sum exp z (z_y = 0), worst = the largest other entry; NaN stays NaN
template <class A>
inline void margin_loss(const A* z, int64_t classes, int64_t y, A* loss, A* worst) {
  A top = 0, other = -infinity<A>;
  for (int64_t k = 0; k < classes; ++k)
    if (k != y && !(z[k] <= other)) other = z[k];
  for (int64_t k = 0; k < classes; ++k)
    if (z[k] != z[k]) other = z[k];
  top = other > 0 ? other : A(0);
  double total = 0;
  for (int64_t k = 0; k < classes; ++k) total += std::exp(double(z[k]) - double(top));
  *worst = other;
  *loss = other != other || top == infinity<A> ? other : A(double(top) + std::log(total));
}

// MARGIN_BLOCK vectors of columns: gradients of all samples' centre and radius, and of W. dw rows start as zeros.
//   dm = sum_k g D, dr = sum_k g |D|, dW_k += g (m + sign(D) r), dW_y -= the same
template <class A>
inline void margin_gradient(const A* g, const int64_t* y, int64_t batch, int64_t classes, const A* c, const A* r, int64_t ldx, const A* w,
                            int64_t ldw, int64_t columns, A* dm, A* dr, int64_t ldd, A* dw, int64_t ldw_out) {
  using V = Vec<A>;
  constexpr int N = int(MARGIN_BLOCK);
  const V zero = V::set(0);
  // a panel of W, and its gradient, copied together: rows of W far apart would share cache lines
  A* panel = workspace<A, 0>(2 * classes * N * V::W);
  A* grad = panel + classes * N * V::W;
  for (int64_t k = 0; k < classes; ++k)
    for (int j = 0; j < N; ++j) {
      const int64_t left = columns - j * V::W;
      (left > 0 ? load_part<A>(w + k * ldw + j * V::W, left) : zero).store(panel + (k * N + j) * V::W);
      zero.store(grad + (k * N + j) * V::W);
    }
  for (int64_t i = 0; i < batch; ++i) {
    V mv[N], rv[N], own[N], gm[N], gr[N], taken[N];
    W2S_UNROLL for (int j = 0; j < N; ++j) {
      const int64_t left = columns - j * V::W;
      mv[j] = left > 0 ? load_part<A>(c + i * ldx + j * V::W, left) : zero;
      rv[j] = left > 0 ? load_part<A>(r + i * ldx + j * V::W, left) : zero;
      own[j] = V::load(panel + (y[i] * N + j) * V::W);
      gm[j] = gr[j] = taken[j] = zero;
    }
    for (int64_t k = 0; k < classes; ++k) {
      const A scalar = g[i * classes + k];
      if (scalar == 0 || k == y[i]) continue;
      const V gv = V::set(scalar);
      W2S_UNROLL for (int j = 0; j < N; ++j) {
        const V diff = V::load(panel + (k * N + j) * V::W) - own[j];
        gm[j] = V::fma(gv, diff, gm[j]);
        gr[j] = V::fma(gv, diff.abs(), gr[j]);
        if (dw) {
          const V turn = V::select(V::gt(diff, zero), rv[j], V::select(V::gt(zero, diff), zero - rv[j], zero));
          const V part = gv * (mv[j] + turn);
          A* to = grad + (k * N + j) * V::W;
          (V::load(to) + part).store(to);
          taken[j] = taken[j] + part;
        }
      }
    }
    W2S_UNROLL for (int j = 0; j < N; ++j) {
      const int64_t left = columns - j * V::W;
      if (dm && left > 0) {
        store_part<A>(gm[j], dm + i * ldd + j * V::W, left);
        store_part<A>(gr[j], dr + i * ldd + j * V::W, left);
      }
      A* to = grad + (y[i] * N + j) * V::W;
      if (dw) (V::load(to) - taken[j]).store(to);
    }
  }
  for (int64_t k = 0; dw && k < classes; ++k)
    for (int j = 0; j < N && j * V::W < columns; ++j)
      store_part<A>(V::load(grad + (k * N + j) * V::W), dw + k * ldw_out + j * V::W, columns - j * V::W);
}

template <class A>
inline int64_t margin_columns() { return MARGIN_BLOCK * Vec<A>::W; }

W2S_KERNELS(MarginKernels, margin_rows<Real>, margin_loss<Real>, margin_columns<Real>, margin_gradient<Real>)

#include "cpu/target_end.h"
