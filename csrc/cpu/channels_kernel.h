// Included once a target (no include guard). Rows of channels: typed loads and stores, sums, LayerNorm. C need not be a
// multiple of a vector; the last lanes go through a padded copy.

template <Dtype d>
using Arithmetic = std::conditional_t<d == Dtype::f64, double, float>;
template <Dtype d>
constexpr int64_t element = d == Dtype::f64 ? 8 : d == Dtype::f32 ? 4 : 2;

// A channel whose whole vector is inside the row: what reads or writes it need not ask. Loops hand out this, or a number.
struct Whole {
  int64_t c;
  W2S_INLINE operator int64_t() const { return c; }
};

template <class A, Dtype d, class I>
W2S_INLINE Vec<A> load_lanes(const char* row, I c, int64_t C) {
  using V = Vec<A>;
  const char* p = row + c * element<d>;
  if (std::is_same_v<I, Whole> || c + V::W <= C) {
    if constexpr (d == Dtype::bf16) return V::load_bf16(reinterpret_cast<const uint16_t*>(p));
    else if constexpr (d == Dtype::f16) return V::load_f16(reinterpret_cast<const uint16_t*>(p));
    else return V::load(reinterpret_cast<const A*>(p));
  }
  A lanes[PAD];
  widen<A>(p, d, int(C - c), A(0), lanes);
  return V::load(lanes);
}

// A vector of bytes to memory past the caches: the line is not read first. p is aligned to them.
template <int bytes>
W2S_INLINE void stream_bytes(void* p, const void* from) {
#if W2S_X86
  if constexpr (bytes == 64) _mm512_stream_si512(static_cast<__m512i*>(p), _mm512_loadu_si512(from));
  else if constexpr (bytes == 32) _mm256_stream_si256(static_cast<__m256i*>(p), _mm256_loadu_si256(static_cast<const __m256i*>(from)));
  else if constexpr (bytes == 16) _mm_stream_si128(static_cast<__m128i*>(p), _mm_loadu_si128(static_cast<const __m128i*>(from)));
  else
#endif
    std::memcpy(p, from, bytes);
}

W2S_INLINE void stream_fence() {  // streamed bytes are seen by other threads from here on
#if W2S_X86
  _mm_sfence();
#endif
}

