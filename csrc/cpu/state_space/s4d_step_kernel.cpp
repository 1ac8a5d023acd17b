// x' = a x + b u, y = 2 Re sum_n c_n x'_n + d u of one feature and all samples: its parameters are taken apart into real and
// imaginary parts once, each state is read and written once. Floor: 16 B H M bytes.
#include "cpu/gemm.h"
#include "cpu/state_space/s4d_step.h"

#include "cpu/target_begin.h"

// [n] numbers of `t` from `begin` on as A.
template <class A>
inline void numbers_of(const Flat& t, int64_t begin, int64_t n, A* to) {
  const char* from = static_cast<const char*>(t.data) + begin * bytes_of(t.dtype);
  for (int64_t i = 0; i < n; i += TILE) widen(from + i * bytes_of(t.dtype), t.dtype, int(std::min<int64_t>(TILE, n - i)), A(0), to + i);
}

template <class A>
inline void taken_apart(const A* pairs, int64_t M, A* re, A* im) {
  for (int64_t n = 0; n < M; ++n) re[n] = pairs[2 * n], im[n] = pairs[2 * n + 1];
}

template <class A>
inline void feature(const StepCall& call, int64_t h) {
  using V = Vec<A>;
  const int64_t M = call.M, P = round_up(M, PAD);
  A* memory = scratch_of<A>(2, 11 * P + PAD);
  A *part[6], *pairs = memory + 6 * P, *re = pairs + 2 * P, *im = re + P, *product = im + P, *one = product + P;
  const Flat* given[3] = {&call.a, &call.b, &call.c};
  for (int i = 0; i < 3; ++i) {
    part[2 * i] = memory + 2 * i * P, part[2 * i + 1] = part[2 * i] + P;
    numbers_of(*given[i], h * 2 * M, 2 * M, pairs);
    taken_apart(pairs, M, part[2 * i], part[2 * i + 1]);
    std::fill(part[2 * i] + M, part[2 * i] + P, A(0)), std::fill(part[2 * i + 1] + M, part[2 * i + 1] + P, A(0));
  }
  const A *ar = part[0], *ai = part[1], *br = part[2], *bi = part[3], *cr = part[4], *ci = part[5];
  std::fill(re, re + 2 * P, A(0));
  numbers_of(call.d, h, 1, one);
  const A d = one[0];
  for (int64_t b = 0; b < call.B; ++b) {
    const int64_t row = b * call.H + h;
    const A* before = static_cast<const A*>(call.state.data) + row * 2 * M;
    if (call.state.dtype != own_dtype<A>) numbers_of(call.state, row * 2 * M, 2 * M, pairs), before = pairs;
    taken_apart(before, M, re, im);
    numbers_of(call.u, row, 1, one);
    const V u = V::set(one[0]);
    for (int64_t n = 0; n < P; n += V::W) {
      const V xr = V::load(re + n), xi = V::load(im + n);
      const V r = V::load(ar + n) * xr - V::load(ai + n) * xi + V::load(br + n) * u;
      const V i = V::load(ar + n) * xi + V::load(ai + n) * xr + V::load(bi + n) * u;
      r.store(re + n), i.store(im + n);
      (V::load(cr + n) * r - V::load(ci + n) * i).store(product + n);
    }
    std::fill(product + M, product + P, A(0));  // where 0 times an infinity may stand
    V sum = V::set(0);
    for (int64_t n = 0; n < P; n += V::W) sum = sum + V::load(product + n);
    A* after = static_cast<A*>(call.after.data) + row * 2 * M;
    for (int64_t n = 0; n < M; ++n) after[2 * n] = re[n], after[2 * n + 1] = im[n];
    const A y = 2 * sum.sum() + d * one[0];
    narrow(&y, 1, call.y.dtype, static_cast<char*>(call.y.data) + row * bytes_of(call.y.dtype));
  }
}

W2S_KERNELS(StepKernels, feature<Real>)

#include "cpu/target_end.h"
