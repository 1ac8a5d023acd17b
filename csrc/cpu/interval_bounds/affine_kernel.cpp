// an affine map of n <= TILE entries of a box: one scale and shift an entry, or (across = 0) one for all.
#include "cpu/interval_bounds/boxes.h"

#include "cpu/target_begin.h"

#include "cpu/channels_kernel.h"
#include "cpu/interval_bounds/blocks_kernel.h"

// Fast rounding of entries that are of the accumulating type where they lie: as many as are whole vectors; returns how many.
// far: outputs are too large for the caches, and whole lines of theirs go past them.
template <class A, bool across>
inline int affine_in_place(const A* lower, const A* upper, const A* s, const A* t, int n, bool relu, bool far, A* low, A* high) {
  using V = Vec<A>;
  constexpr int bytes = int(sizeof(A)) * V::W;
  const V zero = V::set(0), least = relu ? zero : zero - V::set(infinity<A>);
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  far = far && aligned(low) && aligned(high);
  int i = 0;
  for (; i + V::W <= n; i += V::W) {
    const V scale = across ? V::load(s + i) : V::set(*s), shift = across ? V::load(t + i) : V::set(*t);
    const V a = V::load(lower + i), b = V::load(upper + i);
    const auto turned = V::gt(zero, scale);
    const V p = V::fma(scale, V::select(turned, b, a), shift), q = V::fma(scale, V::select(turned, a, b), shift);
    const V x = V::max(least, p), y = V::max(least, q);  // NaN stays NaN
    if (far) stream_bytes<bytes>(low + i, &x.v), stream_bytes<bytes>(high + i, &y.v);
    else x.store(low + i), y.store(high + i);
  }
  if (far) stream_fence();
  return i;
}

template <class A>
inline void affine(const void* lower, const void* upper, Dtype dtype, const A* s, const A* t, bool across, int n, bool relu, bool sound,
                   bool far, void* low, void* high) {
  using V = Vec<A>;
  if (!sound && dtype == own_dtype<A>) {
    const auto in_place = across ? affine_in_place<A, true> : affine_in_place<A, false>;
    const int whole = in_place(static_cast<const A*>(lower), static_cast<const A*>(upper), s, t, n, relu, far, static_cast<A*>(low),
                               static_cast<A*>(high));
    if (whole == n) return;
    lower = static_cast<const A*>(lower) + whole, upper = static_cast<const A*>(upper) + whole;
    low = static_cast<A*>(low) + whole, high = static_cast<A*>(high) + whole;
    if (across) s += whole, t += whole;
    n -= whole;
  }
  A scales[TILE], shifts[TILE];
  if (!across) {
    std::fill(scales, scales + padded(n), *s);
    std::fill(shifts, shifts + padded(n), *t);
    s = scales, t = shifts;
  }
  constexpr A u = std::numeric_limits<A>::epsilon() / 2;
  A x[TILE], y[TILE];
  widen<A>(lower, dtype, n, A(0), x);
  widen<A>(upper, dtype, n, A(0), y);
  const V zero = V::set(0), inf = V::set(infinity<A>), slack = V::set(4 * u), tiny = V::set(sizeof(A) == 8 ? A(1e-300) : A(1e-30));
  for (int i = 0; i < padded(n); i += V::W) {
    const V scale = V::load(s + i), shift = V::load(t + i), a = V::load(x + i), b = V::load(y + i);
    const auto turned = V::gt(zero, scale);
    const V first = V::select(turned, b, a), second = V::select(turned, a, b);
    V p = V::fma(scale, first, shift), q = V::fma(scale, second, shift);
    if (sound) {
      const V m = (scale * first).abs() + shift.abs(), r = (scale * second).abs() + shift.abs();
      p = V::select(V::gt(inf, m), p - V::fma(m, slack, tiny), zero - inf);
      q = V::select(V::gt(inf, r), q + V::fma(r, slack, tiny), inf);
    }
    if (relu) {
      p = V::max(zero, p);
      q = V::max(zero, q);
    }
    p.store(x + i);
    q.store(y + i);
  }
  if (sound) {
    narrow_outward<A>(x, n, dtype, true, low);
    narrow_outward<A>(y, n, dtype, false, high);
  } else {
    narrow<A>(x, n, dtype, low);
    narrow<A>(y, n, dtype, high);
  }
}