// Whether an output of `rows` contiguous rows of `bytes` is streamed: it is too large to stay in the caches for its reader.
inline bool streams(const void* out, int64_t rows, int64_t bytes) {
  return rows * bytes >= (int64_t(8) << 20) && bytes % 64 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

template <int W>
struct Words {
  typedef uint32_t Long __attribute__((vector_size(4 * W)));
  typedef uint16_t Short __attribute__((vector_size(2 * W)));
};

// A vector rounded to 16 bits, to nearest even; returns what load_lanes would read back.
template <Dtype d, class V>
W2S_INLINE V to_half_words(V a, uint16_t* out) {
  if constexpr (d == Dtype::bf16) {
    typename Words<V::W>::Long bits;
    std::memcpy(&bits, &a.v, sizeof(bits));
    bits += 0x7fffu + ((bits >> 16) & 1u);
    V rounded = a;
    std::memcpy(&rounded.v, &bits, sizeof(bits));
    rounded = V::select(V::nan(a), V::set(std::numeric_limits<float>::quiet_NaN()), rounded);
    std::memcpy(&bits, &rounded.v, sizeof(bits));
    const auto words = __builtin_convertvector(bits >> 16, typename Words<V::W>::Short);
    std::memcpy(out, &words, sizeof(words));
    bits &= 0xffff0000u;
    std::memcpy(&a.v, &bits, sizeof(bits));
    return a;
  } else {
#if W2S_X86
    if constexpr (V::W == 16) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
    else if constexpr (V::W == 8) _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
    else
#endif
      for (int i = 0; i < V::W; ++i) out[i] = float_to_half(a.v[i]);
    return V::load_f16(out);
  }
}

// Channels c to c + V::W of a row, as far as there are such; returns what load_lanes would read back.
template <class A, Dtype d, bool stream = false, class I>
W2S_INLINE Vec<A> store_lanes(char* row, I c, int64_t C, Vec<A> a) {
  using V = Vec<A>;
  constexpr int bytes = int(V::W * element<d>);
  alignas(64) char lanes[bytes];
  if constexpr (element<d> == 2) a = to_half_words<d>(a, reinterpret_cast<uint16_t*>(lanes));
  else std::memcpy(lanes, &a.v, bytes);
  char* p = row + c * element<d>;
  if constexpr (stream) stream_bytes<bytes>(p, lanes);
  else if (std::is_same_v<I, Whole> || c + V::W <= C) std::memcpy(p, lanes, bytes);
  else std::memcpy(p, lanes, size_t((C - c) * element<d>));
  return a;
}

// f(c) for every vector of C channels, the last one perhaps in part
template <class A, class F>
W2S_INLINE void vectors(int64_t C, const F& f) {
  int64_t c = 0;
  for (; c + Vec<A>::W <= C; c += Vec<A>::W) f(Whole{c});
  if (c < C) f(c);
}

// sum over C channels of term(c), a vector whose lanes past C are left out
template <class A, class F>
W2S_INLINE A row_sum(int64_t C, const F& term) {
  using V = Vec<A>;
  V s[4] = {V::set(0), V::set(0), V::set(0), V::set(0)};
  int64_t c = 0;
  for (; c + 4 * V::W <= C; c += 4 * V::W) {
    s[0] = s[0] + term(Whole{c});
    s[1] = s[1] + term(Whole{c + V::W});
    s[2] = s[2] + term(Whole{c + 2 * V::W});
    s[3] = s[3] + term(Whole{c + 3 * V::W});
  }
  for (; c + V::W <= C; c += V::W) s[0] = s[0] + term(Whole{c});
  A total = ((s[0] + s[1]) + (s[2] + s[3])).sum();
  if (c < C) {
    A lanes[V::W];
    term(c).store(lanes);
    for (int64_t i = 0; i < C - c; ++i) total += lanes[i];
  }
  return total;
}

// mean and 1 / sqrt(var + eps) of a row whose mean is known
template <class A>
W2S_INLINE void row_spread(const A* a, int64_t C, A eps, A mean, A* stats) {
  using V = Vec<A>;
  const A square = row_sum<A>(C, [&](int64_t c) {
    const V x = V::load(a + c) - V::set(mean);
    return x * x;
  });
  stats[0] = mean;
  stats[1] = A(1) / std::sqrt(square / A(C) + eps);
}

// mean and 1 / sqrt(var + eps) of a row; without the mean if rms
template <class A>
W2S_INLINE void row_stats(const A* a, int64_t C, A eps, bool rms, A* stats) {
  const A mean = rms ? A(0) : row_sum<A>(C, [&](int64_t c) { return Vec<A>::load(a + c); }) / A(C);
  row_spread<A>(a, C, eps, mean, stats);
}

// n values of a parameter as A, or `absent`
template <class A>
inline void parameter(const Flat& from, int64_t n, A absent, A* dst) {
  if (!from) {
    for (int64_t i = 0; i < n; ++i) dst[i] = absent;
    return;
  }
  A part[PAD];
  for (int64_t i = 0; i < n; i += PAD) {
    const int64_t m = n - i < PAD ? n - i : PAD;
    widen<A>(static_cast<const char*>(from.data) + i * bytes_of(from.dtype), from.dtype, int(m), A(0), part);
    std::memcpy(dst + i, part, size_t(m) * sizeof(A));
  }
}

// f.template operator()<d>() for the dtypes whose arithmetic is A
template <class A, class F>
inline void by_dtype(Dtype dtype, const F& f) {
  if constexpr (sizeof(A) == 8) f.template operator()<Dtype::f64>();
  else if (dtype == Dtype::bf16) f.template operator()<Dtype::bf16>();
  else if (dtype == Dtype::f16) f.template operator()<Dtype::f16>();
  else f.template operator()<Dtype::f32>();
}
