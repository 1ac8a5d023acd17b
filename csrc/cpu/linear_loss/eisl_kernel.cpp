// The edit-invariant loss: a row of logits to its exponentials and the
// log-probabilities of the sentence's tokens; n-grams of a sentence, [T, U] numbers; a row of exponentials to its gradient.
#include "cpu/linear_loss/eisl.h"

#include "cpu/target_begin.h"

// dst = src as A
template <class A>
inline void copy_as(const void* src, Dtype dtype, int64_t n, A* dst) {
  A buffer[TILE];
  const int64_t bytes = dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
  for (int64_t i = 0; i < n; i += TILE) {
    const int m = int(n - i < TILE ? n - i : TILE);
    widen<A>(static_cast<const char*>(src) + i * bytes, dtype, m, A(0), buffer);
    for (int j = 0; j < m; ++j) dst[i + j] = buffer[j];
  }
}

// z = exp(z + bias - max) in place, raw_j = log softmax(z)[y_j]; returns 1 / sum. z is padded to 16.
template <class A>
inline double eisl_row(A* z, int64_t V, const A* bias, const int64_t* y, const bool* kept, int64_t U, A* raw) {
  using T = Vec<A>;
  if (bias)
    for (int64_t v = 0; v < V; ++v) z[v] += bias[v];
  const int64_t n = padded(int(V));
  for (int64_t v = V; v < n; ++v) z[v] = -infinity<A>;
  const A found = tile_max(z, int(V)), top = found == -infinity<A> ? A(0) : found;
  for (int64_t j = 0; j < U; ++j) raw[j] = !kept || kept[j] ? z[y[j]] - top : A(0);
  const T line = T::set(top);
  double total = 0;
  for (int64_t at = 0; at < n; at += TILE) {
    T sum[2] = {T::set(0), T::set(0)};
    const int64_t end = n < at + TILE ? n : at + TILE;
    int64_t i = at;
    for (; i + 2 * T::W <= end; i += 2 * T::W)
      for (int k = 0; k < 2; ++k) {
        const T e = vexp(T::load(z + i + k * T::W) - line);
        e.store(z + i + k * T::W);
        sum[k] = sum[k] + e;
      }
    for (; i < end; i += T::W) {
      const T e = vexp(T::load(z + i) - line);
      e.store(z + i);
      sum[0] = sum[0] + e;
    }
    total += double((sum[0] + sum[1]).sum());
  }
  const A log_sum = A(std::log(total));
  for (int64_t j = 0; j < U; ++j) raw[j] -= log_sum;
  return 1 / total;
}

// dz in the place of z, rounded to `dtype`: r exp(z) / sum with r = -sum_j a_j, and a_j at y_j
template <class A>
inline void eisl_gradient(A* z, int64_t V, double inverse, const int64_t* y, const bool* kept, int64_t U, const A* a, Dtype dtype) {
  double r = 0;
  for (int64_t j = 0; j < U; ++j) r -= double(a[j]);
  const Vec<A> scale = Vec<A>::set(A(r * inverse));
  A part[TILE];
  char* to = reinterpret_cast<char*>(z);
  for (int64_t at = 0; at < V; at += TILE) {
    const int n = int(V - at < TILE ? V - at : TILE);
    for (int v = 0; v < padded(n); v += Vec<A>::W) (scale * Vec<A>::load(z + at + v)).store(part + v);
    for (int64_t j = 0; j < U; ++j)
      if (y[j] >= at && y[j] < at + n && (!kept || kept[j])) part[y[j] - at] += a[j];
    narrow<A>(part, n, dtype, to + at * (dtype == own_dtype<A> ? int64_t(sizeof(A)) : 2));
  }
}

inline bool whole_window(const bool* kept, int64_t at, int64_t n) {
  for (int64_t k = 0; kept && k < n; ++k)
    if (!kept[at + k]) return false;
  return true;
}

