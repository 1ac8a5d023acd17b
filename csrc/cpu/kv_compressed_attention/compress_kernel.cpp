//     a_mc = b_c + sum_t w_tc z_token(m, t),c ;  out = norm_weight (a - mean) / s + norm_bias
// Backward, with unit = (a - mean) / s computed again: g = dout norm_weight, da = (g - mean g - unit mean(g unit)) / s,
// dz_token(m, t) = w_t da, and sums over m: dw_t += da z, db += da, dnorm_weight += dout unit, dnorm_bias += dout.
// One pass over rows m, channels in the lanes; a row of 1152 stays in L1. Cost: x read and dx written once. Sums over m are
// kept for fixed ranges of rows and added in order, so that they do not depend on the number of threads.
#include "cpu/kv_compressed_attention/compress.h"

#include "cpu/target_begin.h"

#include "cpu/channels_kernel.h"

namespace comp = ::w2s::compress;

// Parameters in the arithmetic's type: taps [sets][T][C], bias [sets][C], gain and offset [C].
template <class A>
struct Taps {
  std::vector<A> w, b, gain, offset;
  explicit Taps(const comp::Problem& p) {
    const int64_t C = p.C, pad = PAD;
    if (p.weight) {
      const int64_t sets = p.sets;
      std::vector<A> given(size_t(sets * C * p.T));
      parameter<A>(p.weight, sets * C * p.T, A(1), given.data());
      w.resize(size_t(sets * p.T * C + pad));
      for (int64_t s = 0; s < sets; ++s)
        for (int64_t c = 0; c < C; ++c)
          for (int64_t t = 0; t < p.T; ++t) w[size_t((s * p.T + t) * C + c)] = given[size_t((s * C + c) * p.T + t)];
    }
    const int64_t biases = p.bias_sets;
    b.resize(size_t(biases * C + pad));
    parameter<A>(p.bias, biases * C, A(0), b.data());
    gain.resize(size_t(C + pad));
    offset.resize(size_t(C + pad));
    parameter<A>(p.norm_weight, C, A(1), gain.data());
    parameter<A>(p.norm_bias, C, A(0), offset.data());
  }
  const A* taps(const comp::Problem& p, int64_t g) const { return w.empty() ? nullptr : w.data() + (p.sets > 1 ? g * p.T * p.C : 0); }
  const A* bias(const comp::Problem& p, int64_t g) const { return b.data() + (p.bias_sets > 1 ? g * p.C : 0); }
};

// U vectors of a row of a from channel c
template <class A, Dtype d, int U, class I>
W2S_INLINE void sum_taps(const comp::Problem& p, const char* const* z, const A* w, const A* bias, I c, A* a) {
  using V = Vec<A>;
  const int64_t T = p.T, C = p.C;
  V s[U];
  if (w) {
    for (int u = 0; u < U; ++u) s[u] = V::load(bias + c + u * V::W);
    for (int64_t t = 0; t < T; ++t)
      for (int u = 0; u < U; ++u)
        s[u] = V::fma(V::load(w + t * C + c + u * V::W), load_lanes<A, d>(z[t], I{c + u * V::W}, C), s[u]);
  } else {
    for (int u = 0; u < U; ++u) s[u] = V::set(0);
    for (int64_t t = 0; t < T; ++t)
      for (int u = 0; u < U; ++u) s[u] = s[u] + load_lanes<A, d>(z[t], I{c + u * V::W}, C);
    for (int u = 0; u < U; ++u) s[u] = s[u] * V::set(A(p.factor));
  }
  for (int u = 0; u < U; ++u) s[u].store(a + c + u * V::W);
}

template <class A, Dtype d>
inline void sum_row(const comp::Problem& p, const char* const* z, const A* w, const A* bias, A* a) {
  constexpr int W = Vec<A>::W;
  int64_t c = 0;
  for (; c + 4 * W <= p.C; c += 4 * W) sum_taps<A, d, 4>(p, z, w, bias, Whole{c}, a);
  for (; c < p.C; c += W) sum_taps<A, d, 1>(p, z, w, bias, c, a);
}

