// Row kernels on a tile of logits stored vocabulary-major: z[v * ld + t].
//
// Tokens t lie next to each other, so maxima and sums over the vocabulary need no horizontal reduction, and the products
// with W run in the layout the library is fastest in. ld is a multiple of PAD; columns past the last token hold
// anything and their results are never read. Each call handles one chunk of vocabulary rows; the caller merges chunks.
#include "cpu/linear_loss/tile.h"

#include "cpu/target_begin.h"

// f(column, v) for groups of U vectors of columns, to keep the running values in registers
template <class A, class Strip4, class Strip1>
W2S_INLINE void strips(int64_t ld, const Strip4& four, const Strip1& one) {
  constexpr int64_t W = Vec<A>::W;
  int64_t t = 0;
  for (; t + 4 * W <= ld; t += 4 * W) four(t);
  for (; t < ld; t += W) one(t);
}

template <class A, int U>
W2S_INLINE void strip_max(const A* z, int64_t rows, int64_t ld, A* top) {
  using V = Vec<A>;
  V m[U];
  for (int u = 0; u < U; ++u) m[u] = V::set(-infinity<A>);
  for (int64_t v = 0; v < rows; ++v)
    for (int u = 0; u < U; ++u) m[u] = V::max(V::load(z + v * ld + u * V::W), m[u]);
  for (int u = 0; u < U; ++u) m[u].store(top + u * V::W);
}

// out = sum_v exp(z - ref), and z = exp(z - ref) if `keep`; a ref of -infinity counts as 0
template <class A, int U, bool keep>
W2S_INLINE void strip_exp(A* z, int64_t rows, int64_t ld, const A* ref, A* out) {
  using V = Vec<A>;
  V r[U], s[U];
  for (int u = 0; u < U; ++u) {
    const V x = V::load(ref + u * V::W);
    r[u] = V::select(V::gt(x, V::set(-infinity<A>)), x, V::set(0));
    s[u] = V::set(0);
  }
  for (int64_t v = 0; v < rows; ++v)
    for (int u = 0; u < U; ++u) {
      A* p = z + v * ld + u * V::W;
      const V e = vexp(V::load(p) - r[u]);
      if (keep) e.store(p);
      s[u] = s[u] + e;
    }
  for (int u = 0; u < U; ++u) s[u].store(out + u * V::W);
}

template <class A>
inline void chunk_max(const A* z, int64_t rows, int64_t ld, A* top) {
  strips<A>(ld, [&](int64_t t) { strip_max<A, 4>(z + t, rows, ld, top + t); },
            [&](int64_t t) { strip_max<A, 1>(z + t, rows, ld, top + t); });
}

template <class A>
inline void chunk_exp(A* z, int64_t rows, int64_t ld, const A* ref, A* out) {
  strips<A>(ld, [&](int64_t t) { strip_exp<A, 4, true>(z + t, rows, ld, ref + t, out + t); },
            [&](int64_t t) { strip_exp<A, 1, true>(z + t, rows, ld, ref + t, out + t); });
}

// top = max_v z, sum = sum_v exp(z - top)
template <class A>
inline void chunk_stats(A* z, int64_t rows, int64_t ld, A* top, A* sum) {
  strips<A>(
      ld,
      [&](int64_t t) {  // a strip of CHUNK rows stays in L1
        strip_max<A, 4>(z + t, rows, ld, top + t);
        strip_exp<A, 4, false>(z + t, rows, ld, top + t, sum + t);
      },
      [&](int64_t t) {
        strip_max<A, 1>(z + t, rows, ld, top + t);
        strip_exp<A, 1, false>(z + t, rows, ld, top + t, sum + t);
      });
}

