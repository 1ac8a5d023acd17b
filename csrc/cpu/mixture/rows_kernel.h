// Included once a target (no include guard): rows of classes, one a lane of a vector. C is a few to a few hundred here: a
// reduction over a row is then a loop without shuffles, and C = 2 fills a vector as C = 200 does.
#include "cpu/log_kernel.h"
#include "cpu/pack_kernel.h"

constexpr int64_t SOON = 2, LATER = 12;  // groups whose memory is fetched, into L1 and into L2

#if W2S_COPY == 512
// Columns c to c + 3 of 16 rows. The rows come into lanes as they are loaded, which two ports do; shuffles across lanes, which
// one port alone does, were 64 for 16 columns of any number that is used and are 8 for 4.
W2S_INLINE void four_columns(const void* const (&row)[16], int64_t c, Vec<float> (&column)[4]) {
  __m512 t[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const auto at = [&](int i) { return _mm_loadu_ps(static_cast<const float*>(row[i]) + c); };
    t[k] = _mm512_insertf32x4(_mm512_castps128_ps512(at(k)), at(4 + k), 1);
    t[k] = _mm512_insertf32x4(_mm512_insertf32x4(t[k], at(8 + k), 2), at(12 + k), 3);
  }
  const __m512 a = _mm512_unpacklo_ps(t[0], t[1]), b = _mm512_unpackhi_ps(t[0], t[1]);
  const __m512 e = _mm512_unpacklo_ps(t[2], t[3]), f = _mm512_unpackhi_ps(t[2], t[3]);
  column[0].v = _mm512_shuffle_ps(a, e, 0x44), column[1].v = _mm512_shuffle_ps(a, e, 0xee);
  column[2].v = _mm512_shuffle_ps(b, f, 0x44), column[3].v = _mm512_shuffle_ps(b, f, 0xee);
}
#endif

// W rows at a time, transposed: element c of row i is at z[c W + i].
template <class A>
struct LaneRows {
  using V = Vec<A>;
  static constexpr int W = V::W;
  int64_t n, C;  // rows in all
  std::vector<A> memory, buffer;
  const char *ahead = nullptr, *further = nullptr;  // what later groups read, `line` bytes a class: fetched meanwhile
  int64_t line = 0;

  LaneRows(int64_t n, int64_t C) : n(n), C(C), memory(size_t(C * W)), buffer(size_t(C * W + PAD)) {}
  W2S_INLINE A* z() { return memory.data(); }

