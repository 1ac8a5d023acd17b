// What lora_linear does with its outputs beside the products, a pass each: y = gain z + bias, and of the gradient
// g = gain grad with the columns' sums of grad z. Those are summed over ranges of rows that depend on their number alone,
// a range in the accumulating type, the ranges in double.
#include "cpu/adapters/lora_linear.h"

#include "cpu/target_begin.h"

#include "cpu/tiles_kernel.h"

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

template <class A>
inline void finish_as(const LoraFinish& s) {
  const A *sums = static_cast<const A*>(s.sums), *gain = static_cast<const A*>(s.gain), *bias = static_cast<const A*>(s.bias);
  each_tile(s.N, s.O, [&](int64_t row, int64_t c, int n) {
    A wide_y[TILE];
    const A* z = sums + row * s.O + c;
    if (s.z.data) narrow(z, n, s.z.dtype, s.z.at(row, c));
    write_tile(s.y, row, c, n, wide_y,
               [&](A* y) { finish_tile(z, n, gain ? gain + c : nullptr, bias ? bias + c : nullptr, y); });
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
