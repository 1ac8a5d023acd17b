// interval_conv2d and its gradient: conv(c, W) + b and conv(r, |W|) from one read of W and of the input.
//
// Channels run along the vectors and positions are broadcast from zero-padded planes, so nothing is unfolded; |W| is made
// in registers. With stride 1 the gradient of the input is such a convolution too, otherwise panels of it are folded back.
// Floor: 4 B O K P FLOPs forward, 8 backward (K taps times channels, P positions). A sample is an item; the gradient of W
// is summed in order over PARTS parts of the batch.
#include "cpu/interval_bounds/host.h"

namespace w2s::interval {

ConvShape::ConvShape(const Tensor& a, const Tensor& w, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
          const std::vector<int64_t>& dilation, int64_t g)
    : batch(a.size(0)), channels(a.size(1)), in_h(a.size(2)), in_w(a.size(3)), out_channels(w.size(0)), kernel_h(w.size(2)),
      kernel_w(w.size(3)), padding_y(padding[0]), padding_x(padding[1]), dilation_y(dilation[0]), dilation_x(dilation[1]), groups(g),
      group_in(channels / g), group_out(out_channels / g) {
  check(in_h + 2 * padding_y > 0 && in_w + 2 * padding_x > 0, "an input must have rows and columns");
  stride_y = std::min(stride[0], in_h + 2 * padding_y);  // a longer one leaves one position too, and planes would grow with it
  stride_x = std::min(stride[1], in_w + 2 * padding_x);
  out_h = (in_h + 2 * padding_y - dilation_y * (kernel_h - 1) - 1) / stride_y + 1;
  out_w = (in_w + 2 * padding_x - dilation_x * (kernel_w - 1) - 1) / stride_x + 1;
  phase_w = pieces(in_w + 2 * padding_x, stride_x);
}

namespace {

constexpr int64_t PARTS = 16;
constexpr int64_t SLACK = 64;  // elements past a buffer that whole vectors may touch

template <class A>
const A* flat_weight(const Tensor& weight, const ConvShape& s, CallMemory& memory) {
  if (dtype_of(weight.scalar_type()) == own_dtype<A>) return static_cast<const A*>(weight.data_ptr());
  const int64_t size = s.out_channels * s.k();
  A* out = memory.get<A>(size);
  kernels<ConvertKernels, A>().widen(weight.data_ptr(), dtype_of(weight.scalar_type()), size, out);
  return out;
}

// W of every group in tiles of taps over output channels, for a gradient of the input that is folded back
template <class A>
A* folding_weight(const A* w, const ConvShape& s, int64_t& group_size, CallMemory& memory) {
  const int64_t tall = kernels<ConvKernels, A>().tile_height(), k = s.k();
  group_size = pieces(k, tall) * s.group_out * 2 * tall;
  A* out = memory.get<A>(s.groups * group_size);
  for (int64_t g = 0; g < s.groups; ++g)
    kernels<ConvKernels, A>().pack_weight(w + g * s.group_out * k, k, s.group_out, 1, k, out + g * group_size);
  return out;
}

// W of every group with channels along the vectors: output channels, or (turned by 180 degrees) input channels
template <class A>
A* channel_weight(const A* w, const ConvShape& s, bool turned, int64_t& group_size, CallMemory& memory) {
  const int64_t k = s.k(), taps = s.kernel_h * s.kernel_w, rows = turned ? s.group_in : s.group_out;
  std::vector<int64_t> at;
  if (turned) {
    for (int64_t o = 0; o < s.group_out; ++o)
      for (int64_t t = 0; t < taps; ++t) at.push_back(o * k + taps - 1 - t);
  } else {
    for (int64_t e = 0; e < k; ++e) at.push_back(e);
  }
  group_size = round_up(rows, kernels<ConvKernels, A>().weight_width()) * int64_t(at.size());
  A* out = memory.get<A>(s.groups * group_size);
  for (int64_t g = 0; g < s.groups; ++g)
    kernels<ConvKernels, A>().pack_channels(w + g * s.group_out * k, rows, int64_t(at.size()), turned ? taps : k, at.data(), out + g * group_size);
  return out;
}

struct Image {  // contiguous [B, channels, ...]
  char* data;
  int64_t sample, channel;
  Dtype dtype;
  Image(const Tensor& t, int64_t channels, int64_t area) : data(static_cast<char*>(t.data_ptr())), dtype(dtype_of(t.scalar_type())) {
    channel = area * bytes_of(dtype);
    sample = channels * channel;
  }
  char* at(int64_t n, int64_t c) const { return data + n * sample + c * channel; }
};

template <class A>
void forward(const ConvShape& s, const Tensor& a, const Tensor& b, const Tensor& weight, const std::optional<Tensor>& bias, const Call& call,
             Tensor& x, Tensor& y) {
  CallMemory memory{a, {}};
  int64_t group_size;
  const A* packed = channel_weight<A>(flat_weight<A>(weight, s, memory), s, false, group_size, memory);
  const A* shift = widened_bias<A>(bias, s.out_channels, memory);
  const int64_t terms = conv_terms(s.k()), parts = std::min<int64_t>(s.out_h, pieces(8, s.batch)), share = pieces(s.out_h, parts);
  const std::vector<int64_t> offsets = s.offsets();
  const Image first(a, s.channels, s.in_h * s.in_w), second(b, s.channels, s.in_h * s.in_w);
  const Image outx(x, s.out_channels, s.positions()), outy(y, s.out_channels, s.positions());
  const int64_t size = s.group_in * s.plane() + SLACK;
  parallel_items(s.batch * parts, 1, [&](int64_t item) {
    const int64_t n = item / parts, from = item % parts * share, to = std::min(s.out_h, from + share);
    A* c = kernels<ConvKernels, A>().sample_memory(2 * size);
    A* r = c + size;
    for (int64_t g = 0; g < s.groups; ++g) {
      kernels<ConvKernels, A>().pad_sample(s, s.group_in, first.at(n, g * s.group_in), second.at(n, g * s.group_in), first.dtype, call.bounds_in,
                                  call.sound, terms, call.spread, c, r);
      kernels<ConvKernels, A>().forward(s, c, r, offsets.data(), packed + g * group_size, shift ? shift + g * s.group_out : nullptr, from, to,
                                    call, terms, outx.dtype, outx.at(n, g * s.group_out), outy.at(n, g * s.group_out));
    }
  });
}

std::tuple<Tensor, Tensor> interval_conv2d(Tensor a, Tensor b, Tensor weight, std::optional<Tensor> bias, std::vector<int64_t> stride,
                                           std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, bool bounds_in,
                                           bool bounds_out, bool relu, std::string, bool sound, double spread) {
  const ConvShape s(a, weight, stride, padding, dilation, groups);
  Tensor x = fresh(a, {s.batch, s.out_channels, s.out_h, s.out_w});
  Tensor y = fresh(a, {s.batch, s.out_channels, s.out_h, s.out_w});
  const Call call{bounds_in, bounds_out, relu, sound, spread};
  if (s.batch && s.out_channels && s.positions()) {
    if (a.scalar_type() == ScalarType::Double) forward<double>(s, a, b, weight, bias, call, x, y);
    else forward<float>(s, a, b, weight, bias, call, x, y);
  }
  return {x, y};
}

struct Outputs {
  Tensor &da, &db, &dw, &dbias;
  bool need_x, need_w, need_b;
};

template <class A>
struct Sums {  // of one part of the batch: [group][tile of output channels][k][channel]
  A *m = nullptr, *s = nullptr;
  std::vector<double> bias;
};

template <class A>
void write_weight(const ConvShape& s, const A* w, const std::vector<Sums<A>>& sums, int64_t group_sums, Tensor& dw, CallMemory& memory) {
  const int64_t k = s.k(), wide = kernels<ConvKernels, A>().weight_width();
  const bool direct = dtype_of(dw.scalar_type()) == own_dtype<A>;
  A* out = direct ? static_cast<A*>(dw.data_ptr()) : memory.get<A>(s.out_channels * k);
  parallel_items(s.out_channels, 1, [&](int64_t o) {
    const int64_t channel = o % s.group_out, from = o / s.group_out * group_sums + channel / wide * k * wide + channel % wide;
    for (int64_t e = 0; e < k; ++e) {
      A m = 0, q = 0;
      for (const Sums<A>& part : sums) m += part.m[from + e * wide], q += part.s[from + e * wide];
      const A x = w[o * k + e];
      out[o * k + e] = m + (x > 0 ? q : x < 0 ? -q : A(0));
    }
  });
  if (!direct) kernels<ConvertKernels, A>().narrow(out, s.out_channels * k, dtype_of(dw.scalar_type()), dw.data_ptr());
}

template <class A>
void backward(const ConvShape& s, const Tensor& ga, const Tensor& gb, const Tensor& a, const Tensor& b, const Tensor& weight,
              const Tensor& oa, const Tensor& ob, const Call& call, Outputs out) {
  CallMemory memory{a, {}};
  int64_t group_size = 0;
  const A* w = flat_weight<A>(weight, s, memory);
  const bool turns = s.turns();
  const ConvShape back = turns ? s.turned() : s;
  const std::vector<int64_t> taps = s.offsets(), offsets = back.offsets();
  const A* packed = !out.need_x ? nullptr : turns ? channel_weight<A>(w, s, true, group_size, memory) : folding_weight<A>(w, s, group_size, memory);
  const int64_t parts = std::min(PARTS, s.batch), share = pieces(s.batch, parts), k = s.k(), area = s.positions();
  std::vector<Sums<A>> sums(static_cast<size_t>(parts));
  const int64_t wide = kernels<ConvKernels, A>().weight_width(), padded_out = round_up(s.group_out, wide), group_sums = padded_out * k;
  for (Sums<A>& part : sums) {
    if (out.need_w) part.m = memory.get<A>(s.groups * group_sums), part.s = memory.get<A>(s.groups * group_sums);
    if (out.need_b) part.bias.assign(size_t(s.out_channels), 0.0);
  }
  const Image g1(ga, s.out_channels, area), g2(gb, s.out_channels, area), o1(oa, s.out_channels, area), o2(ob, s.out_channels, area);
  const Image x1(a, s.channels, s.in_h * s.in_w), x2(b, s.channels, s.in_h * s.in_w);
  const Image d1(out.da, s.channels, s.in_h * s.in_w), d2(out.db, s.channels, s.in_h * s.in_w);
  const int64_t plane = std::max(s.group_in * s.plane(), back.group_in * back.plane()) + SLACK, ld = round_up(area, 16) + 16, grads = s.group_out * ld;
  parallel_items(parts, 1, [&](int64_t i) {
    Sums<A>& part = sums[size_t(i)];
    if (out.need_w) {
      std::fill(part.m, part.m + s.groups * group_sums, A(0));
      std::fill(part.s, part.s + s.groups * group_sums, A(0));
    }
    A* c = kernels<ConvKernels, A>().sample_memory(2 * plane + 2 * grads + 2 * padded_out * area);
    A *r = c + plane, *gm = r + plane, *gr = gm + grads, *turned = gr + grads;
    for (int64_t n = i * share; n < std::min(s.batch, (i + 1) * share); ++n)
      for (int64_t g = 0; g < s.groups; ++g) {
        const int64_t o = g * s.group_out, in = g * s.group_in;
        kernels<ConvKernels, A>().output_gradient(g1.at(n, o), g2.at(n, o), o1.at(n, o), o2.at(n, o), g1.dtype, call, s.group_out, area, ld, gm, gr,
                                         out.need_b ? part.bias.data() + o : nullptr);
        if (out.need_w) {
          kernels<ConvKernels, A>().pad_sample(s, s.group_in, x1.at(n, in), x2.at(n, in), x1.dtype, call.bounds_in, false, 0, 0.0, c, r);
          kernels<ConvKernels, A>().turn_gradient(gm, gr, ld, s.group_out, area, turned);
          kernels<ConvKernels, A>().weight_sample(s, taps.data(), turned, c, r, part.m + g * group_sums, part.s + g * group_sums);
        }
        if (out.need_x && turns) {
          kernels<ConvKernels, A>().pad_gradient(back, gm, gr, ld, c, r);
          kernels<ConvKernels, A>().input(back, c, r, offsets.data(), packed + g * group_size, call.bounds_in, d1.dtype, d1.at(n, in), d2.at(n, in));
        } else if (out.need_x) {
          kernels<ConvKernels, A>().fold_sample(s, gm, gr, ld, packed + g * group_size, c, r);
          kernels<ConvKernels, A>().unpad_sample(s, c, r, call.bounds_in, d1.dtype, d1.at(n, in), d2.at(n, in));
        }
      }
  });
  if (out.need_w) write_weight(s, w, sums, group_sums, out.dw, memory);
  if (!out.need_b) return;
  std::vector<A> total(static_cast<size_t>(s.out_channels), A(0));
  for (int64_t o = 0; o < s.out_channels; ++o) {
    double sum = 0;
    for (const Sums<A>& part : sums) sum += part.bias[size_t(o)];
    total[size_t(o)] = A(sum);
  }
  kernels<ConvertKernels, A>().narrow(total.data(), s.out_channels, dtype_of(out.dbias.scalar_type()), out.dbias.data_ptr());
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Gradients interval_conv2d_backward(Tensor ga, Tensor gb, Tensor a, Tensor b, Tensor weight, Tensor oa, Tensor ob, std::vector<int64_t> stride,
                                   std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, bool bounds_in, bool bounds_out,
                                   bool relu, std::string, bool need_x, bool need_w, bool need_b) {
  const ConvShape s(a, weight, stride, padding, dilation, groups);
  expect_like(b, "second", a), expect(weight, "weight", {s.out_channels, s.group_in, s.kernel_h, s.kernel_w}, a.scalar_type());
  for (const auto& [t, name] : {std::pair(ga, "grad_first"), {gb, "grad_second"}, {oa, "out_first"}, {ob, "out_second"}})
    expect(t, name, {s.batch, s.out_channels, s.out_h, s.out_w}, a.scalar_type());
  const auto made = [&](bool wanted, std::vector<int64_t> shape) {
    return fresh(a, wanted ? shape : std::vector<int64_t>{0});
  };
  const std::vector<int64_t> image{s.batch, s.channels, s.in_h, s.in_w}, filter{s.out_channels, s.group_in, s.kernel_h, s.kernel_w};
  Tensor da = made(need_x, image), db = made(need_x, image), dw = made(need_w, filter), dbias = made(need_b, {s.out_channels});
  if (s.batch == 0 || s.out_channels == 0 || s.positions() == 0) {
    for (Tensor* t : {&da, &db, &dw, &dbias}) torch::stable::zero_(*t);
    return {da, db, dw, dbias};
  }
  const Call call{bounds_in, bounds_out, relu, false};
  const Outputs out{da, db, dw, dbias, need_x, need_w, need_b};
  if (a.scalar_type() == ScalarType::Double) backward<double>(s, ga, gb, a, b, weight, oa, ob, call, out);
  else backward<float>(s, ga, gb, a, b, weight, oa, ob, call, out);
  return {da, db, dw, dbias};
}

}  // namespace
}  // namespace w2s::interval

W2S_IMPLEMENTATIONS(m) {
  m.add<&w2s::interval::interval_conv2d>("interval_conv2d");
  m.add<&w2s::interval::interval_conv2d_backward>("interval_conv2d_backward");
}
