//     y = weight (x - mean) / s + bias in slots [first, last), the other slots copied
// One pass over the rows; backward sums dweight and dbias over fixed ranges of rows, which are added in order.
#include "cpu/diffusion/qk_norm.h"

#include "cpu/target_begin.h"

#include "cpu/channels_kernel.h"

namespace norm = ::w2s::norm;

// [sets, C] as [sets][pitch]
template <class A>
inline std::vector<A> padded_sets(const Flat& t, int64_t sets, int64_t C, int64_t pitch, A absent) {
  std::vector<A> flat(size_t(sets * C)), found(size_t(sets * pitch));
  parameter<A>(t, sets * C, absent, flat.data());
  for (int64_t s = 0; s < sets; ++s) std::memcpy(found.data() + s * pitch, flat.data() + s * C, size_t(C) * sizeof(A));
  return found;
}

template <Dtype d, bool stream>
inline void norm_one(const norm::Problem& p, const char* x, const Arithmetic<d>* weight, const Arithmetic<d>* bias, Arithmetic<d>* a,
                     Arithmetic<d>* kept, char* out) {
  using A = Arithmetic<d>;
  using V = Vec<A>;
  const int64_t C = p.C;
  const A total = row_sum<A>(C, [=](auto c) {
    const V v = load_lanes<A, d>(x, c, C);
    v.store(a + c);
    return v;
  });
  row_spread<A>(a, C, A(p.eps), p.rms ? A(0) : total / A(C), kept);
  const V mean = V::set(kept[0]), rstd = V::set(kept[1]);
  vectors<A>(C, [=](auto c) {
    store_lanes<A, d, stream>(out, c, C, V::fma((V::load(a + c) - mean) * rstd, V::load(weight + c), V::load(bias + c)));
  });
}

template <Dtype d>
inline void run_qk_norm(const norm::Problem& p, const Slots& y, void* stats) {
  using A = Arithmetic<d>;
  const int64_t C = p.C, pitch = padded(int(C)), slots = p.last - p.first;
  const std::vector<A> weight = padded_sets<A>(p.weight, p.sets, C, pitch, A(1)), bias = padded_sets<A>(p.bias, p.bias_sets, C, pitch, A(0));
  const int64_t weight_step = p.sets > 1 ? pitch : 0, bias_step = p.bias_sets > 1 ? pitch : 0;
  const bool far = streams(y.data, p.B * p.N * p.S, C * element<d>);
  parallel_ranges(p.B * p.N, grain_of(p.S * C), [&](int64_t begin, int64_t end) {
    std::vector<A> row(static_cast<size_t>(pitch));
    for (int64_t i = begin; i < end; ++i)
      for (int64_t s = 0; s < p.S; ++s) {
        const char* x = p.x.at(i / p.N, i % p.N, s);
        char* out = y.at(i / p.N, i % p.N, s);
        if (s < p.first || s >= p.last) {
          std::memcpy(out, x, size_t(C * p.x.bytes));
          continue;
        }
        const int64_t k = s - p.first;
        (far ? norm_one<d, true> : norm_one<d, false>)(p, x, weight.data() + k * weight_step, bias.data() + k * bias_step, row.data(),
                                                       static_cast<A*>(stats) + (i * slots + k) * 2, out);
      }
    if (far) stream_fence();
  });
}

