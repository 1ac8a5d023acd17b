// Included once a target (no include guard), after dual_kernel.h: what stands before and after the products.
//
// Sound rounding. With unit u = eps / 2 and chains of n terms, gamma = n u: |fl(sum m w) - sum m w| <= gamma sum |m| |w|, so
// the radius operand is r + gamma |m|, rounded up; its own product is too small by at most a factor 1 - gamma, hence
// 1 + 2 gamma; 8 u and 4 u |m| cover the bias, the last subtraction and this formula itself; `tiny` covers underflow.
//
// A spread g widens a sound box by g (|W| |x| + |b|), what another evaluation of the layer can be off by. Every |x| is at
// most |m| + r, so it is g (|m| + r) in the radius operand, and g |b| with the bias. Where |W| |x| may overflow, partial sums
// of that evaluation may: the radius is then at least g times the largest number, and nothing is known.

template <class A>
struct Rounding {
  bool sound = false;
  A eta = 0, up = 1, grow = 1, slack = 0, tiny = 0, spread = 0, limit = infinity<A>;
  Rounding() = default;
  explicit Rounding(int64_t terms, double widened = 0) : sound(true) {
    constexpr A u = std::numeric_limits<A>::epsilon() / 2;
    const A own = A(terms + 2) * u * A(1.01);
    spread = A(widened) * (1 + 8 * u);
    eta = own + spread;
    up = 1 + 4 * u + spread;
    grow = A(1) + 2 * own + 8 * u;
    slack = 4 * u;
    tiny = sizeof(A) == 8 ? A(1e-300) : A(1e-30);
    if (widened > 0) limit = std::numeric_limits<A>::max() * std::min(spread, A(1)) / 2;
  }
};

// longest chain of roundings in dot_block over k terms, and in outer_block
template <class A>
inline int64_t dot_terms(int64_t k) { return k / Vec<A>::W + k / 512 + 10; }
inline int64_t outer_terms(int64_t k) { return k + 8; }

// Centre and radius of n numbers, from lower and upper or from centre and radius, padded with zeros to whole PADs.
template <class A>
inline void center_row(const void* a, const void* b, Dtype dtype, bool bounds, const Rounding<A>& rounding, int64_t n, A* c, A* r) {
  using V = Vec<A>;
  const V half = V::set(A(0.5)), zero = V::set(0), up = V::set(rounding.up), eta = V::set(rounding.eta);
  const V smallest = V::set(std::numeric_limits<A>::min());
  const int64_t bytes = bytes_of(dtype);
  const bool own = dtype == own_dtype<A>;
  A first[TILE], second[TILE];
  for (int64_t at = 0; at < n; at += TILE) {
    const int m = int(n - at < TILE ? n - at : TILE);
    const char *pa = static_cast<const char*>(a) + at * bytes, *pb = static_cast<const char*>(b) + at * bytes;
    const A *x = reinterpret_cast<const A*>(pa), *y = reinterpret_cast<const A*>(pb);
    if (!own || m != padded(m)) {
      widen<A>(pa, dtype, m, A(0), first);
      widen<A>(pb, dtype, m, A(0), second);
      x = first, y = second;
    }
    for (int i = 0; i < padded(m); i += V::W) {
      const V p = V::load(x + i), q = V::load(y + i);
      // p + (q - p) / 2 is exactly p where q = p
      const V center = bounds ? V::fma(half, q - p, p) : p;
      V radius = bounds ? half * (q - p) : q;
      if (rounding.sound) {
        if (bounds) radius = V::max(q - center, center - p);
        const V grown = V::fma(eta, center.abs(), V::fma(radius, up, smallest));
        radius = V::select(V::gt(center.abs() + radius, zero), grown, zero);  // an exact 0 stays one
      }
      center.store(c + at + i);
      radius.store(r + at + i);
    }
  }
}

// 16-bit value at or beyond x towards -infinity (lower) or +infinity
inline uint16_t step_16(uint16_t y, bool lower) {
  const bool negative = y & 0x8000u;
  if ((y & 0x7fffu) == 0) return lower ? 0x8001u : 0x0001u;
  return uint16_t(negative == lower ? y + 1 : y - 1);
}

template <class A>
inline void narrow_outward(const A* x, int n, Dtype dtype, bool lower, void* out) {
  if (dtype == Dtype::f32 || dtype == Dtype::f64) return narrow<A>(x, n, dtype, out);
  uint16_t* to = static_cast<uint16_t*>(out);
  for (int i = 0; i < n; ++i) {
    const float value = float(x[i]);
    uint16_t y = dtype == Dtype::bf16 ? float_to_bf16(value) : float_to_half(value);
    const float back = dtype == Dtype::bf16 ? bf16_to_float(y) : half_to_float(y);
    if (lower ? back > value : back < value) y = step_16(y, lower);
    to[i] = y;
  }
}

struct Form {
  bool bounds, relu;  // lower and upper, or centre and radius; relu comes with bounds
};

