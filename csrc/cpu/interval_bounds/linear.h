// Host side of the dual products: matrices brought to the accumulation type, and the loops over blocks and threads.
#pragma once

#include "cpu/tensors.h"

namespace w2s::interval {

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t pieces(int64_t n, int64_t of) { return (n + of - 1) / of; }

template <class A>
constexpr ScalarType scalar = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;

// Memory of one call, made like the tensor `like`.
template <class A>
struct Scratch {
  const Tensor& like;
  Tensors keep;
  A* get(int64_t elements) {
    keep.push_back(torch::stable::new_empty(like, {std::max<int64_t>(elements, 1)}, scalar<A>));
    return static_cast<A*>(keep.back().data_ptr());
  }
};

template <class A>
struct Matrix {  // rows of unit stride
  const A* data;
  int64_t rows, columns, stride;
};

// How a call reads and writes boxes: lower and upper (bounds), or centre and radius. `spread`: relative error of every
// product and of the bias that sound bounds contain besides, see linear_kernel.h.
struct Call {
  bool bounds_in, bounds_out, relu, sound;
  double spread = 0;
};

// How the ends of interval_linear_iw's inputs move outward so that its sums are sound. With gamma the relative error of a sum
// of `terms` roundings:
//   nonneg, general: x's ends by eta |end|, eta > gamma. An extreme product p of an element then becomes p -+ eta |p|
//   exactly (t - eta |t| grows with t, so the same vertex stays the extreme), which is what rounding can take away.
//   midrad: both ends of x and of W by eta max(|l|, |u|), eta > 4 gamma: their radii then cover eta / 2 of the centre, for
//   the roundings of centres and of the centre's product, and are eta / 2 too large, for those of the radius's.
// An exact 0 stays one; what is not finite becomes NaN, hence unknown; `least` covers underflow.
template <class A>
struct Spread {
  bool sound = false, common = false;
  A eta = 0, least = 0;
  Spread() = default;
  Spread(int64_t mode, int64_t terms, bool input) : sound(true), common(mode == 2) {
    constexpr A u = std::numeric_limits<A>::epsilon() / 2;
    if (!input && !common) return;
    eta = (common ? 4 : 1) * (A(terms + 2) * u * A(1.01)) + 16 * u;
    least = std::numeric_limits<A>::min();
  }
};

// Columns of W of one pass of the forward product: all, or so many that a tile's rows of centre and radius stay in L1
// (L2 for a small batch, where reading W counts and long runs of its rows are worth more).
inline int64_t cut_of(int64_t k, int64_t rows, size_t bytes) {
  const int64_t most = 4096 / int64_t(bytes);
  if (k <= most || rows <= 4) return k;
  return rows <= 32 ? 2 * most : most / 2;
}

inline bool transposed(const Tensor& w) { return w.size(1) > 1 && w.stride(1) != 1 && w.size(0) > 1 && w.stride(0) == 1; }

constexpr int64_t CONV_BLOCK = 128;  // taps of a chain of sums; blocks are summed in a second one
inline int64_t conv_terms(int64_t k) { return std::min(k, CONV_BLOCK) + k / CONV_BLOCK + 4; }

struct ConvShape {
  int64_t batch, channels, in_h, in_w, out_channels, kernel_h, kernel_w, out_h, out_w;
  int64_t stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, groups;
  int64_t group_in, group_out, phase_w;

  ConvShape(const Tensor& a, const Tensor& w, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
            const std::vector<int64_t>& dilation, int64_t g)
      : batch(a.size(0)), channels(a.size(1)), in_h(a.size(2)), in_w(a.size(3)), out_channels(w.size(0)), kernel_h(w.size(2)),
        kernel_w(w.size(3)), padding_y(padding[0]), padding_x(padding[1]), dilation_y(dilation[0]), dilation_x(dilation[1]), groups(g),
        group_in(channels / g), group_out(out_channels / g) {
    stride_y = std::min(stride[0], in_h + 2 * padding_y);  // a longer one leaves one position too, and planes would grow with it
    stride_x = std::min(stride[1], in_w + 2 * padding_x);
    out_h = (in_h + 2 * padding_y - dilation_y * (kernel_h - 1) - 1) / stride_y + 1;
    out_w = (in_w + 2 * padding_x - dilation_x * (kernel_w - 1) - 1) / stride_x + 1;
    phase_w = pieces(in_w + 2 * padding_x, stride_x);
  }
  // The convolution that takes gradients of outputs to those of inputs: W turned by 180 degrees, channels exchanged.
  // For stride 1 and padding below the filter's reach.
  bool turns() const {
    return stride_y == 1 && stride_x == 1 && padding_y <= dilation_y * (kernel_h - 1) && padding_x <= dilation_x * (kernel_w - 1);
  }
  ConvShape turned() const {
    ConvShape t = *this;
    std::swap(t.channels, t.out_channels);
    std::swap(t.group_in, t.group_out);
    std::swap(t.in_h, t.out_h);
    std::swap(t.in_w, t.out_w);
    t.padding_y = dilation_y * (kernel_h - 1) - padding_y;
    t.padding_x = dilation_x * (kernel_w - 1) - padding_x;
    t.phase_w = t.in_w + 2 * t.padding_x;
    return t;
  }
  // Where each tap of each channel lies in the padded planes, for output (0, 0)
  std::vector<int64_t> offsets() const {
    std::vector<int64_t> found;
    for (int64_t i = 0; i < group_in; ++i)
      for (int64_t y = 0; y < kernel_h; ++y)
        for (int64_t x = 0; x < kernel_w; ++x) {
          const int64_t column = x * dilation_x;
          found.push_back(i * plane() + (y * dilation_y * stride_x + column % stride_x) * phase_w + column / stride_x);
        }
    return found;
  }
  int64_t plane() const { return (in_h + 2 * padding_y) * stride_x * phase_w; }
  int64_t k() const { return group_in * kernel_h * kernel_w; }
  int64_t positions() const { return out_h * out_w; }
};

}  // namespace w2s::interval