// L_n of a sentence; dcost [T, ld] gets scale times its gradient added. cost [T, ld]; s, x: [T, ld]; column: 4 rows.
template <class A>
inline double eisl_ngram(const Sentence& given, const Ngram& g, const A* cost, A* dcost, A* s, A* x, A* column) {
  using V = Vec<A>;
  const int64_t ld = eisl_width(given.U), n = g.n, H = given.T - n + 1, W = given.U - n + 1, padded_w = padded(int(W));
  A *top = column, *mass = top + ld, *value = mass + ld, *share = value + ld;
  int64_t rows = 0, columns = 0;
  for (int64_t j = 0; j < padded_w; ++j) {
    top[j] = -infinity<A>;
    mass[j] = value[j] = 0;
    share[j] = j < W && whole_window(given.target, j, n) ? A(1) : A(0);
    columns += share[j] > 0;
  }
  const int64_t bytes = g.noise.dtype == Dtype::f64 ? 8 : g.noise.dtype == Dtype::f32 ? 4 : 2;
  for (int64_t i = 0; i < H; ++i) {
    if (!whole_window(given.source, i, n)) continue;
    ++rows;
    A *si = s + i * ld, *xi = x + i * ld;
    for (int64_t j = 0; j < padded_w; ++j) si[j] = 0;
    for (int64_t k = 0; k < n; ++k)
      for (int64_t j = 0; j < W; ++j) si[j] += cost[(i + k) * ld + j + k];
    for (int64_t j = 0; j < W; ++j) si[j] /= A(n);
    if (given.logsumexp) {
      for (int64_t j = 0; j < W; ++j) xi[j] = A(n) * si[j];
    } else {
      if (g.noise.data) copy_as<A>(static_cast<const char*>(g.noise.data) + i * W * bytes, g.noise.dtype, W, xi);
      for (int64_t j = 0; j < W; ++j) xi[j] = (si[j] + (g.noise.data ? xi[j] : A(0))) / A(given.tau);
    }
    for (int64_t j = W; j < padded_w; ++j) xi[j] = 0;
    for (int64_t j = 0; j < W; ++j) top[j] = xi[j] > top[j] || xi[j] != xi[j] ? xi[j] : top[j];
  }
  if (!rows || !columns) return 0;
  for (int64_t j = W; j < padded_w; ++j) top[j] = 0;
  for (int64_t i = 0; i < H; ++i) {
    if (!whole_window(given.source, i, n)) continue;
    for (int64_t j = 0; j < padded_w; j += V::W) {
      const V e = vexp(V::load(x + i * ld + j) - V::load(top + j));
      e.store(x + i * ld + j);
      (V::load(mass + j) + e).store(mass + j);
      V::fma(e, V::load(s + i * ld + j), V::load(value + j)).store(value + j);
    }
  }
  double total = 0;
  for (int64_t j = 0; j < W; ++j) {
    value[j] = given.logsumexp ? top[j] + std::log(mass[j]) : value[j] / mass[j];
    if (share[j] > 0) total -= double(value[j]);
    share[j] *= A(-g.scale / (double(columns) * double(n)));  // of each of the n costs of an n-gram
  }
  const A heat = A(1 / given.tau);
  for (int64_t i = 0; i < H; ++i) {
    if (!whole_window(given.source, i, n)) continue;
    A *si = s + i * ld, *xi = x + i * ld;
    for (int64_t j = 0; j < W; ++j) {
      const A weight = share[j] * (xi[j] / mass[j]);
      si[j] = given.logsumexp ? A(n) * weight : weight * (1 + (si[j] - value[j]) * heat);
    }
    for (int64_t k = 0; k < n; ++k)
      for (int64_t j = 0; j < W; ++j) dcost[(i + k) * ld + j + k] += si[j];
  }
  return total / double(columns);
}

// Every L_n of a sentence into `losses`; raw [T, ld] becomes a = d loss / d raw. Returns the sum of the log-probabilities
// on the diagonal whose two positions count; each has -ce_share in a.
template <class A>
inline double eisl_sentence(const Sentence& given, const Ngram* ngrams, int64_t count, double ce_share, A* raw, A* scratch, double* losses) {
  const int64_t ld = eisl_width(given.U), size = given.T * ld;
  A *cost = scratch, *dcost = cost + size, *s = dcost + size, *x = s + size, *column = x + size;
  const A floor = A(given.floor);
  for (int64_t i = 0; i < size; ++i) {
    cost[i] = raw[i] > floor || raw[i] != raw[i] ? raw[i] : floor;
    dcost[i] = 0;
  }
  for (int64_t k = 0; k < count; ++k) losses[k] = eisl_ngram<A>(given, ngrams[k], cost, dcost, s, x, column);
  double diagonal = 0;
  for (int64_t i = 0; i < size; ++i) dcost[i] = raw[i] > floor ? dcost[i] : A(0);
  for (int64_t i = 0; ce_share != 0 && i < given.T; ++i) {
    if ((given.source && !given.source[i]) || (given.target && !given.target[i])) continue;
    diagonal += double(raw[i * ld + i]);
    dcost[i * ld + i] -= A(ce_share);
  }
  for (int64_t i = 0; i < size; ++i) raw[i] = dcost[i];
  return diagonal;
}

W2S_KERNELS(EislKernels, eisl_row<Real>, eisl_sentence<Real>, eisl_gradient<Real>)

#include "cpu/target_end.h"
