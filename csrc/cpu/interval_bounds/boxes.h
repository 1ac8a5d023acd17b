// What hosts and kernels of the interval ops say to each other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace w2s::interval {

// How a call reads and writes boxes: lower and upper (bounds), or centre and radius. `spread`: relative error of every
// product and of the bias that sound bounds contain besides, see rows_kernel.h.
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

constexpr int64_t CONV_BLOCK = 128;  // taps of a chain of sums; blocks are summed in a second one
inline int64_t conv_terms(int64_t k) { return std::min(k, CONV_BLOCK) + k / CONV_BLOCK + 4; }

constexpr int64_t NEAR = 64 << 10;  // bytes of centre and radius that stay in L1, nearly

struct ConvShape {
  int64_t batch, channels, in_h, in_w, out_channels, kernel_h, kernel_w, out_h, out_w;
  int64_t stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, groups;
  int64_t group_in, group_out, phase_w;

  ConvShape(const Tensor& a, const Tensor& w, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
            const std::vector<int64_t>& dilation, int64_t g);
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

// Outputs of one item where dead columns are skipped: a stretch of each row of w that is long enough to be prefetched,
// and sums that stay in the first cache (measured on a Xeon with AVX-512: 48, a register tile, reads at a third)
constexpr int64_t ALIVE_WIDTH = 512;

// linear_kernel.cpp; what each does stands with it.
template <class A>
struct LinearKernels {
  int64_t (*chain)(int64_t k);
  int64_t (*panel_width)();
  int64_t (*tile_height)();
  void (*center)(const void* a, const void* b, Dtype dtype, bool bounds, bool sound, int64_t terms, double spread, int64_t k, A* c, A* r);
  void (*forward_block)(const A* c, const A* r, int64_t ldx, int64_t rows, const A* w, int64_t ldw, int64_t n, int64_t k,
                        const A* bias, const Call& call, int64_t terms, Dtype dtype, void* x, int64_t stride,
                        void* y);
  void (*forward_alive)(const A* c, const A* r, int64_t ldx, int64_t rows, const A* w, int64_t ldw, int64_t n, int64_t j,
                        const int32_t* alive, int64_t count, const A* bias, const Call& call, int64_t terms,
                        Dtype dtype, void* x, int64_t stride, void* y);
  void (*gradient)(const void* ga, const void* gb, const void* oa, const void* ob, Dtype dtype, const Call& call,
                   int n, A* gm, A* gr, A* sum);
  void (*input_gradients)(const A* m, const A* s, int64_t n, bool bounds, Dtype dtype, void* a, void* b);
  void (*stream)(const A* w, int64_t ldw, int64_t rows, int64_t k, int64_t batch, const A* gm, const A* gr, int64_t ldg,
                 const A* m, const A* r, int64_t ld, A* xm, A* xs, A* dw, int64_t ldd);
  void (*input_panel)(const A* gm, const A* gr, int64_t ldg, int64_t rows, const A* w, int64_t ldw, int64_t n,
                      int64_t columns, bool bounds, Dtype dtype, void* a, int64_t stride, void* b);
  void (*absolute)(const A* w, int64_t n, A* out);
  void (*add_signed)(const A* w, const A* turned, int64_t n, A* dw);
  void (*finish)(const A* m, const A* s, const A* bias, int64_t n, const Call& call, Dtype dtype, void* x, void* y);
  void (*pack_gradient)(const A* gm, const A* gr, int64_t ldg, int64_t batch, A* out);
  void (*weight_panel)(const A* g, int64_t batch, const A* c, const A* r, int64_t ldx, const A* w, int64_t ldw, A* dw,
                       int64_t ldd, int64_t rows, int64_t columns);
  void (*gradient_strip)(const A* gm, const A* gr, int64_t ldg, const A* g, int64_t batch, const A* c, const A* r, int64_t ldx, const A* w,
                         int64_t ldw, int64_t n, int64_t columns, bool bounds, Dtype dtype, void* a, int64_t stride, void* b, A* dw,
                         int64_t ldd);
};

// affine_kernel.cpp
template <class A>
struct AffineKernels {
  void (*forward)(const void* lower, const void* upper, Dtype dtype, const A* s, const A* t, bool across, int n, bool relu,
                  bool sound, bool far, void* low, void* high);
  void (*gradient)(const void* gl, const void* gu, const void* lower, const void* upper, const void* low, const void* high,
                   Dtype dtype, const A* s, int n, bool relu, void* dl, void* du, A* ds, A* dt);
  void (*stats_gradient)(const void* in, Dtype dtype, const A* g, const A* h, const A* mean, int n, void* out);
  double (*sum_run)(const A* x, int n);
  void (*moments)(const void* in, Dtype dtype, int n, double shift, double* sum, double* squares);
  void (*moments_across)(const void* in, Dtype dtype, int n, const double* shift, double* sum, double* squares);
};

// conv_kernel.cpp
template <class A>
struct ConvKernels {
  int64_t (*tile_height)();
  void (*pack_weight)(const A* w, int64_t rows, int64_t columns, int64_t down, int64_t across, A* out);
  int64_t (*weight_width)();
  void (*pack_channels)(const A* w, int64_t rows, int64_t columns, int64_t down, const int64_t* at, A* out);
  A* (*sample_memory)(int64_t elements);
  void (*pad_sample)(const ConvShape& s, int64_t channels, const char* a, const char* b, Dtype dtype, bool bounds, bool sound,
                     int64_t terms, double spread, A* c, A* r);
  void (*forward)(const ConvShape& s, const A* c, const A* r, const int64_t* offset, const A* packed, const A* bias,
                  int64_t y0, int64_t y1, const Call& call, int64_t terms, Dtype dtype, char* x, char* y);
  void (*output_gradient)(const char* ga, const char* gb, const char* oa, const char* ob, Dtype dtype,
                          const Call& call, int64_t channels, int64_t size, int64_t ld, A* gm, A* gr, double* bias);
  void (*turn_gradient)(const A* gm, const A* gr, int64_t ld, int64_t channels, int64_t size, A* out);
  void (*weight_sample)(const ConvShape& s, const int64_t* offset, const A* turned, const A* c, const A* r, A* dm, A* ds);
  void (*pad_gradient)(const ConvShape& s, const A* gm, const A* gr, int64_t ld, A* c, A* r);
  void (*input)(const ConvShape& s, const A* c, const A* r, const int64_t* offset, const A* packed, bool bounds, Dtype dtype,
                char* x, char* y);
  void (*fold_sample)(const ConvShape& s, const A* gm, const A* gr, int64_t ld, const A* packed, A* c, A* r);
  void (*unpad_sample)(const ConvShape& s, const A* c, const A* r, bool bounds, Dtype dtype, char* a, char* b);
};

// margin_kernel.cpp
template <class A>
struct MarginKernels {
  void (*rows)(const A* c, const A* r, int64_t ldx, int rows, const int64_t* y, const A* w, int64_t ldw, int64_t classes,
               int64_t d, const A* bias, bool sound, int64_t terms, double spread, A* z, A* s, A* t);
  void (*loss)(const A* z, int64_t classes, int64_t y, A* loss, A* worst);
  int64_t (*columns)();
  void (*gradient)(const A* g, const int64_t* y, int64_t batch, int64_t classes, const A* c, const A* r, int64_t ldx,
                   const A* w, int64_t ldw, int64_t columns, A* dm, A* dr, int64_t ldd, A* dw, int64_t ldw_out);
};

// weights_kernel.cpp
template <class A>
struct WeightKernels {
  int64_t (*terms)(int64_t k);
  void (*spread_row)(A* l, A* u, int64_t n, const Spread<A>& spread);
  void (*forward)(int64_t mode, const A* const* x, const A* const* w, int64_t ld, int64_t rows, int64_t n, A* const* out,
                  int64_t ldo);
  void (*finish_bounds)(A* l, A* u, int64_t n, Dtype dtype, void* low, void* high);
  int64_t (*vector_width)();
  void (*gradient)(int64_t mode, const A* g, int64_t batch, int64_t n, const A* const* x, const A* const* w, int64_t ld,
                   A* const* dx, A* const* dw);
  void (*split)(int64_t mode, const A* l, const A* u, int64_t n, A* const* to);
  void (*ends)(A* a, A* b, int64_t n);
  void (*choose)(const A* by, const A* negative, int64_t n, A* out);
  void (*sum_and_difference)(const A* l, const A* u, int64_t n, A* sum, A* difference);
  void (*from_centre)(const A* centre, const A* turned, int64_t n, A* a, A* b);
  bool (*finite)(const A* x, int64_t n);
};

// relu_rows_kernel.cpp
template <class A>
struct ReluRowsKernels {
  void (*lines)(const void* lower, const void* upper, Dtype dtype, int n, A* slope, A* low, A* intercept);
  double (*rows)(const void* a, Dtype dtype, const A* slope, const A* low, const A* intercept, int n, void* out);
  void (*gradient)(const void* a, const void* grad, A more, Dtype dtype, const A* slope, const A* low, const A* intercept, int n,
                   void* da, A* gs, A* gi);
  void (*box)(const void* lower, const void* upper, Dtype dtype, const A* gs, const A* gi, int n, void* dl, void* du);
};

// fast_reg_kernel.cpp; sums are in double whatever A is
template <class A>
struct MomentKernels {
  void (*moments)(const void* lower, const void* upper, Dtype dtype, int n, double* sums);
  void (*gradient)(const double* g, const void* lower, const void* upper, Dtype dtype, int n, void* dl, void* du);
};

}  // namespace w2s::interval