inline void gather(const comp::Problem& p, const Slots& x, int64_t b, int64_t m, int64_t g, std::vector<char*>& z) {
  for (int64_t t = 0; t < p.T; ++t) z[size_t(t)] = x.at(b, p.token(m, t), p.first + g);
}

template <Dtype d>
inline void run_compress(const comp::Problem& p, const Slots& x, double eps, const Slots& kv, void* stats) {
  using A = Arithmetic<d>;
  using V = Vec<A>;
  const Taps<A> taps(p);
  const int64_t C = p.C;
  parallel_ranges(p.B * p.M, grain_of(p.groups * p.T * C), [&](int64_t begin, int64_t end) {
    std::vector<char*> z(size_t(p.T));
    std::vector<A> row(size_t(C + PAD));
    for (int64_t i = begin; i < end; ++i)
      for (int64_t g = 0; g < p.groups; ++g) {
        const int64_t b = i / p.M, m = i % p.M;
        A* a = row.data();
        gather(p, x, b, m, g, z);
        sum_row<A, d>(p, z.data(), taps.taps(p, g), taps.bias(p, g), a);
        char* out = kv.at(b, m, g);
        if (!p.normalize) {
          narrow<A>(a, int(C), d, out);
          continue;
        }
        A* kept = static_cast<A*>(stats) + (i * p.groups + g) * 2;
        row_stats<A>(a, C, A(eps), false, kept);
        const V mean = V::set(kept[0]), rstd = V::set(kept[1]);
        const A *gain = taps.gain.data(), *offset = taps.offset.data();
        vectors<A>(C, [=](auto c) {
          store_lanes<A, d>(out, c, C, V::fma((V::load(a + c) - mean) * rstd, V::load(gain + c), V::load(offset + c)));
        });
      }
  });
}

// Sums over a range of rows, [slots of one parameter after the other][C].
template <class A>
struct Sums {
  int64_t C, T, sets, bias_sets, size;
  explicit Sums(const comp::Problem& p)
      : C(p.C), T(p.weight ? p.T : 0), sets(p.sets), bias_sets(p.bias ? p.bias_sets : 0),
        size((sets * T + bias_sets + 2) * C + PAD) {}
  A* w(A* base, int64_t g) const { return base + (sets > 1 ? g * T * C : 0); }
  A* b(A* base, int64_t g) const { return base + sets * T * C + (bias_sets > 1 ? g * C : 0); }
  A* gain(A* base) const { return base + (sets * T + bias_sets) * C; }
  A* offset(A* base) const { return gain(base) + C; }
};

// x[c] += y over the channels before C only: the lanes past C belong to the next parameter
template <class A, class I>
W2S_INLINE void add_lanes(A* x, I c, int64_t C, Vec<A> y) {
  using V = Vec<A>;
  if (std::is_same_v<I, Whole> || c + V::W <= C) {
    (V::load(x + c) + y).store(x + c);
    return;
  }
  A lanes[V::W];
  y.store(lanes);
  for (int64_t i = c; i < C; ++i) x[i] += lanes[i - c];
}

// out = da for one row, whose sums a and upstream gradient g are given; a becomes scratch
template <class A>
inline void norm_row(const comp::Problem& p, const Taps<A>& taps, const A* stats, A* a, A* g, const Sums<A>& sums, A* base) {
  using V = Vec<A>;
  const int64_t C = p.C;
  const V mean = V::set(stats[0]), rstd = V::set(stats[1]);
  const A* gain = taps.gain.data();
  A *offsets = base ? sums.offset(base) : nullptr, *gains = base ? sums.gain(base) : nullptr;
  const A total = row_sum<A>(C, [=](auto c) {
    const V unit = (V::load(a + c) - mean) * rstd, d = V::load(g + c), scaled = d * V::load(gain + c);
    unit.store(a + c);
    if (base) {
      add_lanes<A>(offsets, c, C, d);
      add_lanes<A>(gains, c, C, d * unit);
    }
    scaled.store(g + c);
    return scaled;
  });
  const V first = V::set(total / A(C));
  const V second = V::set(row_sum<A>(C, [=](auto c) { return V::load(g + c) * V::load(a + c); }) / A(C));
  vectors<A>(C, [=](auto c) { (rstd * (V::load(g + c) - first - V::load(a + c) * second)).store(g + c); });
}

