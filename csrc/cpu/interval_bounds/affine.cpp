// interval_affine, interval_batchnorm_stats and their gradients. Tensors are [B, C, size]: an item is a plane of one
// channel, or a row of all channels where size is 1, so that either way entries lie next to each other. 16 bytes an entry
// forward, 24 backward. Sums are float64, a sample's in order.
#include <cmath>

#include "cpu/interval_bounds/host.h"

namespace w2s::interval {
namespace {

constexpr int64_t TILE = 1024;

struct Planes {
  int64_t batch, channels, size = 1, bytes;
  Dtype dtype;
  std::vector<int64_t> shape;
  explicit Planes(const Tensor& t) : batch(t.size(0)), channels(t.size(1)), dtype(dtype_of(t.scalar_type())) {
    for (int64_t d = 0; d < t.dim(); ++d) shape.push_back(t.size(d));
    for (int64_t d = 2; d < t.dim(); ++d) size *= t.size(d);
    bytes = bytes_of(dtype);
  }
  bool rows() const { return size == 1; }
  // work(first entry, count, first channel) for every run of at most TILE entries of sample n; one channel unless rows()
  template <class F>
  void runs(int64_t n, const F& work) const {
    if (rows()) {
      for (int64_t c = 0; c < channels; c += TILE) work(n * channels + c, int(std::min(TILE, channels - c)), c);
      return;
    }
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < size; i += TILE) work((n * channels + c) * size + i, int(std::min(TILE, size - i)), c);
  }
};

char* at(const Tensor& t, int64_t entry, int64_t bytes) { return static_cast<char*>(t.data_ptr()) + entry * bytes; }

// [C] numbers, then zeros to whole tiles
template <class A>
std::vector<A> vector_of(const Tensor& t) {
  std::vector<A> found(static_cast<size_t>(round_up(t.size(0), 16) + 64), A(0));
  kernels<ConvertKernels, A>().widen(t.data_ptr(), dtype_of(t.scalar_type()), t.size(0), found.data());
  return found;
}

// The vector's entries of a run: its own, or one of them repeated
template <class A>
const A* spread(const Planes& p, const std::vector<A>& all, int64_t channel, int n, A* buffer) {
  if (p.rows()) return all.data() + channel;
  std::fill(buffer, buffer + (n + 15) / 16 * 16, all[size_t(channel)]);
  return buffer;
}

template <class A>
void forward(const Planes& p, const Tensor& lower, const Tensor& upper, const Tensor& scale, const Tensor& shift, bool relu, bool sound,
             Tensor& low, Tensor& high) {
  const std::vector<A> s = vector_of<A>(scale), t = vector_of<A>(shift);
  const bool far = p.batch * p.channels * p.size * p.bytes >= int64_t(8) << 20;  // each output stays in no cache for its reader
  parallel_items(p.batch, grain_of(p.channels * p.size), [&](int64_t n) {
    p.runs(n, [&](int64_t entry, int count, int64_t c) {
      kernels<AffineKernels, A>().forward(at(lower, entry, p.bytes), at(upper, entry, p.bytes), p.dtype, s.data() + c, t.data() + c, p.rows(),
                              count, relu, sound, far, at(low, entry, p.bytes), at(high, entry, p.bytes));
    });
  });
}

std::tuple<Tensor, Tensor> interval_affine(Tensor lower, Tensor upper, Tensor scale, Tensor shift, bool relu, bool sound) {
  const Planes p(lower);
  Tensor low = fresh(lower, p.shape), high = fresh(lower, p.shape);
  if (p.dtype == Dtype::f64) forward<double>(p, lower, upper, scale, shift, relu, sound, low, high);
  else forward<float>(p, lower, upper, scale, shift, relu, sound, low, high);
  return {low, high};
}

// Adds a run's entries to the sums of its channels
template <class A>
void add_run(const Planes& p, const A* values, int count, int64_t channel, double* sums) {
  if (p.rows()) {
    for (int i = 0; i < count; ++i) sums[channel + i] += double(values[i]);
    return;
  }
  sums[channel] += kernels<AffineKernels, A>().sum_run(values, count);
}

template <class A>
void write_sums(const Planes& p, const std::vector<double>& sums, double factor, Tensor& out) {
  std::vector<A> total(static_cast<size_t>(p.channels), A(0));
  for (int64_t c = 0; c < p.channels; ++c) {
    double sum = 0;
    for (int64_t n = 0; n < p.batch; ++n) sum += sums[size_t(n * p.channels + c)];
    total[size_t(c)] = A(sum * factor);
  }
  kernels<ConvertKernels, A>().narrow(total.data(), p.channels, dtype_of(out.scalar_type()), out.data_ptr());
}

template <class A>
void backward(const Planes& p, const Tensor& gl, const Tensor& gu, const Tensor& lower, const Tensor& upper, const Tensor& scale,
              const Tensor& low, const Tensor& high, bool relu, Tensor& dl, Tensor& du, Tensor& ds, Tensor& dt) {
  const std::vector<A> s = vector_of<A>(scale);
  std::vector<double> scales(static_cast<size_t>(p.batch * p.channels), 0.0), shifts(scales);
  parallel_items(p.batch, grain_of(p.channels * p.size), [&](int64_t n) {
    A one[TILE], first[TILE], second[TILE];
    p.runs(n, [&](int64_t e, int count, int64_t c) {
      kernels<AffineKernels, A>().gradient(at(gl, e, p.bytes), at(gu, e, p.bytes), at(lower, e, p.bytes), at(upper, e, p.bytes),
                                       at(low, e, p.bytes), at(high, e, p.bytes), p.dtype, spread(p, s, c, count, one), count, relu,
                                       at(dl, e, p.bytes), at(du, e, p.bytes), first, second);
      add_run(p, first, count, c, scales.data() + n * p.channels);
      add_run(p, second, count, c, shifts.data() + n * p.channels);
    });
  });
  write_sums<A>(p, scales, 1.0, ds);
  write_sums<A>(p, shifts, 1.0, dt);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> interval_affine_backward(Tensor gl, Tensor gu, Tensor lower, Tensor upper, Tensor scale, Tensor low,
                                                                    Tensor high, bool relu) {
  const Planes p(lower);
  expect(scale, "scale", {p.channels});
  expect_like(gl, "grad_low", lower), expect_like(gu, "grad_high", lower), expect_like(upper, "upper", lower);
  expect_like(low, "low", lower), expect_like(high, "high", lower);
  Tensor dl = fresh(lower, p.shape), du = fresh(lower, p.shape);
  Tensor ds = fresh(scale, {p.channels}), dt = fresh(scale, {p.channels});
  if (p.dtype == Dtype::f64) backward<double>(p, gl, gu, lower, upper, scale, low, high, relu, dl, du, ds, dt);
  else backward<float>(p, gl, gu, lower, upper, scale, low, high, relu, dl, du, ds, dt);
  return {dl, du, ds, dt};
}

// What is subtracted before sums are taken, so that a large mean cancels nothing: in float64 any entry of a channel of at
// most 32 bits will do, and one pass; a channel of float64 needs its mean, and two.
template <class A>
std::vector<double> shifts_of(const Planes& p, const Tensor& x) {
  std::vector<double> found(size_t(p.channels), 0.0);
  for (int64_t c = 0; c < p.channels; ++c) {
    A first[64];
    kernels<ConvertKernels, A>().widen(at(x, c * p.size, p.bytes), p.dtype, 1, first);
    found[size_t(c)] = std::isfinite(first[0]) ? double(first[0]) : 0.0;
  }
  return found;
}

struct Moments {  // sums over a channel of x - shift and of its square
  std::vector<double> sum, squares;
};

template <class A>
Moments moments(const Planes& p, const Tensor& x, const std::vector<double>& shift) {
  std::vector<double> sums(size_t(p.batch * p.channels), 0.0), squares(sums);
  parallel_items(p.batch, grain_of(p.channels * p.size), [&](int64_t n) {
    double *a = sums.data() + n * p.channels, *b = squares.data() + n * p.channels;
    p.runs(n, [&](int64_t entry, int count, int64_t c) {
      const void* from = at(x, entry, p.bytes);
      if (p.rows()) kernels<AffineKernels, A>().moments_across(from, p.dtype, count, shift.data() + c, a + c, b + c);
      else kernels<AffineKernels, A>().moments(from, p.dtype, count, shift[size_t(c)], a + c, b + c);
    });
  });
  Moments total{std::vector<double>(size_t(p.channels), 0.0), std::vector<double>(size_t(p.channels), 0.0)};
  for (int64_t i = 0; i < p.batch * p.channels; ++i) {
    total.sum[size_t(i % p.channels)] += sums[size_t(i)];
    total.squares[size_t(i % p.channels)] += squares[size_t(i)];
  }
  return total;
}

template <class A>
void statistics(const Planes& p, const Tensor& x, Tensor& mean, Tensor& variance) {
  const double factor = 1.0 / double(p.batch * p.size);
  std::vector<double> shift = shifts_of<A>(p, x);
  Moments found = moments<A>(p, x, shift);
  if constexpr (sizeof(A) == 8) {
    for (size_t c = 0; c < shift.size(); ++c) shift[c] += found.sum[c] * factor;
    found = moments<A>(p, x, shift);
  }
  A *m = static_cast<A*>(mean.data_ptr()), *v = static_cast<A*>(variance.data_ptr());
  for (size_t c = 0; c < shift.size(); ++c) {
    const double off = found.sum[c] * factor, spread = found.squares[c] * factor - off * off;
    m[c] = A(shift[c] + off);
    v[c] = A(spread < 0 ? 0 : spread);
  }
}

std::tuple<Tensor, Tensor> interval_batchnorm_stats(Tensor x) {
  const Planes p(x);
  const ScalarType type = p.dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float;
  Tensor mean = fresh(x, {p.channels}, type), variance = fresh(x, {p.channels}, type);
  if (p.dtype == Dtype::f64) statistics<double>(p, x, mean, variance);
  else statistics<float>(p, x, mean, variance);
  return {mean, variance};
}

template <class A>
void stats_backward(const Planes& p, const Tensor& grad_mean, const Tensor& grad_var, const Tensor& x, const Tensor& mean, Tensor& dx) {
  std::vector<A> g = vector_of<A>(grad_mean), h = vector_of<A>(grad_var);
  const std::vector<A> center = vector_of<A>(mean);
  const A factor = A(1.0 / double(p.batch * p.size));
  for (A& v : g) v *= factor;
  for (A& v : h) v *= 2 * factor;
  parallel_items(p.batch, grain_of(p.channels * p.size), [&](int64_t n) {
    A one[TILE], two[TILE], three[TILE];
    p.runs(n, [&](int64_t e, int count, int64_t c) {
      kernels<AffineKernels, A>().stats_gradient(at(x, e, p.bytes), p.dtype, spread(p, g, c, count, one), spread(p, h, c, count, two),
                                      spread(p, center, c, count, three), count, at(dx, e, p.bytes));
    });
  });
}

Tensor interval_batchnorm_stats_backward(Tensor grad_mean, Tensor grad_var, Tensor x, Tensor mean) {
  const Planes p(x);
  expect(grad_mean, "grad_mean", {p.channels}), expect(grad_var, "grad_variance", {p.channels}), expect(mean, "mean", {p.channels});
  Tensor dx = fresh(x, p.shape);
  if (p.dtype == Dtype::f64) stats_backward<double>(p, grad_mean, grad_var, x, mean, dx);
  else stats_backward<float>(p, grad_mean, grad_var, x, mean, dx);
  return dx;
}

}  // namespace
}  // namespace w2s::interval

W2S_IMPLEMENTATIONS(m) {
  m.add<&w2s::interval::interval_affine>("interval_affine");
  m.add<&w2s::interval::interval_affine_backward>("interval_affine_backward");
  m.add<&w2s::interval::interval_batchnorm_stats>("interval_batchnorm_stats");
  m.add<&w2s::interval::interval_batchnorm_stats_backward>("interval_batchnorm_stats_backward");
}
