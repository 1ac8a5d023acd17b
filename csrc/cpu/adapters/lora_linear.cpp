// y = gain (x W^T + scale x' A^T B^T) + bias and its gradients.
//
// h = A x'^T [r, N] lies across, so that r, not N, is what the products with few rows are few of: they read x, W's gradient
// and grad in place. Sums of a dtype of their own go to y at once; else CHUNK rows of them exist at a time.
// Floor: 2 N O I FLOPs forward and 2 N O I backward (W frozen), 10 N r (I + O) for the adapter; weights, x and y once.
#include "cpu/adapters/lora_linear.h"

#include "cpu/convert.h"
#include "cpu/output.h"
#include "cpu/products.h"

namespace w2s {
namespace {

constexpr int64_t CHUNK = 512;

template <class A>
Operand across(const A* h, int64_t r, int64_t N, int64_t first, int64_t rows) {  // rows of h^T
  return {h + first, own_dtype<A>, rows, r, 1, N};
}

// work(first row, rows, the rows) for all rows of m, many of them as A in parts: the thin products of the factors read those in
// place, and would pack rows of another dtype. Zen 4, two threads, A x^T of 2048 x 1024 bfloat16: 0.72 ms packed, 0.33 in place.
template <class A, class F>
void in_wide_parts(const Tensor& like, const Operand& m, const F& work) {
  if (m.dtype == own_dtype<A> || m.rows <= FEW || m.across != 1) return work(0, m.rows, m);
  CallMemory memory{like, {}};
  A* wide = memory.get<A>(std::min(CHUNK, m.rows) * m.columns);
  for (int64_t n = 0; n < m.rows; n += CHUNK) {
    const Operand part = m.part(n, std::min(CHUNK, m.rows - n));
    const char* from = static_cast<const char*>(part.data);
    parallel_items(part.rows, grain_of(m.columns), [&](int64_t i) {
      kernels<ConvertKernels, A>().widen(from + i * m.down * bytes_of(m.dtype), m.dtype, m.columns, wide + i * m.columns);
    });
    work(n, part.rows, Operand{wide, own_dtype<A>, part.rows, m.columns, m.columns, 1});
  }
}

// factor times m [r, columns], or m^T [columns, r], in panels as LoraFinish takes them
template <class A>
const A* panels(CallMemory& memory, const Tensor& m, bool turned, A factor) {
  const int64_t r = m.size(turned ? 1 : 0), columns = m.size(turned ? 0 : 1);
  const Rows rows(m);
  A* found = memory.get<A>(round_up(columns, LORA_PANEL) * r);
  const auto at = [&](int64_t k, int64_t c) { return found + (c / LORA_PANEL * r + k) * LORA_PANEL + c % LORA_PANEL; };
  if (r && columns % LORA_PANEL) std::fill(at(0, columns / LORA_PANEL * LORA_PANEL), found + round_up(columns, LORA_PANEL) * r, A(0));
  if (turned) {
    std::vector<A> line(size_t(r), A(0));
    for (int64_t c = 0; c < columns; ++c) {
      kernels<ConvertKernels, A>().widen_scaled(rows.at(c, 0), rows.dtype, r, factor, line.data());
      for (int64_t k = 0; k < r; ++k) *at(k, c) = line[size_t(k)];
    }
  } else {
    for (int64_t k = 0; k < r; ++k)
      for (int64_t c = 0; c < columns; c += LORA_PANEL)
        kernels<ConvertKernels, A>().widen_scaled(rows.at(k, c), rows.dtype, std::min(LORA_PANEL, columns - c), factor, at(k, c));
  }
  return found;
}

// out [N, columns] = gain (a b + h^T low) + bias, low the factor times m or m^T; what the gain multiplies in `kept` as well,
// unless that is empty. h [r, N]. Of few rows the low product goes by the same way as a b, of many it joins the last pass.
template <class A>
void sum_into(const Tensor& out, const Tensor& kept, const Operand& a, const Operand& b, const A* h, const Tensor& m, bool turned, A factor,
              const A* gain, const A* bias) {
  const int64_t N = out.size(0), columns = out.size(1), r = m.size(turned ? 1 : 0);
  const bool own = is_own<A>(out), keep = kept.numel() > 0, few = N <= FEW, pass = gain || bias;
  const Tensor& base = keep ? kept : out;
  CallMemory memory{out, {}};
  const A* low = few || !r ? nullptr : panels(memory, m, turned, factor);
  const auto finish = [&](Rows sums, int64_t first, int64_t rows) {
    const auto part = [&](const Tensor& t) {
      Rows found(t);
      found.data += first * found.stride;
      return found;
    };
    if (low || pass || keep || !own)
      kernels<LoraKernels, A>().finish({rows, columns, low ? r : 0, sums, gain, bias, h + first, N, low, part(out), keep ? part(kept) : Rows()});
  };
  if (!own && !few && gemm_library_bf16(a, b, base.data_ptr())) return finish(Rows(base), 0, N);
  const int64_t chunk = own ? std::max<int64_t>(N, 1) : CHUNK;
  A* sums = own ? static_cast<A*>(base.data_ptr()) : memory.get<A>(std::min(chunk, N) * columns);
  for (int64_t n = 0; n < N; n += chunk) {
    const int64_t rows = std::min(chunk, N - n);
    const Target<A> to{sums, columns, 1};
    multiply(a.part(n, rows), b, to);
    if (!low) gemm(across(h, r, N, n, rows), turned ? matrix(m).t() : matrix(m), to, factor, true);
    Rows from;
    from.data = reinterpret_cast<char*>(sums), from.stride = columns * int64_t(sizeof(A)), from.bytes = sizeof(A), from.dtype = own_dtype<A>;
    finish(from, n, rows);
  }
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
  in_wide_parts<A>(x, matrix(dropped ? static_cast<const Tensor&>(*dropped) : x), [&](int64_t n, int64_t, const Operand& rows) {
    gemm(matrix(a), rows.t(), Target<A>{hidden + n, N, 1}, A(1), false);
  });
  const std::vector<A> factors = widened<A>(gain), shift = widened<A>(bias);
  sum_into(y, z, matrix(x), matrix(weight).t(), hidden, b, true, A(scale), gain ? factors.data() : nullptr, bias ? shift.data() : nullptr);
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
  const bool need_t = need.x || need.dropped || need.A;
  A* t = need_t ? memory.get<A>(r * N) : nullptr;           // [r, N]
  A* turned = need.B ? memory.get<A>(r * O) : nullptr;      // dB [r, O]: its few rows are rows of h
  if (need_t || need.B)
    in_wide_parts<A>(x, g, [&](int64_t n, int64_t count, const Operand& rows) {
      if (need_t) gemm(matrix(b).t(), rows.t(), Target<A>{t + n, N, 1}, A(1), false);
      if (need.B) gemm(across(static_cast<const A*>(h.data_ptr()), r, N, n, count).t(), rows, Target<A>{turned, O, 1}, A(scale), n > 0);
    });
  Tensor dx = none, ddropped = none, dweight = none, da = none, db = none;
  if (need.x) {
    dx = fresh(x, {N, I});
    const Tensor no_factor = fresh(a, {0, I});  // behind a dropout the factors' part is not x's
    sum_into<A>(dx, none, g, matrix(weight), t, dropped ? no_factor : a, false, A(scale), nullptr, nullptr);
  }
  if (need.dropped) ddropped = rounded<A>(low_input, N, I, across(t, r, N, 0, N), matrix(a), scale);
  if (need.weight) {
    Output<A> out(weight, {O, I});
    multiply(g.t(), matrix(x), Target<A>{out.sums, I, 1});
    out.store();
    dweight = out.tensor;
  }
  if (need.A) {
    Output<A> out(a, {r, I});
    in_wide_parts<A>(x, low, [&](int64_t n, int64_t count, const Operand& rows) {
      gemm(across(t, r, N, n, count).t(), rows, Target<A>{out.sums, I, 1}, A(scale), n > 0);
    });
    out.store();
    da = out.tensor;
  }
  if (need.B) {
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