// out = sum_v exp(z - top) (z - top), where exp is 0 also where z is -infinity
template <class A>
inline void chunk_spread(const A* z, int64_t rows, int64_t ld, const A* top, A* out) {
  using V = Vec<A>;
  for (int64_t t = 0; t < ld; t += V::W) {
    const V x = V::load(top + t), safe = V::select(V::gt(x, V::set(-infinity<A>)), x, V::set(0));
    V sum = V::set(0);
    for (int64_t v = 0; v < rows; ++v) {
      const V d = V::max(V::set(-1e4), V::load(z + v * ld + t) - safe);
      sum = V::fma(vexp(d), d, sum);
    }
    sum.store(out + t);
  }
}

// newest = max(ref, max_c top_c), total = sum_c sum_c exp(top_c - newest)
template <class A>
inline void merge_chunks(const A* top, const A* sum, int64_t chunks, int64_t ld, const A* ref, A* newest, A* total) {
  using V = Vec<A>;
  for (int64_t t = 0; t < ld; t += V::W) {
    V m = V::load(ref + t), s = V::set(0);
    for (int64_t c = 0; c < chunks; ++c) m = V::max(V::load(top + c * ld + t), m);
    const V safe = V::select(V::gt(m, V::set(-infinity<A>)), m, V::set(0));
    for (int64_t c = 0; c < chunks; ++c)
      s = V::fma(V::load(sum + c * ld + t), vexp(V::load(top + c * ld + t) - safe), s);
    m.store(newest + t);
    s.store(total + t);
  }
}

// out = coef exp(z - lse); a lse of -infinity counts as 0
template <class A>
inline void chunk_grad(const A* z, int64_t ldz, A* out, int64_t ldo, int64_t rows, int64_t columns, const A* lse, const A* coef) {
  using V = Vec<A>;
  for (int64_t v = 0; v < rows; ++v)
    for (int64_t t = 0; t < columns; t += V::W) {
      const V x = V::load(lse + t), safe = V::select(V::gt(x, V::set(-infinity<A>)), x, V::set(0));
      (V::load(coef + t) * vexp(V::load(z + v * ldz + t) - safe)).store(out + v * ldo + t);
    }
}

// out = p (coef + log_coef log p) + weight_v all, p = exp(z - lse); a lse of -infinity counts as 0; null weights are 1
template <class A>
inline void chunk_grad_more(const A* z, int64_t ldz, A* out, int64_t ldo, int64_t rows, int64_t columns, const A* lse,
                            const A* coef, const A* log_coef, const A* all, const A* weight) {
  using V = Vec<A>;
  for (int64_t v = 0; v < rows; ++v)
    for (int64_t t = 0; t < columns; t += V::W) {
      const V x = V::load(lse + t), safe = V::select(V::gt(x, V::set(-infinity<A>)), x, V::set(0));
      const V logp = V::max(V::set(-1e4), V::load(z + v * ldz + t) - safe);
      const V rest = V::load(all + t) * V::set(weight ? weight[v] : A(1));
      V::fma(vexp(logp), V::fma(V::load(log_coef + t), logp, V::load(coef + t)), rest).store(out + v * ldo + t);
    }
}

// -infinity counts as 0
template <class A>
W2S_INLINE Vec<A> finite_or_0(const A* p) {
  const Vec<A> x = Vec<A>::load(p);
  return Vec<A>::select(Vec<A>::gt(x, Vec<A>::set(-infinity<A>)), x, Vec<A>::set(0));
}

// z - top in float16: what is near the largest of a chunk, which is what a softmax sees, keeps 11 bits and more
template <class A>
inline void chunk_keep(const A* z, int64_t rows, int64_t ld, const A* top, uint16_t* out) {
  using V = Vec<A>;
  for (int64_t v = 0; v < rows; ++v)
    for (int64_t t = 0; t < ld; t += V::W) (V::load(z + v * ld + t) - finite_or_0(top + t)).store_f16(out + v * ld + t);
}