// n <= TILE outputs of one row: m, s and bias are readable to whole PADs
template <class A>
inline void finish_row(const A* m, const A* s, const A* bias, int n, Form form, const Rounding<A>& rounding, Dtype dtype, void* a, void* b) {
  using V = Vec<A>;
  const V zero = V::set(0), inf = V::set(infinity<A>), grow = V::set(rounding.grow), slack = V::set(rounding.slack), tiny = V::set(rounding.tiny);
  const V spread = V::set(rounding.spread), limit = V::set(rounding.limit);
  A first[TILE], second[TILE];
  const bool here = dtype == own_dtype<A> && n == padded(n);
  A *low = here ? static_cast<A*>(a) : first, *high = here ? static_cast<A*>(b) : second;
  for (int i = 0; i < padded(n); i += V::W) {
    V center = V::load(m + i), radius = V::load(s + i);
    if (rounding.sound && bias) radius = V::fma(V::load(bias + i).abs(), spread, radius);
    if (bias) center = center + V::load(bias + i);
    if (rounding.sound) radius = V::fma(radius, grow, V::fma(center.abs(), slack, tiny));
    V x = center, y = radius;
    if (form.bounds) {
      x = center - radius;
      y = center + radius;
    }
    if (rounding.sound) {  // where anything overflowed or was NaN, nothing is known
      const auto known = V::gt(limit, radius) & V::gt(inf, center.abs() + radius);
      x = V::select(known, x, form.bounds ? zero - inf : zero);
      y = V::select(known, y, inf);
    }
    if (form.relu) {
      x = V::max(zero, x);
      y = V::max(zero, y);
    }
    x.store(low + i);
    y.store(high + i);
  }
  if (here) return;
  if (rounding.sound && form.bounds) {
    narrow_outward<A>(first, n, dtype, true, a);
    narrow_outward<A>(second, n, dtype, false, b);
  } else {
    narrow<A>(first, n, dtype, a);
    narrow<A>(second, n, dtype, b);
  }
}

// Gradients of centre and radius before the activation, n numbers; padded with zeros to whole PADs
template <class A>
inline void gradient_row(const void* ga, const void* gb, const void* oa, const void* ob, Dtype dtype, Form form, int n, A* gm, A* gr) {
  using V = Vec<A>;
  const V zero = V::set(0);
  A memory[4][TILE];
  const bool here = dtype == own_dtype<A> && n == padded(n);
  const auto read = [&](const void* from, A* to) -> const A* {
    if (here) return static_cast<const A*>(from);
    widen<A>(from, dtype, n, A(0), to);
    return to;
  };
  const A *g[2] = {read(ga, memory[0]), read(gb, memory[1])}, *o[2] = {nullptr, nullptr};
  if (form.relu) o[0] = read(oa, memory[2]), o[1] = read(ob, memory[3]);
  for (int i = 0; i < padded(n); i += V::W) {
    V x = V::load(g[0] + i), y = V::load(g[1] + i);
    if (form.relu) {
      x = V::select(V::gt(V::load(o[0] + i), zero), x, zero);
      y = V::select(V::gt(V::load(o[1] + i), zero), y, zero);
    }
    (form.bounds ? x + y : x).store(gm + i);
    (form.bounds ? y - x : y).store(gr + i);
  }
}

// Gradients of the inputs from those of centre and radius: n numbers
template <class A>
inline void input_gradient(const A* m, const A* s, int n, bool bounds, Dtype dtype, void* a, void* b) {
  if (!bounds) {
    narrow<A>(m, n, dtype, a);
    narrow<A>(s, n, dtype, b);
    return;
  }
  using V = Vec<A>;
  A memory[2][TILE];
  const bool here = dtype == own_dtype<A>;
  A *x = here ? static_cast<A*>(a) : memory[0], *y = here ? static_cast<A*>(b) : memory[1];
  const V half = V::set(A(0.5));
  int i = 0;
  for (; i + V::W <= n; i += V::W) {
    const V p = V::load(m + i), q = V::load(s + i);
    ((p - q) * half).store(x + i);
    ((p + q) * half).store(y + i);
  }
  for (; i < n; ++i) {
    x[i] = (m[i] - s[i]) * A(0.5);
    y[i] = (m[i] + s[i]) * A(0.5);
  }
  if (here) return;
  narrow<A>(x, n, dtype, a);
  narrow<A>(y, n, dtype, b);
}

// A batch of a few rows. One read of w serves all three gradients, one write of dw:
//   dw[n] = gm m + sign(w) gr r,  xm += gm w,  xs += gr |w|     for rows [0, rows) of w
// m, r, xm, xs: [batch][ld], padded; gm, gr: [batch][ldg]. dw or xm may be null.
template <class A>
inline void stream_rows(const A* w, int64_t ldw, int64_t rows, int64_t k, int64_t batch, const A* gm, const A* gr, int64_t ldg,
                        const A* m, const A* r, int64_t ld, A* xm, A* xs, A* dw, int64_t ldd) {
  using V = Vec<A>;
  const V zero = V::set(0);
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t i = 0; i < k; i += V::W) {
      const int64_t left = k - i;
      V wv;
      A lane[V::W] = {};
      if (left >= V::W) wv = V::load(w + n * ldw + i);
      else {
        std::memcpy(lane, w + n * ldw + i, size_t(left) * sizeof(A));
        wv = V::load(lane);
      }
      const V av = wv.abs();
      V total = zero, turned = zero;
      for (int64_t p = 0; p < batch; ++p) {
        const V x = V::set(gm[p * ldg + n]), y = V::set(gr[p * ldg + n]);
        if (dw) {
          total = V::fma(x, V::load(m + p * ld + i), total);
          turned = V::fma(y, V::load(r + p * ld + i), turned);
        }
        if (xm) {
          V::fma(x, wv, V::load(xm + p * ld + i)).store(xm + p * ld + i);
          V::fma(y, av, V::load(xs + p * ld + i)).store(xs + p * ld + i);
        }
      }
      if (!dw) continue;
      total = total + V::select(V::gt(wv, zero), turned, V::select(V::gt(zero, wv), zero - turned, zero));
      if (left >= V::W) total.store(dw + n * ldd + i);
      else {
        total.store(lane);
        std::memcpy(dw + n * ldd + i, lane, size_t(left) * sizeof(A));
      }
    }
  }
}
