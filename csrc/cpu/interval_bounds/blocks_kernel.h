// The blocks that the hosts' loops call. Included once a target (no include guard).
#include "cpu/interval_bounds/dual_kernel.h"
#include "cpu/interval_bounds/rows_kernel.h"

using interval::AffineKernels;
using interval::ConvKernels;
using interval::LinearKernels;
using interval::MarginKernels;
using interval::WeightKernels;

template <class A>
inline int64_t chain(int64_t k) { return dot_terms<A>(k); }
template <class A>
inline int64_t panel_width() { return PANEL<A>; }
template <class A>
inline int64_t tile_height() { return ROWS<A>; }

template <class A>
inline Rounding<A> rounding_of(bool sound, int64_t terms, double spread = 0) {
  return sound ? Rounding<A>(terms, spread) : Rounding<A>();
}

template <class A>
inline void center(const void* a, const void* b, Dtype dtype, bool bounds, bool sound, int64_t terms, double spread, int64_t k,
                   A* c, A* r) {
  center_row<A>(a, b, dtype, bounds, rounding_of<A>(sound, terms, spread), k, c, r);
}

// Memory of this thread that grows to what was asked for; `slot` keeps uses apart.
template <class A, int slot>
inline A* workspace(int64_t elements) {
  thread_local std::vector<A> memory;
  if (int64_t(memory.size()) < elements) memory.resize(size_t(elements));
  return memory.data();
}

// |w|, and dw += sign(w) turned: what stands around products of the library, which take no |W| in registers.
template <class A>
inline void absolute(const A* w, int64_t n, A* out) {
  using V = Vec<A>;
  int64_t i = 0;
  for (; i + V::W <= n; i += V::W) V::load(w + i).abs().store(out + i);
  for (; i < n; ++i) out[i] = std::abs(w[i]);
}
template <class A>
inline void add_signed(const A* w, const A* turned, int64_t n, A* dw) {
  using V = Vec<A>;
  const V zero = V::set(0);
  int64_t i = 0;
  for (; i + V::W <= n; i += V::W) {
    const V weight = V::load(w + i), value = V::load(turned + i);
    (V::load(dw + i) + V::select(V::gt(weight, zero), value, V::select(V::gt(zero, weight), zero - value, zero))).store(dw + i);
  }
  for (; i < n; ++i) dw[i] += w[i] > 0 ? turned[i] : w[i] < 0 ? -turned[i] : A(0);
}

// One row of centres and radii to outputs; m, s and bias are readable to whole PADs.
template <class A>
inline void finish(const A* m, const A* s, const A* bias, int64_t n, const interval::Call& call, Dtype dtype, void* x, void* y) {
  const int64_t bytes = bytes_of(dtype);
  for (int64_t j = 0; j < n; j += TILE)
    finish_row<A>(m + j, s + j, bias ? bias + j : nullptr, int(n - j < TILE ? n - j : TILE), {call.bounds_out, call.relu}, Rounding<A>(),
                  dtype, static_cast<char*>(x) + j * bytes, static_cast<char*>(y) + j * bytes);
}

