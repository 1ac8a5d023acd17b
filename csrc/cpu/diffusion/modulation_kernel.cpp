//     added = x + gate y ;  h = (added - mean) / s (1 + scale) + shift
// gate, shift and scale are a vector a sample or one a token.
// One pass: a row of x and y is read while added is written, stays in L1 between its sums, and h is written. Large outputs
// are streamed: 4 instead of 6 times a row's bytes to and from memory, as a store reads its line first. Backward, with
// unit = (added - mean) / s: g = dh (1 + scale), dx = dadded + (g - mean g - unit mean(g unit)) / s, dy = gate dx; the sums
// over tokens, dgate = sum dx y, dshift = sum dh, dscale = sum dh unit, are kept for fixed ranges of rows and added in order;
// of a vector a token there is nothing to add, and its gradient is written at once.
#include "cpu/diffusion/modulation.h"

#include "cpu/target_begin.h"

#include "cpu/channels_kernel.h"

namespace mod = ::w2s::modulation;

// Modulation vectors in the arithmetic's type, with their table row and `add`: those of samples made once, [B, C], those of
// tokens widened where they are read.
template <class A>
struct Vectors {
  std::vector<A> values, extra;
  const mod::Modulator& from;
  int64_t C;
  A add;
  Vectors(const mod::Modulator& m, int64_t B, int64_t C, A add) : extra(size_t(C + PAD)), from(m), C(C), add(add) {
    if (!m.vector) return;
    if (m.row) parameter<A>(m.row, C, A(0), extra.data());
    if (m.each) return;
    values.resize(size_t(B * C + PAD));
    std::vector<A> one(size_t(C + PAD));
    for (int64_t b = 0; b < B; ++b) std::copy_n(read(b, 0, one.data()), C, values.data() + b * C);
  }
  A* read(int64_t b, int64_t n, A* buffer) const {  // `buffer` has room for C, padded
    widen<A>(static_cast<const char*>(from.vector.data) + b * from.batch + n * from.token, from.vector.dtype, int(C), A(0), buffer);
    const Vec<A> one = Vec<A>::set(add);
    vectors<A>(C, [&](int64_t c) { (Vec<A>::load(buffer + c) + Vec<A>::load(extra.data() + c) + one).store(buffer + c); });
    return buffer;
  }
  const A* at(int64_t b, int64_t n, A* buffer) const {
    if (from.each) return read(b, n, buffer);
    return values.empty() ? nullptr : values.data() + b * C;
  }
};

template <Dtype d, bool stream, bool residual>
inline void modulate_rows(const mod::Forward& f, const Vectors<Arithmetic<d>>& gate, const Vectors<Arithmetic<d>>& shift,
                          const Vectors<Arithmetic<d>>& scale, int64_t begin, int64_t end) {
  using A = Arithmetic<d>;
  using V = Vec<A>;
  const int64_t C = f.C;
  const int64_t pitch = padded(int(C));
  std::vector<A> row(size_t(4 * pitch));
  A* a = row.data();
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / f.N, n = i % f.N;
    const char *x = f.x.at(b, n), *y = residual ? f.y.at(b, n) : nullptr;
    char* added = residual ? f.added.at(b, n) : nullptr;
    const A* w = residual ? gate.at(b, n, a + pitch) : nullptr;
    // x + gate y to memory; the LayerNorm is that of the rounded row, which backward sees
    const auto add = [=](auto c) __attribute__((always_inline)) {
      const V base = load_lanes<A, d>(x, c, C);
      if constexpr (!residual) return base;
      else return store_lanes<A, d, stream>(added, c, C, V::fma(V::load(w + c), load_lanes<A, d>(y, c, C), base));
    };
    if (!f.h.data) {
      vectors<A>(C, add);
      continue;
    }
    const A total = row_sum<A>(C, [=](auto c) {
      const V v = add(c);
      v.store(a + c);
      return v;
    });
    A* kept = static_cast<A*>(f.stats) + i * 2;
    row_spread<A>(a, C, A(f.eps), total / A(C), kept);
    const V mean = V::set(kept[0]), rstd = V::set(kept[1]);
    const A *up = shift.at(b, n, a + 2 * pitch), *gain = scale.at(b, n, a + 3 * pitch);
    char* h = f.h.at(b, n);
    vectors<A>(C, [=](auto c) {
      store_lanes<A, d, stream>(h, c, C, V::fma((V::load(a + c) - mean) * rstd, V::load(gain + c), V::load(up + c)));
    });
  }
  if (stream) stream_fence();
}

template <Dtype d>
inline void run_modulate(const mod::Forward& f) {
  using A = Arithmetic<d>;
  Vectors<A> gate(f.gate, f.B, f.C, A(0));
  const Vectors<A> shift(f.shift, f.B, f.C, A(0)), scale(f.scale, f.B, f.C, A(1));
  if (!f.gate.vector) gate.values.assign(size_t(f.B * f.C + PAD), A(1));
  const bool far = streams(f.h.data ? f.h.data : f.added.data, f.B * f.N, f.C * element<d>);
  const auto rows = f.y.data ? (far ? modulate_rows<d, true, true> : modulate_rows<d, false, true>)
                             : (far ? modulate_rows<d, true, false> : modulate_rows<d, false, false>);
  parallel_ranges(f.B * f.N, grain_of(f.C), [&](int64_t begin, int64_t end) { rows(f, gate, shift, scale, begin, end); });
}

// x[c] += y for a whole vector; the array is padded
template <class A>
W2S_INLINE void add_to(A* x, Vec<A> y) {
  (Vec<A>::load(x) + y).store(x);
}