// out = z from what chunk_keep left
template <class A>
inline void chunk_back(const uint16_t* kept, int64_t ldk, A* out, int64_t ldo, int64_t rows, int64_t columns, const A* top) {
  using V = Vec<A>;
  for (int64_t v = 0; v < rows; ++v)
    for (int64_t t = 0; t < columns; t += V::W) (V::load_f16(kept + v * ldk + t) + finite_or_0(top + t)).store(out + v * ldo + t);
}

// out = coef exp(z - lse) in bfloat16, z from what chunk_keep left
template <class A>
inline void chunk_grad_kept(const uint16_t* kept, int64_t ldk, uint16_t* out, int64_t ldo, int64_t rows, int64_t columns, const A* top,
                            const A* lse, const A* coef) {
  using V = Vec<A>;
  for (int64_t v = 0; v < rows; ++v)
    for (int64_t t = 0; t < columns; t += V::W) {
      const V z = V::load_f16(kept + v * ldk + t) + finite_or_0(top + t);
      (V::load(coef + t) * vexp(z - finite_or_0(lse + t))).store_bf16(out + v * ldo + t);
    }
}

// z += bias_v coef_t over `columns` tokens
template <class A>
inline void chunk_bias(A* z, int64_t rows, int64_t ld, int64_t columns, const A* bias, const A* coef) {
  using V = Vec<A>;
  for (int64_t v = 0; v < rows; ++v)
    for (int64_t t = 0; t < columns; t += V::W)
      V::fma(V::set(bias[v]), V::load(coef + t), V::load(z + v * ld + t)).store(z + v * ld + t);
}

// tanh: odd polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel
template <class A>
W2S_INLINE Vec<A> vtanh(Vec<A> x) {
  using V = Vec<A>;
  if constexpr (sizeof(A) == 8) {
    A lane[V::W];
    x.store(lane);
    for (int i = 0; i < V::W; ++i) lane[i] = std::tanh(lane[i]);
    return V::load(lane);
  } else {
    const V z = x * x;
    V p = V::set(-5.70498872745e-3f);
    p = V::fma(p, z, V::set(2.06390887954e-2f));
    p = V::fma(p, z, V::set(-5.37397155531e-2f));
    p = V::fma(p, z, V::set(1.33314422036e-1f));
    p = V::fma(p, z, V::set(-3.33332819422e-1f));
    const V near = V::fma(p * z, x, x);
    A lane[V::W];
    const V bounded = V::min(V::max(x, V::set(-20)), V::set(20));
    (vexp(bounded + bounded) + V::set(1)).store(lane);
    for (int i = 0; i < V::W; ++i) lane[i] = A(1) - A(2) / lane[i];
    return V::select(V::gt(V::set(0.625f), x.abs()), near, V::select(V::nan(x), x, V::load(lane)));
  }
}

// s = cap tanh((s + bias_v) / cap); bias may be null
template <class A>
inline void chunk_cap(A* s, int64_t rows, int64_t ld, const A* bias, A cap) {
  using V = Vec<A>;
  for (int64_t v = 0; v < rows; ++v)
    for (int64_t t = 0; t < ld; t += V::W)
      (V::set(cap) * vtanh<A>((V::load(s + v * ld + t) + V::set(bias ? bias[v] : A(0))) * V::set(A(1) / cap))).store(s + v * ld + t);
}

// z = coef_t s, or z += coef_t s
template <class A>
inline void chunk_add(A* z, int64_t ldz, const A* s, int64_t lds, int64_t rows, int64_t columns, const A* coef, bool first) {
  using V = Vec<A>;
  for (int64_t v = 0; v < rows; ++v)
    for (int64_t t = 0; t < columns; t += V::W) {
      const V x = V::load(coef + t) * V::load(s + v * lds + t);
      (first ? x : x + V::load(z + v * ldz + t)).store(z + v * ldz + t);
    }
}

