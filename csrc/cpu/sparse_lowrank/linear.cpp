// y = x (s B A + S)^T + bias and W itself.
//
// Factored: h = x A^T, y = s h B^T by gemm, then x S^T is added panel by panel. Materialized: W in panels of 512 rows,
// each multiplied while it is in cache. Up to 8 tokens: decode.cpp. FLOPs: 2 N r (I + O) + 2 N K, against 2 r O I + 2 N O I.
#include "cpu/sparse_lowrank/decode.h"
#include "cpu/sparse_lowrank/output.h"

namespace w2s::sparse {
namespace {

constexpr int64_t CHUNK = 512;  // tokens whose sums exist at a time where y is narrower than they are

template <class A>
void add_bias(const std::vector<A>& bias, int64_t rows, A* y) {
  const int64_t O = int64_t(bias.size());
  if (O == 0) return;
  parallel_items(rows, 16, [&](int64_t n) {
    for (int64_t o = 0; o < O; ++o) y[n * O + o] += bias[size_t(o)];
  });
}

// y[rows, O] of x's rows, factored; h [rows, r] is filled
template <class A>
void factored(const Pattern& s, const Operand& x, const Operand& a, const Operand& b, double scale, const A* values,
              const std::vector<A>& bias, A* h, A* y) {
  const int64_t r = a.rows, O = s.rows;
  const bool low = by_dots<A>({x.dtype, a.dtype, b.dtype});
  product(x, a.t(), Target<A>{h, r, 1}, 1, false, low);
  const Operand left{h, own_dtype<A>, x.rows, r, r, 1};
  product(left, b.t(), Target<A>{y, O, 1}, scale, false, low);
  if (s.nnz) return multiply<A>(s, x, values, bias.empty() ? nullptr : bias.data(), y, O, true);
  add_bias(bias, x.rows, y);
}

template <class A>
Tensor materialized(const Pattern& s, const Tensor& x, const Operand& a, const Operand& b, double scale, const Tensor& values,
                    const std::vector<A>& bias) {
  const int64_t N = x.size(0), panel = std::min(TILE, s.rows);
  const bool low = by_dots<A>({dtype_of(x), a.dtype, b.dtype, dtype_of(values)});
  Output<A> y(x, {N, s.rows});
  Tensor keep = fresh(x, {std::max<int64_t>(panel * s.columns, 1)}, scalar_type<A>);
  A* w = static_cast<A*>(keep.data_ptr());
  for (int64_t row = 0; row < s.rows && N; row += panel) {
    const int64_t count = std::min(panel, s.rows - row);
    form_rows<A>(s, a, b, scale, values, row, count, w);
    const Operand right{w, own_dtype<A>, s.columns, count, 1, s.columns};
    product(operand(x), right, Target<A>{y.sums + row, s.rows, 1}, 1, false, low);
  }
  add_bias(bias, N, y.sums);
  y.store();
  return y.tensor;
}

using Two = std::tuple<Tensor, Tensor>;

template <class A>
Two linear_as(const Tensor& x, const Tensor& A_, const Tensor& B, const Tensor& values, double scale, const std::optional<Tensor>& bias,
              const Pattern& s, bool materialize, bool need_h) {
  const int64_t N = x.size(0), r = A_.size(0);
  const Operand a = operand(A_), b = operand(B);
  const std::vector<A> shift = widened<A>(bias);
  const Tensor none = fresh(x, {0}, scalar_type<A>);
  if (materialize) return {materialized<A>(s, x, a, b, scale, values, shift), none};
  if (N <= DECODE && N > 0) {
    Tensor h = need_h ? fresh(x, {N, r}, scalar_type<A>) : none;
    Tensor y = fresh(x, {N, s.rows});
    const A* sums = decode<A>(s, operand(x), a, b, scale, values, shift, need_h ? static_cast<A*>(h.data_ptr()) : nullptr);
    kernels<ConvertKernels, A>().narrow(sums, N * s.rows, dtype_of(y), y.data_ptr());
    return {y, h};
  }
  const Values<A> v(values, s);
  Tensor h = fresh(x, {N, r}, scalar_type<A>);
  A* ph = static_cast<A*>(h.data_ptr());
  Tensor y = fresh(x, {N, s.rows});
  const bool own = is_own<A>(y);
  const int64_t chunk = own ? std::max<int64_t>(N, 1) : CHUNK;
  Tensor keep = own ? y : fresh(x, {std::min(chunk, N), s.rows}, scalar_type<A>);
  for (int64_t n = 0; n < N; n += chunk) {
    const int64_t count = std::min(chunk, N - n);
    A* sums = static_cast<A*>(keep.data_ptr());
    factored<A>(s, operand(x).part(n, count), a, b, scale, v.data, shift, ph + n * r, sums);
    if (!own) narrow_into(sums, count * s.rows, y, n * s.rows);
  }
  return {y, need_h ? h : none};
}

Two linear(Rowwise x, Rowwise A, Rowwise B, Tensor values, std::optional<Tensor> scale, double scale_value, std::optional<Tensor> bias,
           SupportArguments support, bool materialize, bool need_h) {
  const Pattern s(support);
  const double factor = scale_of(scale, scale_value);
  if (any_double({&x, &A, &B, &values})) return linear_as<double>(x, A, B, values, factor, bias, s, materialize, need_h);
  return linear_as<float>(x, A, B, values, factor, bias, s, materialize, need_h);
}

template <class A>
Tensor materialize_as(const Tensor& A_, const Tensor& B, const Tensor& values, double scale, const Pattern& s, ScalarType type) {
  Tensor w = fresh(B, {s.rows, s.columns}, type);
  const bool own = is_own<A>(w);
  // W at once where it is made in place: B A in panels packs A again for each, which costs more than the values' way to L3;
  // else equal panels, as a product of a few last rows is another kind of product, and a slow one
  const int64_t panel = own ? std::max<int64_t>(s.rows, 1) : pieces(s.rows, std::max<int64_t>(pieces(s.rows, TILE), 1));
  Tensor keep = own ? w : fresh(B, {panel, s.columns}, scalar_type<A>);
  for (int64_t row = 0; row < s.rows; row += panel) {
    const int64_t count = std::min(panel, s.rows - row);
    A* sums = static_cast<A*>(keep.data_ptr()) + (own ? row * s.columns : 0);
    form_rows<A>(s, operand(A_), operand(B), scale, values, row, count, sums);
    if (!own) narrow_into(sums, count * s.columns, w, row * s.columns);
  }
  return w;
}

Tensor materialize(Rowwise A, Rowwise B, Tensor values, std::optional<Tensor> scale, double scale_value, SupportArguments support,
                   ScalarType out_dtype) {
  const Pattern s(support);
  const double factor = scale_of(scale, scale_value);
  if (any_double({&A, &B, &values})) return materialize_as<double>(A, B, values, factor, s, out_dtype);
  return materialize_as<float>(A, B, values, factor, s, out_dtype);
}

}  // namespace
}  // namespace w2s::sparse

W2S_IMPLEMENTATIONS(m) {
  m.add<&w2s::sparse::linear>("sparse_lowrank_linear");
  m.add<&w2s::sparse::materialize>("sparse_lowrank_materialize");
}
