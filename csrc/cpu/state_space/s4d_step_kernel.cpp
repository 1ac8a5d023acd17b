// x' = a x + b u, y = 2 Re sum_n c_n x'_n + d u, row by row of [B H] as they lie in memory: each state is read and written
// once, the parameters of all features stay in L2. Real and imaginary parts stay next to each other. Floor: 16 B H M bytes.
#include "cpu/state_space/s4d_step.h"

#include "cpu/target_begin.h"

// The two parts of each number changed places; the real (imaginary) part in both places.
#define W2S_PAIRS(name, a, b)                                                                                                     \
  template <class V>                                                                                                              \
  W2S_INLINE V name(V x) {                                                                                                        \
    if constexpr (V::W == 16)                                                                                                     \
      return {__builtin_shufflevector(x.v, x.v, a, b, a + 2, b + 2, a + 4, b + 4, a + 6, b + 6, a + 8, b + 8, a + 10, b + 10,      \
                                      a + 12, b + 12, a + 14, b + 14)};                                                           \
    else if constexpr (V::W == 8)                                                                                                 \
      return {__builtin_shufflevector(x.v, x.v, a, b, a + 2, b + 2, a + 4, b + 4, a + 6, b + 6)};                                  \
    else if constexpr (V::W == 4) return {__builtin_shufflevector(x.v, x.v, a, b, a + 2, b + 2)};                                  \
    else return {__builtin_shufflevector(x.v, x.v, a, b)};                                                                        \
  }
W2S_PAIRS(swapped, 1, 0)
W2S_PAIRS(real_parts, 0, 0)
W2S_PAIRS(imaginary_parts, 1, 1)
#undef W2S_PAIRS

template <class A>
inline void rows(const StepCall<A>& call, int64_t begin, int64_t end) {
  using V = Vec<A>;
  const int64_t N = 2 * call.M, whole = N / V::W * V::W;
  A turn[V::W], own[V::W], one[V::W];
  for (int i = 0; i < V::W; ++i) turn[i] = i % 2 ? A(1) : A(-1), own[i] = -turn[i];
  const V minus_plus = V::load(turn), plus_minus = V::load(own);
  int64_t feature = begin % call.H;  // counted, not divided: a division a row was a fifth of the time at 64 numbers a row
  for (int64_t row = begin; row < end; ++row, feature = feature + 1 == call.H ? 0 : feature + 1) {
    const int64_t at = feature * N;
    const A *a = call.a + at, *b = call.b + at, *c = call.c + at, *before = call.state + row * N;
    A* after = call.after + row * N;
    const V u = V::set(call.u[row]);
    const auto step = [&](V x, V a, V b) {
      return V::fma(real_parts(a), x, V::fma(imaginary_parts(a) * minus_plus, swapped(x), b * u));
    };
    V sum = V::set(0);
    int64_t n = 0;
    for (; n < whole; n += V::W) {
      const V x = step(V::load(before + n), V::load(a + n), V::load(b + n));
      x.store(after + n);
      sum = V::fma(V::load(c + n) * plus_minus, x, sum);
    }
    if (n < N) {
      const int left = int(N - n);
      step(V::load_first(before + n, left), V::load_first(a + n, left), V::load_first(b + n, left)).store(one);
      std::memcpy(after + n, one, size_t(left) * sizeof(A));
      std::fill(one + left, one + V::W, A(0));  // where 0 times an infinity may stand
      sum = V::fma(V::load_first(c + n, left) * plus_minus, V::load(one), sum);
    }
    call.y[row] = 2 * sum.sum() + call.d[feature] * call.u[row];
  }
}

W2S_KERNELS(StepKernels, rows<Real>)

#include "cpu/target_end.h"
