#include "cpu/linear_loss/gradient.h"

// The gradient of any loss over a vocabulary from coefficients of its rows, the logits computed again.
namespace w2s {
namespace linear {
namespace {

using Lists = std::tuple<Tensors, Tensors, Tensors, Tensor>;
using Optional = std::optional<Tensor>;

#define W2S_COEFFICIENTS                                                                                                 \
  Tensor lse, Tensor ids, Tensor coef_ids, Tensor coef_lse, Optional coef_log, Optional coef_all, Optional dense, \
      Optional coef_dense, Optional classes

template <class A>
Lists run(Engine<A>& e, const Tensors& heads, const Tensors& biases, Need need, W2S_COEFFICIENTS) {
  Gradients<A> g(e, heads, biases, need);
  g.lse = Target<A>::rows(e, lse);
  g.b = Target<A>::rows(e, coef_lse);
  if (coef_log) g.c = Target<A>::rows(e, *coef_log);
  g.q = Target<A>(e, ids, coef_ids, coef_all, dense, coef_dense, classes);
  const auto groups = blocks(e);
  g.plan(widest<A>(groups));
  g.sweep(groups);
  return {g.dhiddens, g.dheads, g.dbiases, g.dweights};
}

// rows with a coefficient; the others' gradient is 0
std::vector<int64_t> with_coefficient(W2S_COEFFICIENTS) {
  const int64_t rows = coef_lse.size(0), K = ids.size(1);
  const std::vector<double> a = numbers(coef_ids);
  std::vector<std::vector<double>> others{numbers(coef_lse)};
  for (const Optional& t : {coef_log, coef_all, dense ? coef_dense : Optional()})
    if (t) others.push_back(numbers(*t));
  return rows_where(rows, [&](int64_t t) {
    for (const auto& x : others)
      if (x[size_t(t)] != 0) return true;
    for (int64_t k = 0; k < K; ++k)
      if (a[size_t(t * K + k)] != 0) return true;
    return false;
  });
}

Lists linear_loss_backward(W2S_LINEAR_PARAMETERS, W2S_COEFFICIENTS, W2S_NEED_PARAMETERS) {
#define W2S_GIVEN lse, ids, coef_ids, coef_lse, coef_log, coef_all, dense, coef_dense, classes
  const std::vector<int64_t> rows = with_coefficient(W2S_GIVEN);
  if (wants_double(hiddens, heads)) {
    Engine<double> e(W2S_LINEAR_ARGUMENTS, rows);
    return run(e, heads, biases, W2S_NEED, W2S_GIVEN);
  }
  Engine<float> e(W2S_LINEAR_ARGUMENTS, rows);
  return run(e, heads, biases, W2S_NEED, W2S_GIVEN);
}

}  // namespace
}  // namespace linear
}  // namespace w2s

STABLE_TORCH_LIBRARY_IMPL(w2s_fast, CPU, m) { m.impl("linear_loss_backward", W2S_BOX(&w2s::linear::linear_loss_backward)); }
