// y = gain (x W^T + scale x' A^T B^T) + bias and its gradients.
//
// h = A x'^T [r, N] lies across, so that r, not N, is what the products with few rows are few of: they read x, W's gradient
// and grad in place. Sums of a dtype of their own go to y at once; else CHUNK rows of them exist at a time.
// Floor: 2 N O I FLOPs forward and 2 N O I backward (W frozen), 10 N r (I + O) for the adapter; weights, x and y once.
#include "cpu/adapters/lora_linear.h"

#include "cpu/output.h"
#include "cpu/products.h"

namespace w2s {
namespace {

constexpr int64_t CHUNK = 512;

// work(first row, rows, sums [rows, columns]) for chunks of a result's rows, whose sums are then rounded into it.
template <class A, class F>
void by_chunks(const Tensor& out, const F& work) {
  const int64_t N = out.size(0), columns = out.size(1);
  const bool own = is_own<A>(out);
  const int64_t chunk = own ? std::max<int64_t>(N, 1) : CHUNK;
  CallMemory memory{out, {}};
  A* sums = own ? static_cast<A*>(out.data_ptr()) : memory.get<A>(std::min(chunk, N) * columns);
  for (int64_t n = 0; n < N; n += chunk) {
    const int64_t rows = std::min(chunk, N - n);
    work(n, rows, sums);
    if (!own) narrow_into(sums, rows * columns, out, n * columns);
  }
}

template <class A>
Operand across(const A* h, int64_t r, int64_t N, int64_t first, int64_t rows) {  // rows of h^T
  return {h + first, own_dtype<A>, rows, r, 1, N};
}

using Optional = std::optional<Tensor>;
using OptionalRows = std::optional<Rowwise>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class A>
Three forward_as(const Tensor& x, const OptionalRows& dropped, const Tensor& weight, const Tensor& a, const Tensor& b, const Optional& bias,
                 const Optional& gain, double scale, bool need_z, bool need_h) {
  const int64_t N = x.size(0), O = weight.size(0), r = a.size(0);
  Tensor y = fresh(x, {N, O}), z = need_z ? fresh(x, {N, O}) : fresh(x, {0}), h = fresh(x, {r, N}, scalar_type<A>);
  A* hidden = static_cast<A*>(h.data_ptr());
  gemm(matrix(a), matrix(dropped ? static_cast<const Tensor&>(*dropped) : x).t(), Target<A>{hidden, N, 1}, A(1), false);
  const std::vector<A> factors = widened<A>(gain), shift = widened<A>(bias);
  const bool own = is_own<A>(y), plain = own && !gain && !bias;
  const int64_t chunk = own ? std::max<int64_t>(N, 1) : CHUNK;
  CallMemory memory{x, {}};
  A* sums = own ? static_cast<A*>((need_z ? z : y).data_ptr()) : memory.get<A>(std::min(chunk, N) * O);
  for (int64_t n = 0; n < N; n += chunk) {
    const int64_t rows = std::min(chunk, N - n);
    const Target<A> to{sums, O, 1};
    multiply(matrix(x).part(n, rows), matrix(weight).t(), to);
    gemm(across(hidden, r, N, n, rows), matrix(b).t(), to, A(scale), true);
    if (plain) continue;
    const auto part = [&](const Tensor& t) {
      Rows found(t);
      found.data += n * found.stride;
      return found;
    };
    const LoraFinish s{rows, O, sums, gain ? factors.data() : nullptr, bias ? shift.data() : nullptr, part(y),
                       need_z && !own ? part(z) : Rows()};
    kernels<LoraKernels, A>().finish(s);
  }
  return {y, z, need_h ? h : fresh(x, {0}, scalar_type<A>)};
}

Three lora_linear(Rowwise x, OptionalRows dropped, Rowwise weight, Rowwise A, Rowwise B, Optional bias, Optional gain, double scale,
                  bool need_z, bool need_h) {
  const int64_t N = x.size(0), I = x.size(1), O = weight.size(0), r = A.size(0);
  expect(weight, "weight", {O, I}), expect(A, "A", {r, I}), expect(B, "B", {O, r}), expect(bias, "bias", {O}), expect(gain, "gain", {O});
  if (dropped) expect(*dropped, "dropped", {N, I});
  const bool f64 = any_double({&x, &weight, &A, &B}) || (dropped && is_double(*dropped));
  return with_type(f64, [&](auto zero) {
    return forward_as<decltype(zero)>(x, dropped, weight, A, B, bias, gain, scale, need_z, need_h);
  });
}

struct LoraNeed {
  bool x, dropped, weight, A, B, gain;
};

template <class A>
Tensor rounded(const Tensor& like, int64_t rows, int64_t columns, const Operand& a, const Operand& b, double scale) {
  Output<A> out(like, {rows, columns});
  gemm(a, b, Target<A>{out.sums, columns, 1}, A(scale), false);
  out.store();
  return out.tensor;
}

template <class A>
Six backward_as(const Tensor& grad, const Tensor& x, const OptionalRows& dropped, const Tensor& weight, const Tensor& a, const Tensor& b,
                const Optional& gain, double scale, const Tensor& z, const Tensor& h, LoraNeed need) {
  const int64_t N = x.size(0), I = x.size(1), O = weight.size(0), r = a.size(0);
  const Tensor none = fresh(x, {0}), low_input = dropped ? static_cast<const Tensor&>(*dropped) : x;
  Tensor scaled = grad, dgain = none;
  if (gain) {
    const std::vector<A> factors = widened<A>(gain);
    std::vector<double> sums(size_t(O), 0.0);
    scaled = fresh(grad, {N, O});
    kernels<LoraKernels, A>().gain({N, O, Rows(grad), need.gain ? Rows(z) : Rows(), Rows(scaled), factors.data(), sums.data()});
    if (need.gain) dgain = narrowed(sums, *gain);
  }
  const Operand g = matrix(scaled), low = matrix(low_input);
  CallMemory memory{x, {}};
  A* t = nullptr;  // [r, N]
  if (need.x || need.dropped || need.A) {
    t = memory.get<A>(r * N);
    gemm(matrix(b).t(), g.t(), Target<A>{t, N, 1}, A(1), false);
  }
  Tensor dx = none, ddropped = none, dweight = none, da = none, db = none;
  if (need.x) {
    dx = fresh(x, {N, I});
    by_chunks<A>(dx, [&](int64_t n, int64_t rows, A* sums) {
      multiply(g.part(n, rows), matrix(weight), Target<A>{sums, I, 1});
      if (!dropped) gemm(across(t, r, N, n, rows), matrix(a), Target<A>{sums, I, 1}, A(scale), true);
    });
  }
  if (need.dropped) ddropped = rounded<A>(low_input, N, I, across(t, r, N, 0, N), matrix(a), scale);
  if (need.weight) {
    Output<A> out(weight, {O, I});
    multiply(g.t(), matrix(x), Target<A>{out.sums, I, 1});
    out.store();
    dweight = out.tensor;
  }
  if (need.A) da = rounded<A>(a, r, I, {t, own_dtype<A>, r, N, N, 1}, low, scale);
  if (need.B) {  // [r, O], turned: its few rows are rows of h
    A* turned = memory.get<A>(r * O);
    gemm({h.data_ptr(), own_dtype<A>, r, N, N, 1}, g, Target<A>{turned, O, 1}, A(scale), false);
    Output<A> out(b, {O, r});
    for (int64_t o = 0; o < O; ++o)
      for (int64_t k = 0; k < r; ++k) out.sums[o * r + k] = turned[k * O + o];
    out.store();
    db = out.tensor;
  }
  return {dx, ddropped, dweight, da, db, dgain};
}

Six lora_linear_backward(Rowwise grad, Rowwise x, OptionalRows dropped, Rowwise weight, Rowwise A, Rowwise B, Optional gain, double scale,
                         Tensor z, Tensor h, bool need_x, bool need_dropped, bool need_weight, bool need_A, bool need_B, bool need_gain) {
  const int64_t N = x.size(0), I = x.size(1), O = weight.size(0), r = A.size(0);
  const bool f64 = any_double({&x, &weight, &A, &B}) || (dropped && is_double(*dropped));
  expect(weight, "weight", {O, I}), expect(A, "A", {r, I}), expect(B, "B", {O, r}), expect(gain, "gain", {O});
  expect(grad, "grad", {N, O}, x.scalar_type());
  if (dropped) expect(*dropped, "dropped", {N, I});
  if (need_gain && gain) expect(z, "z", {N, O}, x.scalar_type());
  if (need_B) expect(h, "h", {r, N}, wide_type(f64));
  const LoraNeed need{need_x, need_dropped && dropped, need_weight, need_A, need_B, need_gain && gain};
  return with_type(f64, [&](auto zero) {
    return backward_as<decltype(zero)>(grad, x, dropped, weight, A, B, gain, scale, z, h, need);
  });
}

}  // namespace
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) {
  m.add<&w2s::lora_linear>("lora_linear");
  m.add<&w2s::lora_linear_backward>("lora_linear_backward");
}
