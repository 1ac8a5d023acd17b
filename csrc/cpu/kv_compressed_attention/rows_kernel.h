// Included once a target by for_each_target.h. Rows of channels: typed loads and stores, sums, LayerNorm. C need not be a
// multiple of a vector; the last lanes go through a padded copy.

template <class A, Dtype d>
W2S_INLINE Vec<A> load_lanes(const char* row, int64_t c, int64_t C) {
  using V = Vec<A>;
  constexpr int64_t bytes = d == Dtype::f64 ? 8 : d == Dtype::f32 ? 4 : 2;
  const char* p = row + c * bytes;
  if (c + V::W <= C) {
    if constexpr (d == Dtype::bf16) return V::load_bf16(reinterpret_cast<const uint16_t*>(p));
    else if constexpr (d == Dtype::f16) return V::load_f16(reinterpret_cast<const uint16_t*>(p));
    else return V::load(reinterpret_cast<const A*>(p));
  }
  A lanes[PAD];
  widen<A>(p, d, int(C - c), A(0), lanes);
  return V::load(lanes);
}

// f(c) for every vector of C channels, the last one perhaps in part
template <class A, class F>
W2S_INLINE void vectors(int64_t C, const F& f) {
  for (int64_t c = 0; c < C; c += Vec<A>::W) f(c);
}

// sum over C channels of term(c), a vector whose lanes past C are left out
template <class A, class F>
W2S_INLINE A row_sum(int64_t C, const F& term) {
  using V = Vec<A>;
  V s[4] = {V::set(0), V::set(0), V::set(0), V::set(0)};
  int64_t c = 0;
  for (; c + 4 * V::W <= C; c += 4 * V::W)
    for (int u = 0; u < 4; ++u) s[u] = s[u] + term(c + u * V::W);
  for (; c + V::W <= C; c += V::W) s[0] = s[0] + term(c);
  A total = ((s[0] + s[1]) + (s[2] + s[3])).sum();
  if (c < C) {
    A lanes[V::W];
    term(c).store(lanes);
    for (int64_t i = 0; i < C - c; ++i) total += lanes[i];
  }
  return total;
}

// mean and 1 / sqrt(var + eps) of a row; without the mean if rms
template <class A>
W2S_INLINE void row_stats(const A* a, int64_t C, A eps, bool rms, A* stats) {
  using V = Vec<A>;
  const A mean = rms ? A(0) : row_sum<A>(C, [&](int64_t c) { return V::load(a + c); }) / A(C);
  const A square = row_sum<A>(C, [&](int64_t c) {
    const V x = V::load(a + c) - V::set(mean);
    return x * x;
  });
  stats[0] = mean;
  stats[1] = A(1) / std::sqrt(square / A(C) + eps);
}

// n values at src (an optional parameter) as A, or `absent`
template <class A>
inline void parameter(const std::optional<Tensor>& t, int64_t n, A absent, A* dst) {
  if (!t) {
    for (int64_t i = 0; i < n; ++i) dst[i] = absent;
    return;
  }
  const Dtype dtype = dtype_of(t->scalar_type());
  A part[PAD];
  for (int64_t i = 0; i < n; i += PAD) {
    const int64_t m = n - i < PAD ? n - i : PAD;
    widen<A>(static_cast<const char*>(t->data_ptr()) + i * bytes_of(dtype), dtype, int(m), A(0), part);
    std::memcpy(dst + i, part, size_t(m) * sizeof(A));
  }
}