constexpr int64_t RANGE = 64;  // rows of a range

// `sums`: where dgate, dshift and dscale of the range are added up; `rows`: room for 5 rows
template <Dtype d>
inline void modulate_row(const mod::Backward& f, int64_t b, int64_t n, const Vectors<Arithmetic<d>>& gates,
                         const Vectors<Arithmetic<d>>& scales, Arithmetic<d>* rows, Arithmetic<d>* sums, int64_t pitch) {
  using A = Arithmetic<d>;
  using V = Vec<A>;
  const int64_t C = f.C, token = (b * f.N + n) * C;
  A *dx = rows, *g = rows + pitch, *unit = rows + 2 * pitch;
  const A *gate = gates.at(b, n, rows + 3 * pitch), *scale = scales.at(b, n, rows + 4 * pitch);
  if (f.grad_added.data) widen<A>(f.grad_added.at(b, n), d, int(C), A(0), dx);
  else std::memset(dx, 0, size_t(padded(int(C))) * sizeof(A));
  if (f.grad_h.data) {
    const A* kept = static_cast<const A*>(f.stats) + (b * f.N + n) * 2;
    const V mean = V::set(kept[0]), rstd = V::set(kept[1]);
    const char *dh = f.grad_h.at(b, n), *x = f.added.at(b, n);
    vectors<A>(C, [&](int64_t c) {
      const V up = load_lanes<A, d>(dh, c, C), u = (load_lanes<A, d>(x, c, C) - mean) * rstd;
      u.store(unit + c);
      (up * V::load(scale + c)).store(g + c);
      if (f.scale.each) (up * u).store(rows + 4 * pitch + c);  // its scale has just been read
      if (f.need_modulation) {
        add_to<A>(sums + pitch + c, up);
        if (!f.scale.each) add_to<A>(sums + 2 * pitch + c, up * u);
      }
    });
    if (f.need_modulation && f.scale.each) std::copy_n(rows + 4 * pitch, C, static_cast<A*>(f.dscale) + token);
    const V first = V::set(row_sum<A>(C, [&](int64_t c) { return V::load(g + c); }) / A(C));
    const V second = V::set(row_sum<A>(C, [&](int64_t c) { return V::load(g + c) * V::load(unit + c); }) / A(C));
    vectors<A>(C, [&](int64_t c) {
      (V::load(dx + c) + rstd * (V::load(g + c) - first - V::load(unit + c) * second)).store(dx + c);
    });
  }
  if (f.need_gate) {
    const char* y = f.y.at(b, n);
    vectors<A>(C, [&](int64_t c) {
      const V product = V::load(dx + c) * load_lanes<A, d>(y, c, C);
      if (f.gate.each) product.store(g + c);
      else add_to<A>(sums + c, product);
    });
    if (f.gate.each) std::copy_n(g, C, static_cast<A*>(f.dgate) + token);
  }
  if (f.need_x) narrow<A>(dx, int(C), d, f.dx.at(b, n));
  if (!f.need_y) return;
  if (gate) vectors<A>(C, [&](int64_t c) { (V::load(dx + c) * V::load(gate + c)).store(dx + c); });
  narrow<A>(dx, int(C), d, f.dy.at(b, n));
}

template <Dtype d>
inline void run_modulate_backward(const mod::Backward& f) {
  using A = Arithmetic<d>;
  const int64_t C = f.C, pitch = padded(int(C)), ranges = (f.N + RANGE - 1) / RANGE;
  const Vectors<A> gate(f.gate, f.B, C, A(0)), scale(f.scale, f.B, C, A(1));
  const bool sum = f.need_gate || f.need_modulation;
  std::vector<A> partial(sum ? size_t(f.B * ranges * 3 * pitch) : 0);
  parallel_items(f.B * ranges, grain_of(std::min(f.N, RANGE) * C), [&](int64_t i) {
    const int64_t b = i / ranges, from = i % ranges * RANGE;
    std::vector<A> rows(size_t(5 * pitch));
    for (int64_t n = from; n < std::min(f.N, from + RANGE); ++n)
      modulate_row<d>(f, b, n, gate, scale, rows.data(), sum ? partial.data() + i * 3 * pitch : nullptr, pitch);
  });
  if (!sum) return;
  parallel_items(f.B * 3, grain_of(ranges * C), [&](int64_t i) {
    const int64_t b = i / 3, which = i % 3;
    A* out = static_cast<A*>(which == 0 ? f.dgate : which == 1 ? f.dshift : f.dscale);
    if (!(which ? f.need_modulation : f.need_gate) || (which == 0 && f.gate.each) || (which == 2 && f.scale.each)) return;
    out += b * C;
    std::fill(out, out + C, A(0));
    for (int64_t r = 0; r < ranges; ++r) {
      const A* part = partial.data() + ((b * ranges + r) * 3 + which) * pitch;
      for (int64_t c = 0; c < C; ++c) out[c] += part[c];
    }
  });
}

template <class A>
inline void modulate(const mod::Forward& f, Dtype dtype) {
  by_dtype<A>(dtype, [&]<Dtype d>() { run_modulate<d>(f); });
}

template <class A>
inline void modulate_backward(const mod::Backward& f, Dtype dtype) {
  by_dtype<A>(dtype, [&]<Dtype d>() { run_modulate_backward<d>(f); });
}

using mod::ModulationKernels;
W2S_KERNELS(ModulationKernels, modulate<Real>, modulate_backward<Real>)

#include "cpu/target_end.h"