// `rows` rows by n <= 256 outputs; stride and the offset between rows of the outputs are in bytes. k is cut so that a
// tile's rows of x stay in L1 and the block of W in L2.
template <class A>
inline void forward_block(const A* c, const A* r, int64_t ldx, int64_t rows, const A* w, int64_t ldw, int64_t n, int64_t k, const A* bias,
                          const interval::Call& call, int64_t terms, Dtype dtype, void* x, int64_t stride, void* y) {
  const int64_t cut = interval::cut_of(k, rows, sizeof(A)), ld = padded(int(n)) + 8;
  // few rows that stay in L1 are all multiplied while a row of W passes, so that it comes from memory in one piece
  const bool together = k <= cut && rows * ldx * 2 * int64_t(sizeof(A)) <= interval::NEAR;
  const int64_t tiles = together || k > cut ? (rows + ROWS<A> - 1) / ROWS<A> : 1;
  A* m = workspace<A, 0>(2 * tiles * ROWS<A> * ld);
  A* s = m + tiles * ROWS<A> * ld;
  const Rounding<A> rounding = rounding_of<A>(call.sound, terms, call.spread);
  const auto finished = [&](int64_t p, const A* of_m, const A* of_s) __attribute__((always_inline)) {
    finish_row<A>(of_m, of_s, bias, int(n), {call.bounds_out, call.relu}, rounding, dtype, static_cast<char*>(x) + p * stride,
                  static_cast<char*>(y) + p * stride);
  };
  if (together) {
    dot_rows<A>(c, r, ldx, rows, w, ldw, n, k, m, s, ld);
    for (int64_t p = 0; p < rows; ++p) finished(p, m + p * ld, s + p * ld);
    return;
  }
  // rows of W 2^k bytes apart would fight for the same lines of L2, so a block of a cut W is copied together
  const int64_t packed = k > cut && rows >= 32 ? cut + 16 : 0;
  A* block = packed ? workspace<A, 1>(n * packed) : nullptr;
  for (int64_t at = 0; at < k; at += cut) {
    const int64_t width = k - at < cut ? k - at : cut;
    for (int64_t j = 0; packed && j < n; ++j) std::memcpy(block + j * packed, w + j * ldw + at, size_t(width) * sizeof(A));
    for (int64_t p = 0; p < rows; p += ROWS<A>) {
      const int count = int(rows - p < ROWS<A> ? rows - p : ROWS<A>);
      A *tm = m + (tiles > 1 ? p * ld : 0), *ts = s + (tiles > 1 ? p * ld : 0);
      dot_block<A>(c + p * ldx + at, r + p * ldx + at, ldx, count, packed ? block : w + at, packed ? packed : ldw, n, width, tm, ts, ld, at > 0);
      if (at + cut < k) continue;
      for (int q = 0; q < count; ++q) finished(p + q, tm + q * ld, ts + q * ld);
    }
  }
}

// m += c . w and s += r . |w| for G rows of w, which lie anywhere: those of the next group are asked for meanwhile
// (AHEAD), as hardware follows one row to its end only. m and s are padded to whole vectors.
template <class A, int G, bool AHEAD>
inline void alive_group(const A* c, const A* r, const A* w, int64_t ldw, int64_t wide, const int32_t* alive, A* m, A* s) {
  using V = Vec<A>;
  V cv[G], rv[G];
  const A *row[G], *next[G];
  W2S_UNROLL for (int g = 0; g < G; ++g) {
    cv[g] = V::set(c[alive[g]]);
    rv[g] = V::set(r[alive[g]]);
    row[g] = w + alive[g] * ldw;
    next[g] = AHEAD ? w + alive[G + g] * ldw : nullptr;
  }
  const auto step = [&](int64_t e, const auto& load) __attribute__((always_inline)) {
    V center = V::load(m + e), radius = V::load(s + e);
    W2S_UNROLL for (int g = 0; g < G; ++g) {
      const V v = load(row[g] + e);
      if constexpr (AHEAD) __builtin_prefetch(next[g] + e);
      center = V::fma(cv[g], v, center);
      radius = V::fma(rv[g], v.abs(), radius);
    }
    center.store(m + e);
    radius.store(s + e);
  };
  int64_t e = 0;
  for (; e + V::W <= wide; e += V::W) step(e, [](const A* at) __attribute__((always_inline)) { return V::load(at); });
  if (e < wide) step(e, [&](const A* at) __attribute__((always_inline)) { return V::load_first(at, int(wide - e)); });
}

// ALIVE_WIDTH outputs of a few rows, w stored [k, n]; only the listed rows of w are read, each once
template <class A>
inline void forward_alive(const A* c, const A* r, int64_t ldx, int64_t rows, const A* w, int64_t ldw, int64_t n, int64_t j, const int32_t* alive,
                          int64_t count, const A* bias, const interval::Call& call, int64_t terms, Dtype dtype, void* x, int64_t stride, void* y) {
  constexpr int64_t WIDE = interval::ALIVE_WIDTH;
  constexpr int G = 8;
  A m[4 * WIDE], s[4 * WIDE];
  const int64_t wide = n - j < WIDE ? n - j : WIDE;
  for (int64_t e = 0; e < rows * WIDE; ++e) m[e] = s[e] = 0;
  int64_t i = 0;
  for (; i + G <= count; i += G)
    for (int64_t p = 0; p < rows; ++p) {
      const auto group = p == 0 && i + 2 * G <= count ? alive_group<A, G, true> : alive_group<A, G, false>;
      group(c + p * ldx, r + p * ldx, w + j, ldw, wide, alive + i, m + p * WIDE, s + p * WIDE);
    }
  for (; i < count; ++i)
    for (int64_t p = 0; p < rows; ++p)
      alive_group<A, 1, false>(c + p * ldx, r + p * ldx, w + j, ldw, wide, alive + i, m + p * WIDE, s + p * WIDE);
  const int64_t bytes = bytes_of(dtype);
  for (int64_t p = 0; p < rows; ++p)
    finish_row<A>(m + p * WIDE, s + p * WIDE, bias ? bias + j : nullptr, int(wide), {call.bounds_out, call.relu},
                  rounding_of<A>(call.sound, terms, call.spread), dtype, static_cast<char*>(x) + p * stride + j * bytes,
                  static_cast<char*>(y) + p * stride + j * bytes);
}