// U vectors of dz, a line of 64 bytes, from channel c, and of dw where there is one. The line is streamed at once: one that
// waits half full for its other half, while reads come and go, reaches memory in pieces.
template <class A, Dtype d, int U, class W>
W2S_INLINE void tap_line(const A* da, const char* z, const W& w, int64_t c, A* dw, char* dz) {
  using V = Vec<A>;
  constexpr int bytes = int(V::W * element<d>);
  alignas(64) char lanes[U][bytes];
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u) {
    const int64_t at = c + u * V::W;
    const V x = V::load(da + at);
    if (dw) (V::load(dw + at) + x * load_lanes<A, d>(z, Whole{at}, at)).store(dw + at);
    store_lanes<A, d>(lanes[u], Whole{0}, V::W, x * w(at));
  }
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u) stream_bytes<bytes>(dz + c * element<d> + u * bytes, lanes[u]);
}

// dz of one tap's token, and its part of dw
template <class A, Dtype d, bool stream, class W>
W2S_INLINE void tap_gradient(int64_t C, const A* da, const char* z, const W& w, A* dw, char* dz) {
  using V = Vec<A>;
  constexpr int U = int(64 / (V::W * element<d>));
  if constexpr (stream) {
    if (dw) for (int64_t c = 0; c < C; c += U * V::W) tap_line<A, d, U>(da, z, w, c, dw, dz);
    else for (int64_t c = 0; c < C; c += U * V::W) tap_line<A, d, U>(da, z, w, c, static_cast<A*>(nullptr), dz);
  } else {
    vectors<A>(C, [=](auto c) {
      const V x = V::load(da + c);
      if (dw) add_lanes<A>(dw, c, C, x * load_lanes<A, d>(z, c, C));
      store_lanes<A, d>(dz, c, C, x * w(c));
    });
  }
}

template <class A, Dtype d, bool stream>
inline void tap_row(int64_t C, const A* da, const char* z, const A* w, A factor, A* dw, char* dz) {
  using V = Vec<A>;
  if (!dz) vectors<A>(C, [=](auto c) { add_lanes<A>(dw, c, C, V::load(da + c) * load_lanes<A, d>(z, c, C)); });
  else if (w) tap_gradient<A, d, stream>(C, da, z, [=](int64_t c) { return V::load(w + c); }, dw, dz);
  else tap_gradient<A, d, stream>(C, da, z, [=](int64_t) { return V::set(factor); }, dw, dz);
}

template <class A, Dtype d>
inline void gradient_row(const comp::Problem& p, const Taps<A>& taps, const Slots& grad, const Slots& x, const A* stats, const Slots& dx,
                         int64_t i, int64_t g, bool need_x, const Sums<A>& sums, A* base, std::vector<char*>& z, A* a, A* da, bool stream) {
  const int64_t b = i / p.M, m = i % p.M;
  const A* w = taps.taps(p, g);
  gather(p, x, b, m, g, z);
  widen<A>(grad.at(b, m, g), grad.dtype, int(p.C), A(0), da);
  if (p.normalize) {
    sum_row<A, d>(p, z.data(), w, taps.bias(p, g), a);
    norm_row<A>(p, taps, stats + (i * p.groups + g) * 2, a, da, sums, base);
  }
  if (base && sums.bias_sets) {
    A* db = sums.b(base, g);
    vectors<A>(p.C, [=, C = p.C](auto c) { add_lanes<A>(db, c, C, Vec<A>::load(da + c)); });
  }
  const bool weighted = base && sums.T;
  if (!need_x && !weighted) return;
  for (int64_t t = 0; t < p.T; ++t)
    (stream ? tap_row<A, d, true> : tap_row<A, d, false>)(p.C, da, z[size_t(t)], w ? w + t * p.C : nullptr, A(p.factor),
                                                          weighted ? sums.w(base, g) + t * p.C : nullptr,
                                                          need_x ? dx.at(b, p.token(m, t), p.first + g) : nullptr);
}

