// Included once a target, inside its namespace, by target_begin.h (hence no include guard).
// exp, sums of a tile, and typed loads and stores, for V = Vec<float> or Vec<double>.

constexpr int TILE = 1024;  // elements; a few tiles of float stay in L1

// exp(r) of |r| <= log(2) / 2 in float
template <class V>
W2S_INLINE V exp_near_zero(V r) {
  V p = V::set(0.001384364441037178f);
  p = V::fma(p, r, V::set(0.008374163880944252f));
  p = V::fma(p, r, V::set(0.04166800156235695f));
  p = V::fma(p, r, V::set(0.16666431725025177f));
  p = V::fma(p, r, V::set(0.4999999403953552f));
  p = V::fma(p, r, V::set(1.0f));
  p = V::fma(p, r, V::set(1.0f));
  return p;
}

// exp(x) for x <= 88 (709): relative error 0.75 2^-23 in float, 0.8 2^-52 in double; exactly 0 far below, NaN for NaN.
template <class V>
W2S_INLINE V vexp(V x) {
  if constexpr (sizeof(typename V::Scalar) == 4) {
    const V low = V::set(V::scale_underflows ? -104.0f : -87.33654f);
    const V clamped = V::max(low, x);
    const V n = (clamped * V::set(1.44269504f)).round();
    V r = V::fma(n, V::set(-0.693145751953125f), clamped);
    r = V::fma(n, V::set(-1.42860677e-06f), r);
    const V p = exp_near_zero(r);
    if constexpr (V::scale_underflows) return V::scale(p, n);
    else return V::select(V::gt(low, x), V::set(0.0f), V::scale(p, n));
  } else {
    constexpr double c[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                            1.0 / 5040,       1.0 / 720,       1.0 / 120,      1.0 / 24,      1.0 / 6,      0.5, 1.0, 1.0};
    const V low = V::set(-708.0);
    const V clamped = V::max(low, x);
    const V n = (clamped * V::set(1.4426950408889634)).round();
    V r = V::fma(n, V::set(-0.693147180369123816490), clamped);
    r = V::fma(n, V::set(-1.90821492927058770002e-10), r);
    V p = V::set(c[0]);
    for (int i = 1; i < 14; ++i) p = V::fma(p, r, V::set(c[i]));
    return V::select(V::gt(low, x), V::set(0.0), V::scale(p, n));
  }
}

template <class A>
constexpr A infinity = std::numeric_limits<A>::infinity();

// A multiple of every vector width: buffers of a tile are padded to it.
constexpr int PAD = 16;
W2S_INLINE int padded(int n) { return (n + PAD - 1) / PAD * PAD; }

// n elements of `dtype` at `src` as A in dst, the rest up to padded(n) filled with `fill`. Never reads past n.
template <class A>
inline void widen(const void* src, Dtype dtype, int n, A fill, A* dst) {
  using V = Vec<A>;
  int i = 0;
  if (dtype == Dtype::bf16) {
    const uint16_t* p = static_cast<const uint16_t*>(src);
    for (; i + V::W <= n; i += V::W) V::load_bf16(p + i).store(dst + i);
    for (; i < n; ++i) dst[i] = A(bf16_to_float(p[i]));
  } else if (dtype == Dtype::f16) {
    const uint16_t* p = static_cast<const uint16_t*>(src);
    for (; i + V::W <= n; i += V::W) V::load_f16(p + i).store(dst + i);
    for (; i < n; ++i) dst[i] = A(half_to_float(p[i]));
  } else if (dtype == Dtype::f32) {
    const float* p = static_cast<const float*>(src);
    for (; i < n; ++i) dst[i] = A(p[i]);
  } else {
    const double* p = static_cast<const double*>(src);
    for (; i < n; ++i) dst[i] = A(p[i]);
  }
  for (; i < padded(n); ++i) dst[i] = fill;
}

// n elements of A to `dtype`, rounded to nearest even.
template <class A>
inline void narrow(const A* src, int n, Dtype dtype, void* dst) {
  if (dtype == Dtype::f32) {
    float* p = static_cast<float*>(dst);
    for (int i = 0; i < n; ++i) p[i] = float(src[i]);
  } else if (dtype == Dtype::f64) {
    double* p = static_cast<double*>(dst);
    for (int i = 0; i < n; ++i) p[i] = double(src[i]);
  } else if (dtype == Dtype::bf16) {
    uint16_t* p = static_cast<uint16_t*>(dst);
    for (int i = 0; i < n; ++i) p[i] = float_to_bf16(float(src[i]));
  } else {
    uint16_t* p = static_cast<uint16_t*>(dst);
    for (int i = 0; i < n; ++i) p[i] = float_to_half(float(src[i]));
  }
}

// max of a padded tile; NaN is skipped (it shows up in the sum of exponentials)
template <class A>
W2S_INLINE A tile_max(const A* z, int n) {
  using V = Vec<A>;
  V a = V::set(-infinity<A>), b = a;
  for (int i = 0; i < padded(n); i += PAD) {
    a = V::max(V::load(z + i), a);
    for (int j = V::W; j < PAD; j += V::W) b = V::max(V::load(z + i + j), b);
  }
  return V::max(a, b).top();
}

// sum of exp(z - m) over a padded tile (padding holds -infinity); m = -infinity gives 0
template <class A>
W2S_INLINE A tile_exp_sum(const A* z, int n, A m) {
  using V = Vec<A>;
  const V ref = V::set(m == -infinity<A> ? A(0) : m);
  V a = V::set(0), b = a;
  int i = 0;
  const int end = padded(n);
  for (; i + 2 * V::W <= end; i += 2 * V::W) {
    a = a + vexp(V::load(z + i) - ref);
    b = b + vexp(V::load(z + i + V::W) - ref);
  }
  for (; i < end; i += V::W) a = a + vexp(V::load(z + i) - ref);
  return (a + b).sum();
}