// and adds gm to `sum` where the bias wants its gradient
template <class A>
inline void gradient_of(const void* ga, const void* gb, const void* oa, const void* ob, Dtype dtype, const interval::Call& call, int n, A* gm, A* gr, A* sum) {
  gradient_row<A>(ga, gb, oa, ob, dtype, {call.bounds_out, call.relu}, n, gm, gr);
  if (sum)
    for (int i = 0; i < n; ++i) sum[i] += gm[i];
}

template <class A>
inline void input_gradients(const A* m, const A* s, int64_t n, bool bounds, Dtype dtype, void* a, void* b) {
  const int64_t bytes = bytes_of(dtype);
  for (int64_t i = 0; i < n; i += TILE)
    input_gradient<A>(m + i, s + i, int(n - i < TILE ? n - i : TILE), bounds, dtype, static_cast<char*>(a) + i * bytes,
                      static_cast<char*>(b) + i * bytes);
}

template <class A>
inline void stream(const A* w, int64_t ldw, int64_t rows, int64_t k, int64_t batch, const A* gm, const A* gr, int64_t ldg, const A* m,
                   const A* r, int64_t ld, A* xm, A* xs, A* dw, int64_t ldd) {
  stream_rows<A>(w, ldw, rows, k, batch, gm, gr, ldg, m, r, ld, xm, xs, dw, ldd);
}

// one panel of the gradient of the box: gm W and gr |W|, over blocks of rows of W that are copied together
template <class A>
inline void input_panel(const A* gm, const A* gr, int64_t ldg, int64_t rows, const A* w, int64_t ldw, int64_t n, int64_t columns, bool bounds,
                        Dtype dtype, void* a, int64_t stride, void* b) {
  constexpr int64_t BLOCK = 1024;
  A* out = workspace<A, 0>(2 * rows * PANEL<A>);
  A* other = out + rows * PANEL<A>;
  const bool copy = rows > 8 || columns < PANEL<A>;
  A* panel = copy ? workspace<A, 1>(BLOCK * PANEL<A>) : nullptr;
  for (int64_t i = 0; i < n; i += BLOCK) {
    const int64_t count = n - i < BLOCK ? n - i : BLOCK;
    if (copy) copy_panel<A>(w + i * ldw, ldw, count, columns, panel, PANEL<A>);
    outer_block<A>(gm + i, gr + i, ldg, rows, copy ? panel : w + i * ldw, copy ? PANEL<A> : ldw, count, nullptr, out, other, PANEL<A>, i > 0);
  }
  for (int64_t p = 0; p < rows; ++p)
    input_gradient<A>(out + p * PANEL<A>, other + p * PANEL<A>, int(columns), bounds, dtype, static_cast<char*>(a) + p * stride,
                      static_cast<char*>(b) + p * stride);
}

