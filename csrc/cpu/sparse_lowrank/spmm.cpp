// spmm and sddmm: the sparse products alone; see products.cpp.
#include "cpu/sparse_lowrank/output.h"

namespace w2s::sparse {
namespace {

template <class A>
Tensor spmm_as(const Tensor& x, const Tensor& values, const Pattern& s, bool transpose) {
  const Values<A> v(values, s);
  Output<A> y(x, {x.size(0), transpose ? s.columns : s.rows});
  if (transpose) multiply_back<A>(s, operand(x), operand(x), v.data, y.sums, s.columns, false, nullptr);
  else multiply<A>(s, operand(x), v.data, nullptr, y.sums, s.rows, false);
  y.store();
  return y.tensor;
}

Tensor spmm(Rowwise x, Tensor values, SupportArguments support, bool transpose) {
  const Pattern s(support);
  return any_double({&x, &values}) ? spmm_as<double>(x, values, s, transpose) : spmm_as<float>(x, values, s, transpose);
}

template <class A>
Tensor sddmm_as(const Tensor& g, const Tensor& x, const Pattern& s) {
  const ScalarType a = g.scalar_type(), b = x.scalar_type();
  const ScalarType type = a == b ? a : sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;  // torch.promote_types
  Tensor out = fresh(x, {s.nnz}, type), sums = torch::stable::new_zeros(x, {s.nnz}, scalar_type<A>);
  A* dv = static_cast<A*>(sums.data_ptr());
  multiply_back<A>(s, operand(g), operand(x), nullptr, nullptr, 0, false, dv);
  store_values<A>(s, dv, out);
  return out;
}

Tensor sddmm(Rowwise g, Rowwise x, SupportArguments support) {
  const Pattern s(support);
  return any_double({&g, &x}) ? sddmm_as<double>(g, x, s) : sddmm_as<float>(g, x, s);
}

}  // namespace
}  // namespace w2s::sparse

W2S_IMPLEMENTATIONS(m) {
  m.add<&w2s::sparse::spmm>("spmm");
  m.add<&w2s::sparse::sddmm>("sddmm");
}