// out = g (1 - (s / cap)^2): through the softcap's derivative
template <class A>
inline void chunk_slope(A* out, const A* g, const A* s, int64_t rows, int64_t ld, A cap) {
  using V = Vec<A>;
  for (int64_t v = 0; v < rows; ++v)
    for (int64_t t = 0; t < ld; t += V::W) {
      const V u = V::load(s + v * ld + t) * V::set(A(1) / cap);
      (V::load(g + v * ld + t) * (V::set(1) - u * u)).store(out + v * ld + t);
    }
}

// out_t = sum_v g_vt (s_vt, or bias_v where s is null)
template <class A>
inline void chunk_dot(const A* g, const A* s, const A* bias, int64_t rows, int64_t ld, A* out) {
  using V = Vec<A>;
  for (int64_t t = 0; t < ld; t += V::W) {
    V sum = V::set(0);
    for (int64_t v = 0; v < rows; ++v)
      sum = V::fma(V::load(g + v * ld + t), s ? V::load(s + v * ld + t) : V::set(bias[v]), sum);
    sum.store(out + t);
  }
}

// out_v += sum_t g_vt coef_t over the first `columns` tokens
template <class A>
inline void chunk_rows(const A* g, int64_t rows, int64_t ld, int64_t columns, const A* coef, A* out) {
  using V = Vec<A>;
  for (int64_t v = 0; v < rows; ++v) {
    V sum = V::set(0);
    int64_t t = 0;
    for (; t + V::W <= columns; t += V::W) sum = V::fma(V::load(g + v * ld + t), V::load(coef + t), sum);
    A s = sum.sum();
    for (; t < columns; ++t) s += g[v * ld + t] * coef[t];
    out[v] += s;
  }
}

// out[v, :] = sum_t g_vt h[t, :] for a few tokens; rows of h lie a padded pitch apart, those of out next to each other
template <class A>
inline void chunk_outer(const A* g, int64_t rows, int64_t ld, int64_t columns, const A* h, int64_t pitch, int64_t depth, Dtype dtype, void* out) {
  using V = Vec<A>;
  constexpr int U = 64 / V::W > 4 ? 4 : 64 / V::W;
  A part[TILE];
  char* to = static_cast<char*>(out);
  for (int64_t v = 0; v < rows; ++v, g += ld)
    for (int64_t c0 = 0; c0 < depth; c0 += TILE) {
      const int n = int(std::min<int64_t>(TILE, depth - c0));
      for (int c = 0; c < padded(n); c += U * V::W) {
        V sum[U];
        for (int u = 0; u < U; ++u) sum[u] = V::set(g[0]) * V::load(h + c0 + c + u * V::W);
        for (int64_t t = 1; t < columns; ++t) {
          const V x = V::set(g[t]);
          for (int u = 0; u < U; ++u) sum[u] = V::fma(x, V::load(h + t * pitch + c0 + c + u * V::W), sum[u]);
        }
        const bool whole = dtype == own_dtype<A> && c + U * V::W <= n;
        A* there = whole ? reinterpret_cast<A*>(to) + c : part + c;
        for (int u = 0; u < U; ++u) sum[u].store(there + u * V::W);
      }
      const int done = dtype == own_dtype<A> ? n / (U * V::W) * (U * V::W) : 0;
      narrow(part + done, n - done, dtype, to + done * bytes_of(dtype));
      to += n * bytes_of(dtype);
    }
}

W2S_KERNELS(TileKernels, chunk_max<Real>, chunk_exp<Real>, chunk_stats<Real>, chunk_spread<Real>, merge_chunks<Real>,
            chunk_grad<Real>, chunk_grad_more<Real>, chunk_keep<Real>, chunk_back<Real>, chunk_grad_kept<Real>, chunk_bias<Real>, chunk_cap<Real>, chunk_add<Real>,
            chunk_slope<Real>, chunk_dot<Real>, chunk_rows<Real>, chunk_outer<Real>)

#include "cpu/target_end.h"