template <Dtype d>
inline void qk_norm_row(const norm::Problem& p, const char* grad, const char* x, const Arithmetic<d>* kept, const Arithmetic<d>* w,
                        Arithmetic<d>* dweight, Arithmetic<d>* dbias, Arithmetic<d>* g, Arithmetic<d>* unit, char* dx) {
  using A = Arithmetic<d>;
  using V = Vec<A>;
  const int64_t C = p.C;
  const V mean = V::set(kept[0]), rstd = V::set(kept[1]);
  vectors<A>(C, [&](int64_t c) {
    const V up = load_lanes<A, d>(grad, c, C), u = (load_lanes<A, d>(x, c, C) - mean) * rstd;
    u.store(unit + c);
    if (dweight) (V::load(dweight + c) + up * u).store(dweight + c);
    if (dbias) (V::load(dbias + c) + up).store(dbias + c);
    (up * V::load(w + c)).store(g + c);
  });
  const V first = V::set(p.rms ? A(0) : row_sum<A>(C, [&](int64_t c) { return V::load(g + c); }) / A(C));
  const V second = V::set(row_sum<A>(C, [&](int64_t c) { return V::load(g + c) * V::load(unit + c); }) / A(C));
  vectors<A>(C, [=](auto c) {
    store_lanes<A, d>(dx, c, C, rstd * (V::load(g + c) - first - V::load(unit + c) * second));
  });
}

constexpr int64_t RANGE = 64;  // rows of a range

// total: dweight [sets, C] and dbias [sets, C], each null if not needed
template <Dtype d>
inline void run_qk_norm_backward(const norm::Problem& p, const Slots& grad, const void* stats, const Slots& dx,
                                 Arithmetic<d>* dweight, Arithmetic<d>* dbias) {
  using A = Arithmetic<d>;
  const int64_t C = p.C, pitch = padded(int(C)), slots = p.last - p.first, rows = p.B * p.N, ranges = (rows + RANGE - 1) / RANGE;
  const std::vector<A> weight = padded_sets<A>(p.weight, p.sets, C, pitch, A(1));
  const int64_t step = p.sets > 1 ? pitch : 0;
  const int64_t wsets = dweight ? p.sets : 0, bsets = dbias ? p.bias_sets : 0, size = (wsets + bsets) * pitch;
  std::vector<A> partial(size_t(ranges * size));
  parallel_items(ranges, grain_of(std::min(rows, RANGE) * p.S * C), [&](int64_t range) {
    A* sums = partial.data() + range * size;
    std::vector<A> scratch(size_t(2 * pitch));
    for (int64_t i = range * RANGE; i < std::min(rows, (range + 1) * RANGE); ++i)
      for (int64_t s = 0; s < p.S; ++s) {
        const char* g = grad.at(i / p.N, i % p.N, s);
        char* out = dx.at(i / p.N, i % p.N, s);
        if (s < p.first || s >= p.last) {
          std::memcpy(out, g, size_t(C * p.x.bytes));
          continue;
        }
        const int64_t k = s - p.first;
        qk_norm_row<d>(p, g, p.x.at(i / p.N, i % p.N, s), static_cast<const A*>(stats) + (i * slots + k) * 2, weight.data() + k * step,
                       dweight ? sums + (wsets > 1 ? k * pitch : 0) : nullptr,
                       dbias ? sums + wsets * pitch + (bsets > 1 ? k * pitch : 0) : nullptr, scratch.data(), scratch.data() + pitch, out);
      }
  });
  for (int64_t k = 0; k < wsets + bsets; ++k) {
    A* out = k < wsets ? dweight + k * C : dbias + (k - wsets) * C;
    std::fill(out, out + C, A(0));
    for (int64_t r = 0; r < ranges; ++r)
      for (int64_t c = 0; c < C; ++c) out[c] += partial[size_t(r * size + k * pitch + c)];
  }
}

template <class A>
inline void norm_forward(const norm::Problem& p, const Slots& y, void* stats) {
  by_dtype<A>(p.x.dtype, [&]<Dtype d>() { run_qk_norm<d>(p, y, stats); });
}

template <class A>
inline void norm_backward(const norm::Problem& p, const Slots& grad, const void* stats, const Slots& dx, A* dweight, A* dbias) {
  by_dtype<A>(p.x.dtype, [&]<Dtype d>() { run_qk_norm_backward<d>(p, grad, stats, dx, dweight, dbias); });
}

using norm::NormKernels;
W2S_KERNELS(NormKernels, norm_forward<Real>, norm_backward<Real>)

#include "cpu/target_end.h"