// gradients of n entries; ds, dt get each entry's part of those of scale and shift
template <class A>
inline void affine_gradient(const void* gl, const void* gu, const void* lower, const void* upper, const void* low, const void* high,
                            Dtype dtype, const A* s, int n, bool relu, void* dl, void* du, A* ds, A* dt) {
  using V = Vec<A>;
  A x[TILE], y[TILE], g[TILE], h[TILE];
  gradient_row<A>(gl, gu, low, high, dtype, {false, relu}, n, g, h);
  widen<A>(lower, dtype, n, A(0), x);
  widen<A>(upper, dtype, n, A(0), y);
  for (int i = 0; i < padded(n); i += V::W) {
    const V scale = V::load(s + i), p = V::load(g + i), q = V::load(h + i), zero = V::set(0);
    const auto turned = V::gt(zero, scale);
    const V first = V::select(turned, q, p), second = V::select(turned, p, q);
    V::fma(first, V::load(x + i), second * V::load(y + i)).store(ds + i);
    (p + q).store(dt + i);
    (first * scale).store(x + i);
    (second * scale).store(y + i);
  }
  narrow<A>(x, n, dtype, dl);
  narrow<A>(y, n, dtype, du);
}

// dx = g + h (x - mean)
template <class A>
inline void stats_gradient(const void* in, Dtype dtype, const A* g, const A* h, const A* mean, int n, void* out) {
  using V = Vec<A>;
  A x[TILE];
  widen<A>(in, dtype, n, A(0), x);
  for (int i = 0; i < padded(n); i += V::W)
    V::fma(V::load(h + i), V::load(x + i) - V::load(mean + i), V::load(g + i)).store(x + i);
  narrow<A>(x, n, dtype, out);
}

// Sums of float64 beside values of any width: eight lanes, whatever the registers hold.
typedef double Eight __attribute__((vector_size(64)));

template <class A>
W2S_INLINE Eight eight_of(const A* x) {
  typedef A Values __attribute__((vector_size(8 * sizeof(A))));
  Values v;
  std::memcpy(&v, x, sizeof(v));
  return __builtin_convertvector(v, Eight);
}
W2S_INLINE double sum_of(Eight a) { return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7])); }

template <class A>
inline double sum_run(const A* x, int n) {
  Eight a{}, b{};
  int i = 0;
  for (; i + 16 <= n; i += 16) a += eight_of(x + i), b += eight_of(x + i + 8);
  double rest = 0;
  for (; i < n; ++i) rest += double(x[i]);
  return sum_of(a + b) + rest;
}

// sum of x - shift and of its square
template <class A>
inline void moments(const void* in, Dtype dtype, int n, double shift, double* sum, double* squares) {
  A buffer[TILE];
  const A* x = static_cast<const A*>(in);
  if (dtype != own_dtype<A>) {
    widen<A>(in, dtype, n, A(0), buffer);
    x = buffer;
  }
  const Eight center = Eight{} + shift;
  Eight a[2] = {}, b[2] = {};
  int i = 0;
  for (; i + 16 <= n; i += 16)
    for (int j = 0; j < 2; ++j) {
      const Eight d = eight_of(x + i + 8 * j) - center;
      a[j] += d, b[j] += d * d;
    }
  double first = sum_of(a[0] + a[1]), second = sum_of(b[0] + b[1]);
  for (; i < n; ++i) {
    const double d = double(x[i]) - shift;
    first += d, second += d * d;
  }
  *sum += first, *squares += second;
}

// the same of n entries that are channels of their own
template <class A>
inline void moments_across(const void* in, Dtype dtype, int n, const double* shift, double* sum, double* squares) {
  A x[TILE];
  widen<A>(in, dtype, n, A(0), x);
  for (int i = 0; i < n; ++i) {
    const double d = double(x[i]) - shift[i];
    sum[i] += d, squares[i] += d * d;
  }
}

W2S_KERNELS(AffineKernels, affine<Real>, affine_gradient<Real>, stats_gradient<Real>, sum_run<Real>, moments<Real>, moments_across<Real>)

#include "cpu/target_end.h"
