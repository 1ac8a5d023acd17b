// Gradients of y = x (s B A + S)^T. Factored, with t = g B: dx = s t A + g S, dA = s t^T x, dB = s g^T h,
// dv = g^T x at the support, ds = sum h o t. Materialized, a panel W_p of 512 rows at a time: dx += g_p W_p,
// dW_p = g_p^T x, dB_p = s dW_p A^T, dA += s B_p^T dW_p, dv from dW_p, ds = sum B_p o dW_p A^T.
#include "cpu/sparse_lowrank/output.h"

namespace w2s::sparse {
namespace {

struct Need {
  bool x, A, B, values, scale;
};
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class A>
struct Backward {
  const Pattern& s;
  Tensor g, x, a, b, values;
  double scale;
  std::optional<Tensor> h;
  Need need;
  int64_t N, r, O, I;
  bool low;
  Output<A> dx, da, db;
  Tensor walked;  // dv in walking order
  double ds = 0;

  Backward(const Pattern& s, const Tensor& g, const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& values, double scale,
           const std::optional<Tensor>& h, Need need)
      : s(s), g(g), x(x), a(a), b(b), values(values), scale(scale), h(h), need(need), N(x.size(0)), r(a.size(0)), O(s.rows), I(s.columns),
        low(by_dots<A>({dtype_of(g), dtype_of(x), dtype_of(a), dtype_of(b), dtype_of(values)})),
        dx(x, shape(need.x, N, I)), da(a, shape(need.A, r, I)), db(b, shape(need.B, O, r)) {
    walked = torch::stable::new_zeros(x, {need.values ? s.nnz : 0}, scalar_type<A>);
  }
  static std::vector<int64_t> shape(bool wanted, int64_t rows, int64_t columns) {
    return wanted ? std::vector<int64_t>{rows, columns} : std::vector<int64_t>{0};
  }
  A* dv() const { return need.values && s.nnz ? static_cast<A*>(walked.data_ptr()) : nullptr; }
  static double dot(const A* p, const A* q, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += double(p[i]) * double(q[i]);
    return sum;
  }

  void factored() {
    const Values<A> v(values, s);
    const Operand left = operand(g), right = operand(x);
    Tensor keep_t, keep_h;
    if (need.x || need.A || need.scale) {
      keep_t = fresh(x, {N, r}, scalar_type<A>);
      product(left, operand(b), Target<A>{static_cast<A*>(keep_t.data_ptr()), r, 1}, 1, false, low);
    }
    if (need.B || need.scale) {
      if (h) keep_h = *h;
      else {
        keep_h = fresh(x, {N, r}, scalar_type<A>);
        product(right, operand(a).t(), Target<A>{static_cast<A*>(keep_h.data_ptr()), r, 1}, 1, false, low);
      }
    }
    if (need.x) product(operand(keep_t), operand(a), Target<A>{dx.sums, I, 1}, scale, false, low);
    if (need.A) product(operand(keep_t).t(), right, Target<A>{da.sums, I, 1}, scale, false, low);
    if (need.B) product(left.t(), operand(keep_h), Target<A>{db.sums, r, 1}, scale, false, low);
    if (need.scale) ds = dot(static_cast<A*>(keep_t.data_ptr()), static_cast<A*>(keep_h.data_ptr()), N * r);
    if (s.nnz && (need.x || need.values))
      multiply_back<A>(s, left, right, v.data, need.x ? dx.sums : nullptr, I, true, dv());
    if (need.values) store_values<A>(s, static_cast<A*>(walked.data_ptr()), dvalues);
  }

  Tensor dvalues, dscale;