// All gradients of a strip of columns of W, `panels` panels wide, and a batch of a few rows: W and dW pass once from top to
// bottom, those of the next rows asked for meanwhile. g: see sign_tile. a, b or dw may be null.
template <class A>
inline void gradient_strip(const A* gm, const A* gr, int64_t ldg, const A* g, int64_t batch, const A* c, const A* r, int64_t ldx, const A* w,
                           int64_t ldw, int64_t n, int64_t columns, bool bounds, Dtype dtype, void* a, int64_t stride, void* b, A* dw, int64_t ldd) {
  constexpr int64_t BLOCK = 32, P = PANEL<A>, LINE = 64 / int64_t(sizeof(A));  // rows of W at a time: a strip of them stays in L2
  const int64_t panels = (columns + P - 1) / P, size = batch * 2 * P;
  A* x = workspace<A, 0>(2 * panels * size + BLOCK * P);
  A *sums = x + panels * size, *rest = sums + panels * size;
  const auto wide = [&](int64_t j) { return columns - j * P < P ? columns - j * P : P; };
  for (int64_t j = 0; dw && j < panels; ++j) {
    copy_panel<A>(c + j * P, ldx, batch, wide(j), x + j * size, 2 * P);
    copy_panel<A>(r + j * P, ldx, batch, wide(j), x + j * size + P, 2 * P);
  }
  for (int64_t i = 0; i < n; i += BLOCK) {
    const int64_t count = n - i < BLOCK ? n - i : BLOCK, next = i + BLOCK, ahead = n - next < BLOCK ? n - next : BLOCK;
    for (int64_t j = 0; j < panels; ++j) {
      const A* from = w + i * ldw + j * P;
      for (int64_t q = 0; q < ahead; ++q)
        for (int64_t e = 0; e < wide(j); e += LINE) {
          __builtin_prefetch(w + (next + q) * ldw + j * P + e, 0, 2);
          if (dw) __builtin_prefetch(dw + (next + q) * ldd + j * P + e, 1, 2);
        }
      if (a) {
        const bool copy = wide(j) < P;
        if (copy) copy_panel<A>(from, ldw, count, wide(j), rest, P);
        outer_block<A>(gm + i, gr + i, ldg, batch, copy ? rest : from, copy ? P : ldw, count, nullptr, sums + j * size, sums + j * size + batch * P, P, i > 0);
      }
      for (int64_t q = 0; dw && q < count; q += ROWS<A>)
        sign_tile<A>(g + (i + q) / ROWS<A> * batch * 2 * ROWS<A>, x + j * size, batch, from + q * ldw, ldw, dw + (i + q) * ldd + j * P, ldd,
                     int(count - q < ROWS<A> ? count - q : ROWS<A>), wide(j), false);
    }
  }
  for (int64_t j = 0; a && j < panels; ++j)
    for (int64_t p = 0; p < batch; ++p) {
      const A* m = sums + j * size + p * P;
      const int64_t at = p * stride + j * P * bytes_of(dtype);
      input_gradient<A>(m, m + batch * P, int(wide(j)), bounds, dtype, static_cast<char*>(a) + at, static_cast<char*>(b) + at);
    }
}

// gm, gr of ROWS outputs as [batch][2 ROWS]; the rows are readable past the last output (zeros)
template <class A>
inline void pack_gradient(const A* gm, const A* gr, int64_t ldg, int64_t batch, A* out) {
  for (int64_t p = 0; p < batch; ++p, out += 2 * ROWS<A>) {
    std::memcpy(out, gm + p * ldg, sizeof(A) * ROWS<A>);
    std::memcpy(out + ROWS<A>, gr + p * ldg, sizeof(A) * ROWS<A>);
  }
}

// one panel of dW: `rows` rows of W by `columns` columns, from column-shifted centres and radii
template <class A>
inline void weight_panel(const A* g, int64_t batch, const A* c, const A* r, int64_t ldx, const A* w, int64_t ldw, A* dw, int64_t ldd,
                         int64_t rows, int64_t columns) {
  constexpr int64_t BLOCK = 128;  // of the batch: its panel of m and r is read from L1 or L2 while tiles of W pass
  A* x = workspace<A, 0>(BLOCK * 2 * PANEL<A>);
  for (int64_t p = 0; p < batch; p += BLOCK) {
    const int64_t count = batch - p < BLOCK ? batch - p : BLOCK;
    copy_panel<A>(c + p * ldx, ldx, count, columns, x, 2 * PANEL<A>);
    copy_panel<A>(r + p * ldx, ldx, count, columns, x + PANEL<A>, 2 * PANEL<A>);
    for (int64_t q = 0; q < rows; q += ROWS<A>) {
      const int tall = int(rows - q < ROWS<A> ? rows - q : ROWS<A>);
      sign_tile<A>(g + (q / ROWS<A> * batch + p) * 2 * ROWS<A>, x, count, w + q * ldw, ldw, dw + q * ldd, ldd, tall, columns, p > 0);
    }
  }
}
