// What lora_linear does with its outputs beside the products, a pass each: y = gain z + bias, and of the gradient
// g = gain grad with the columns' sums of grad z. Those are summed over ranges of rows that depend on their number alone,
// a range in the accumulating type, the ranges in double.
#include "cpu/adapters/lora_linear.h"

#include "cpu/target_begin.h"

#include "cpu/tiles_kernel.h"

constexpr int BLOCK = 32;  // rows of an item
template <class A>
constexpr int ABREAST = Vec<A>::W * sizeof(A) == 64 ? 8 : 4;  // rows of a register tile of two vectors

// gain, bias: from this tile on, or null
template <class A>
W2S_INLINE void finish_tile(const A* z, int n, const A* gain, const A* bias, A* y) {
  using V = Vec<A>;
  const V zero = V::set(0);
  int i = 0;
  for (; i + V::W <= n; i += V::W) {
    const V shift = bias ? V::load(bias + i) : zero, value = V::load(z + i);
    (gain ? V::fma(V::load(gain + i), value, shift) : value + shift).store(y + i);
  }
  for (; i < n; ++i) {
    const A shift = bias ? bias[i] : A(0);
    y[i] = gain ? gain[i] * z[i] + shift : z[i] + shift;
  }
}

// z[i, :] += sum over k of h[i, k] low[k, :] for ABREAST rows of LORA_PANEL columns, of which `n` are wanted
template <class A>
[[gnu::noinline]] void add_low(A* z, const A* h, const A* low, int64_t r, int n) {  // inlined, its sums would be spilled
  using V = Vec<A>;
  constexpr int M = ABREAST<A>, STEP = 2 * V::W;
  for (int c = 0; c < n; c += STEP) {
    V sum[M][2];
    for (int i = 0; i < M; ++i) sum[i][0] = sum[i][1] = V::set(0);
    for (int64_t k = 0; k < r; ++k) {
      const V first = V::load(low + k * LORA_PANEL + c), second = V::load(low + k * LORA_PANEL + c + V::W);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        const V factor = V::set(h[i * r + k]);
        sum[i][0] = V::fma(factor, first, sum[i][0]);
        sum[i][1] = V::fma(factor, second, sum[i][1]);
      }
    }
    for (int i = 0; i < M; ++i) {
      A* at = z + i * LORA_PANEL + c;
      (V::load(at) + sum[i][0]).store(at);
      (V::load(at + V::W) + sum[i][1]).store(at + V::W);
    }
  }
}

template <class A>
inline void finish_as(const LoraFinish& s) {
  const A *gain = static_cast<const A*>(s.gain), *bias = static_cast<const A*>(s.bias), *low = static_cast<const A*>(s.low);
  const int64_t r = s.r;
  parallel_items(pieces(s.N, BLOCK), grain_of(BLOCK * s.O), [&](int64_t item) {
    const int64_t first = item * BLOCK, last = std::min(s.N, first + BLOCK);
    std::vector<A> hidden(size_t(BLOCK * r), A(0));  // [BLOCK, r], zeros behind the last row
    for (int64_t k = 0; k < r; ++k)
      for (int64_t row = first; row < last; ++row) hidden[size_t((row - first) * r + k)] = static_cast<const A*>(s.h)[k * s.pitch + row];
    A z[ABREAST<A> * LORA_PANEL] = {}, y[LORA_PANEL];
    for (int64_t c = 0; c < s.O; c += LORA_PANEL) {
      const int n = int(std::min<int64_t>(LORA_PANEL, s.O - c));
      const A *of_gain = gain ? gain + c : nullptr, *of_bias = bias ? bias + c : nullptr;
      for (int64_t group = first; group < last; group += ABREAST<A>) {
        const int rows = int(std::min<int64_t>(ABREAST<A>, last - group));
        for (int i = 0; i < rows; ++i) widen(s.sums.at(group + i, c), s.sums.dtype, n, A(0), z + i * LORA_PANEL);
        if (r) add_low(z, hidden.data() + (group - first) * r, low + c * r, r, n);
        for (int i = 0; i < rows; ++i) {
          const A* sums = z + i * LORA_PANEL;
          if (s.z.data) narrow(sums, n, s.z.dtype, s.z.at(group + i, c));
          if (gain || bias) write_tile(s.y, group + i, c, n, y, [&](A* to) { finish_tile(sums, n, of_gain, of_bias, to); });
          else narrow(sums, n, s.y.dtype, s.y.at(group + i, c));
        }
      }
    }
  });
}

// sum: of grad z, added to
template <class A>
W2S_INLINE void gain_tile(const A* grad, const A* z, int n, const A* gain, A* g, A* sum) {
  using V = Vec<A>;
  int i = 0;
  for (; i + V::W <= n; i += V::W) {
    const V value = V::load(grad + i);
    if (z) V::fma(value, V::load(z + i), V::load(sum + i)).store(sum + i);
    (V::load(gain + i) * value).store(g + i);
  }
  for (; i < n; ++i) {
    if (z) sum[i] += grad[i] * z[i];
    g[i] = gain[i] * grad[i];
  }
}

template <class A>
inline void gain_as(const LoraGain& s) {
  const int64_t range = std::max<int64_t>(16, pieces(s.N, 64)), ranges = pieces(s.N, range), O = s.O;
  const A* gain = static_cast<const A*>(s.gain);
  std::vector<A> parts(s.z.data ? size_t(ranges * O) : 0);
  parallel_items(ranges, grain_of(range * O), [&](int64_t i) {
    A wide_grad[TILE], wide_z[TILE], wide_g[TILE];
    for (int64_t row = i * range; row < std::min(s.N, (i + 1) * range); ++row)
      for (int64_t c = 0; c < O; c += TILE) {
        const int n = int(std::min<int64_t>(TILE, O - c));
        const A *grad = read_tile(s.grad, row, c, n, wide_grad), *z = s.z.data ? read_tile(s.z, row, c, n, wide_z) : nullptr;
        write_tile(s.g, row, c, n, wide_g, [&](A* g) { gain_tile(grad, z, n, gain + c, g, z ? parts.data() + i * O + c : nullptr); });
      }
  });
  if (!s.z.data) return;
  for (int64_t i = 0; i < ranges; ++i)
    for (int64_t o = 0; o < O; ++o) s.sums[o] += double(parts[size_t(i * O + o)]);
}

W2S_KERNELS(LoraKernels, finish_as<Real>, gain_as<Real>)

#include "cpu/target_end.h"