  // rows [first, first + count) of a tensor, the last of them in what lanes are left; returns the largest of each (NaN
  // skipped: it shows up in the sum of exponentials)
  W2S_INLINE V read(const Rows& from, int64_t first, int count) {
    const void* row[W];
    for (int i = 0; i < W; ++i) row[i] = from.at(first + std::min(i, count - 1), 0);
    line = W * bytes_of(from.dtype);
    ahead = static_cast<const char*>(row[0]) + SOON * C * line;
    further = C >= W ? ahead + (LATER - SOON) * C * line : ahead;  // a few classes are a page in no time
    V top = V::set(-infinity<A>);
    int64_t c = 0;
#if W2S_COPY == 512
    // up to three numbers behind a row are loaded too: they are another row's
    if (from.dtype == Dtype::f32 && count == W && (C % 4 == 0 || (first + W < n && from.stride >= int64_t(4 * C)))) {
      for (; c < C; c += 4) {
        V column[4];
        four_columns(row, c, column);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          if (c + j == C) break;
          column[j].store(z() + (c + j) * W);
          top = V::max(column[j], top);
        }
      }
      return top;
    }
#endif
    for (; c + W <= C; c += W) square(row, from.dtype, c, W, top, [](auto... at) { return load_any<A>(at...); });
    const int rest = int(C - c);
    if (rest) square(row, from.dtype, c, rest, top, [rest](auto... at) { return first_as<A>(at..., rest); });
    return top;
  }

  // z back to rows [first, first + count) of a contiguous tensor
  W2S_INLINE void write(const Rows& to, int64_t first, int count) {
    const bool direct = to.dtype == own_dtype<A> && C >= W && count == W;
    A* out = direct ? static_cast<A*>(to.at(first, 0)) : buffer.data();
    // whole vectors run into the next row, which is overwritten after: squares from the last to the first
    for (int64_t c = (C - 1) / W * W; c >= 0; c -= W) {
      const int n = int(std::min<int64_t>(W, C - c));
      V r[W];
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j) r[j] = V::load(z() + (c + std::min(j, n - 1)) * W);
      V::transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < W - 1; ++i) r[i].store(out + i * C + c);
      if (direct && n < W) {  // what follows the last row is another group's
        A last[W];
        r[W - 1].store(last);
        std::copy_n(last, n, out + (W - 1) * C + c);
      } else {
        r[W - 1].store(out + (W - 1) * C + c);
      }
    }
    if (!direct) narrow(out, int(count * C), to.dtype, to.at(first, 0));
  }

  // f(z of a class, its place) over the classes, and block() after every 16
  template <class F, class G>
  W2S_INLINE void each(const F& f, const G& block) {
    for (int64_t c = 0; c < C;) {
      for (const int64_t end = std::min(c + 16, C); c < end; ++c) {
        __builtin_prefetch(ahead + c * line), __builtin_prefetch(further + c * line, 0, 2);
        f(V::load(z() + c * W), z() + c * W);
      }
      block();
    }
  }
  template <class F>
  W2S_INLINE void each(const F& f) { each(f, [] {}); }

 private:
  // n <= W columns from c on, and the largest so far
  template <class F>
  W2S_INLINE void square(const void* const (&row)[W], Dtype dtype, int64_t c, int n, V& top, const F& load) {
    V r[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) r[i] = load(row[i], dtype, c);
    V::transpose(r);
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j) {
      if (j == n) break;
      r[j].store(z() + (c + j) * W);
      top = V::max(r[j], top);
    }
  }
};

// A sum of many numbers: `part` of a block of them, and blocks added with what each addition loses carried on.
template <class V>
struct Total {
  V sum, lost, part;
  W2S_INLINE Total() : sum(V::set(0)), lost(sum), part(sum) {}
  W2S_INLINE void block() {
    const V x = part - lost, next = sum + x;
    lost = (next - sum) - x;
    sum = next;
    part = V::set(0);
  }
};

// e^d of d = z - top <= 0, where it is 0 with d finite, so that 0 times it is 0. A sum over a row bears more than vexp's
// three quarters of a unit: relative error 1.1 2^-23 + |d| 2^-28 in float, of which e^d takes the second away; 11 operations.
template <class V>
W2S_INLINE V exp_below(V z, V top, V& d) {
  if constexpr (sizeof(typename V::Scalar) == 8) {
    d = V::max(V::set(-1000), z - top);
    return vexp(d);
  } else {
    const V low = V::set(V::scale_underflows ? -104.0f : -87.33654f), past = V::set(12582912.0f);  // 1.5 2^23: its ulp is 1
    d = V::max(V::scale_underflows ? low : V::set(-1000), z - top);
    const V x = V::scale_underflows ? d : V::max(low, d);
    const V n = V::fma(x, V::set(1.44269504f), past) - past, r = V::fma(n, V::set(-0.693147182f), x);
    V p = V::set(0.00831252f);
    p = V::fma(p, r, V::set(0.0418902f));
    p = V::fma(p, r, V::set(0.16667115f));
    p = V::fma(p, r, V::set(0.49999231f));
    p = V::fma(p, r, V::set(1.0f));
    p = V::fma(p, r, V::set(1.0f));
    if constexpr (V::scale_underflows) return V::scale(p, n);
    else return V::select(V::gt(low, d), V::set(0.0f), V::scale(p, n));
  }
}

// work(rows, others, first, count) for the groups of rows [0, n); a group an item
template <class A, class F>
inline void each_group(int64_t n, int64_t C, const F& work) {
  constexpr int W = Vec<A>::W;
  parallel_ranges(pieces(n, W), grain_of(C * W), [&](int64_t begin, int64_t end) {
    LaneRows<A> rows(n, C), others(n, C);
    for (int64_t g = begin; g < end; ++g) work(rows, others, g * W, int(std::min<int64_t>(W, n - g * W)));
  });
}
