#include "cpu/linear_loss/gradient.h"

// The gradient of any loss over a vocabulary from coefficients of its rows, the logits computed again.
namespace w2s {
namespace linear {
namespace {

using Lists = std::tuple<Tensors, Tensors, Tensors, Tensor>;
using Optional = std::optional<Tensor>;

struct Coefficients {
  Tensor lse, ids, coef_ids, coef_lse;
  Optional coef_log, coef_all, dense, coef_dense, classes;
  static constexpr int arguments = 9;
};

template <class A>
Lists run(Engine<A>& e, const LinearArguments& linear, Need need, const Coefficients& c, const Optional& kept) {
  Gradients<A> g(e, linear, need);
  g.lse = SoftTarget<A>::rows(e, c.lse);
  g.b = SoftTarget<A>::rows(e, c.coef_lse);
  if (c.coef_log) g.c = SoftTarget<A>::rows(e, *c.coef_log);
  g.q = SoftTarget<A>(e, c.ids, c.coef_ids, c.coef_all, c.dense, c.coef_dense, c.classes);
  g.kept = found_logits(e, kept);
  const auto groups = blocks(e);
  g.plan(groups);
  g.sweep(groups);
  return {g.dhiddens, g.dheads, g.dbiases, g.dweights};
}

// rows with a coefficient; the others' gradient is 0
std::vector<int64_t> with_coefficient(const Coefficients& c, int64_t T, int64_t V, ScalarType sums) {
  check(c.ids.dim() == 2, "ids must have two dimensions");
  const int64_t K = c.ids.size(1);
  expect(c.lse, "lse", {T}, sums), expect(c.ids, "ids", {T, K}), expect(c.coef_ids, "coef_ids", {T, K});
  expect(c.coef_lse, "coef_lse", {T}), expect(c.coef_log, "coef_log", {T}), expect(c.coef_all, "coef_all", {T});
  expect(c.dense, "dense", {T, V}), expect(c.coef_dense, "coef_dense", {T}), expect(c.classes, "classes", {V});
  const std::vector<double> a = numbers(c.coef_ids);
  std::vector<std::vector<double>> others{numbers(c.coef_lse)};
  for (const Optional& t : {c.coef_log, c.coef_all, c.dense ? c.coef_dense : Optional()})
    if (t) others.push_back(numbers(*t));
  return rows_where(T, [&](int64_t t) {
    for (const auto& x : others)
      if (x[size_t(t)] != 0) return true;
    for (int64_t k = 0; k < K; ++k)
      if (a[size_t(t * K + k)] != 0) return true;
    return false;
  });
}

Lists linear_loss_backward(LinearArguments linear, Coefficients c, Need need, Optional kept) {
  return with_engine(linear, with_coefficient(c, linear.rows(), linear.vocab_size, wide_type(linear.f64())), [&](auto& e) { return run(e, linear, need, c, kept); });
}

}  // namespace
}  // namespace linear
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) { m.add<&w2s::linear::linear_loss_backward>("linear_loss_backward"); }