  void materialized() {
    const int64_t panel = std::min(TILE, O);
    Tensor keep = fresh(x, {std::max<int64_t>(panel * I, 1)}, scalar_type<A>);
    A* w = static_cast<A*>(keep.data_ptr());
    const Operand left = operand(g), right = operand(x), inner = operand(a), high = operand(b);
    std::vector<A> through(size_t(panel * r));
    if (need.x) std::fill(dx.sums, dx.sums + N * I, A(0));
    if (need.A) std::fill(da.sums, da.sums + r * I, A(0));
    for (int64_t row = 0; row < O; row += panel) {
      const int64_t count = std::min(panel, O - row);
      Operand own = left;
      own.data = static_cast<const char*>(left.data) + row * left.across * bytes_of(left.dtype);
      own.columns = count;
      const Operand made{w, own_dtype<A>, count, I, I, 1};
      if (need.x) {
        form_rows<A>(s, inner, high, scale, values, row, count, w);
        product(own, made, Target<A>{dx.sums, I, 1}, 1, true, low);
      }
      if (!(need.A || need.B || need.values || need.scale)) continue;
      product(own.t(), right, Target<A>{w, I, 1}, 1, false, low);
      if (need.values) pick(row, count, w);
      // two products of dW: rounded once for both, with the factor of it
      std::optional<Low> rounded;
      double factor = scale;
      const bool within = std::abs(scale) > 1e-20 && std::abs(scale) < 1e20;  // of others, dW's rounded values may be lost
      if (low && need.A && (need.B || need.scale) && within) rounded.emplace(made, factor);
      const Operand& dw = rounded ? rounded->x : made;
      if (need.A) product(high.part(row, count).t(), dw, Target<A>{da.sums, I, 1}, factor, true, low);
      if (!(need.B || need.scale)) continue;
      product(dw, inner.t(), Target<A>{through.data(), r, 1}, 1, false, low);
      finish_b(row, count, through.data(), factor, rounded ? 1 / scale : 1);
    }
  }

  void pick(int64_t row, int64_t count, const A* dw) const {
    const Dtype dtype = dtype_of(dvalues);
    void* to = dvalues.data_ptr();
    parallel_ranges(count, s.row_grain(), [&](int64_t begin, int64_t end) {
      kernels<PanelKernels, A>().pick_rows(s, row + begin, end - begin, dw + begin * I, to, dtype);
    });
  }
  // Of dW A^T, with the factors that it still lacks for dB and for ds.
  void finish_b(int64_t row, int64_t count, const A* through, double for_b, double for_scale) {
    if (need.B)
      for (int64_t i = 0; i < count * r; ++i) db.sums[row * r + i] = A(for_b) * through[i];
    if (!need.scale) return;
    const Dtype dtype = dtype_of(b);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < r; ++j) ds += for_scale * double(through[i * r + j]) * double(number_at<A>(b.data_ptr(), dtype, (row + i) * b.stride(0) + j));
  }

  Five run(bool materialize, const std::optional<Tensor>& like_scale) {
    dvalues = fresh(values, {need.values ? s.nnz : 0});
    if (materialize) materialized();
    else factored();
    dx.store(), da.store(), db.store();
    if (like_scale) {
      dscale = need.scale ? fresh(*like_scale, sizes_of(*like_scale)) : fresh(*like_scale, {0});
      const A value = A(ds);
      if (need.scale) narrow(&value, 1, dtype_of(dscale), dscale.data_ptr());
    } else {
      dscale = fresh(x, {0});
    }
    return {dx.tensor, da.tensor, db.tensor, dvalues, dscale};
  }
  static std::vector<int64_t> sizes_of(const Tensor& t) {
    std::vector<int64_t> found;
    for (int64_t i = 0; i < t.dim(); ++i) found.push_back(t.size(i));
    return found;
  }
};

Five backward(Rowwise grad, Rowwise x, Rowwise A, Rowwise B, Tensor values, std::optional<Tensor> scale, double scale_value,
              std::optional<Tensor> h, SupportArguments support, bool materialize, bool need_x, bool need_A, bool need_B, bool need_values,
              bool need_scale) {
  const Pattern s(support);
  const double factor = scale_of(scale, scale_value);
  const int64_t N = x.size(0), r = A.size(0);
  expect(x, "x", {N, s.columns}), expect(A, "A", {r, s.columns}), expect(B, "B", {s.rows, r}), expect(values, "values", {s.nnz});
  expect(grad, "grad", {N, s.rows});
  expect(h, "h", {N, r}, any_double({&x, &A, &B, &values}) ? ScalarType::Double : ScalarType::Float);
  const Need need{need_x, need_A, need_B, need_values, need_scale && scale.has_value()};
  if (any_double({&x, &A, &B, &values}))
    return Backward<double>(s, grad, x, A, B, values, factor, h, need).run(materialize, scale);
  return Backward<float>(s, grad, x, A, B, values, factor, h, need).run(materialize, scale);
}

}  // namespace
}  // namespace w2s::sparse

W2S_IMPLEMENTATIONS(m) { m.add<&w2s::sparse::backward>("sparse_lowrank_backward"); }