// Ranges of rows whose sums are kept apart.
inline int64_t ranges(int64_t rows) {
  return std::max<int64_t>(1, std::min<int64_t>(rows / 16, std::max<int64_t>(32, rows / 256)));
}

template <Dtype d>
inline void run_compress_backward(const comp::Problem& p, const Slots& grad, const Slots& x, const void* stats, const Slots& dx,
                                  bool need_x, bool need_params, Arithmetic<d>* total) {
  using A = Arithmetic<d>;
  using V = Vec<A>;
  const Taps<A> taps(p);
  const Sums<A> sums(p);
  const int64_t rows = p.B * p.M, count = ranges(rows), step = (rows + count - 1) / count;
  std::vector<A> partial(need_params ? size_t(count * sums.size) : 0);
  const bool far = need_x && streams(dx.data, p.B * p.height * p.width, dx.token) && p.C * element<d> % 64 == 0;
  parallel_items(count, grain_of(step * p.groups * p.T * p.C), [&](int64_t range) {
    A* base = need_params ? partial.data() + range * sums.size : nullptr;
    std::vector<char*> z(size_t(p.T));
    std::vector<A> scratch(size_t(2 * (p.C + PAD)));
    A *a = scratch.data(), *da = a + p.C + PAD;
    for (int64_t i = range * step; i < std::min(rows, (range + 1) * step); ++i)
      for (int64_t g = 0; g < p.groups; ++g)
        gradient_row<A, d>(p, taps, grad, x, static_cast<const A*>(stats), dx, i, g, need_x, sums, base, z, a, da, far);
    if (far) stream_fence();
  });
  if (need_params)
    parallel_items((sums.size + 1023) / 1024, 1, [&](int64_t part) {
      for (int64_t c = part * 1024; c + V::W <= std::min(sums.size, (part + 1) * 1024); c += V::W) {
        V s = V::set(0);
        for (int64_t r = 0; r < count; ++r) s = s + V::load(partial.data() + r * sums.size + c);
        s.store(total + c);
      }
    });
  if (!need_x) return;
  const int64_t N = p.height * p.width, bytes = p.C * dx.bytes;
  parallel_ranges(p.B * N, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t g = 0; g < p.groups && !p.used(i % N); ++g) std::memset(dx.at(i / N, i % N, p.first + g), 0, size_t(bytes));
  });
}

template <class A>
inline void compress_forward(const comp::Problem& p, const Slots& x, double eps, const Slots& kv, void* stats) {
  by_dtype<A>(x.dtype, [&]<Dtype d>() { run_compress<d>(p, x, eps, kv, stats); });
}

template <class A>
inline void compress_backward(const comp::Problem& p, const Slots& grad, const Slots& x, const void* stats, const Slots& dx, bool need_x,
                              bool need_params, A* total) {
  by_dtype<A>(x.dtype, [&]<Dtype d>() { run_compress_backward<d>(p, grad, x, stats, dx, need_x, need_params, total); });
}

template <class A>
inline void clear_tokens(const Slots& x, int64_t B, int64_t N, int64_t bytes) {
  using V = Vec<A>;
  constexpr int step = int(V::W * sizeof(A));
  const bool far = streams(x.data, B * N, x.token) && bytes % 64 == 0;
  parallel_ranges(B * N, 64, [&](int64_t begin, int64_t end) {
    alignas(64) const char zeros[step] = {};
    for (int64_t i = begin; i < end; ++i) {
      char* const to = x.at(i / N, i % N, 0);
      if (far) for (int64_t at = 0; at < bytes; at += step) stream_bytes<step>(to + at, zeros);
      else std::memset(to, 0, size_t(bytes));
    }
    if (far) stream_fence();
  });
}

using comp::CompressKernels;
W2S_KERNELS(CompressKernels, compress_forward<Real>, compress_backward<Real>, clear_tokens<Real>)

#include "cpu/target_end.h"
