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
  g.plan(widest<A>(groups));
  g.sweep(groups);
  return {g.dhiddens, g.dheads, g.dbiases, g.dweights};
}

// rows with a coefficient; the others' gradient is 0
std::vector<int64_t> with_coefficient(const Coefficients& c) {
  const int64_t rows = c.coef_lse.size(0), K = c.ids.size(1);
  const std::vector<double> a = numbers(c.coef_ids);
  std::vector<std::vector<double>> others{numbers(c.coef_lse)};
  for (const Optional& t : {c.coef_log, c.coef_all, c.dense ? c.coef_dense : Optional()})
    if (t) others.push_back(numbers(*t));
  return rows_where(rows, [&](int64_t t) {
    for (const auto& x : others)
      if (x[size_t(t)] != 0) return true;
    for (int64_t k = 0; k < K; ++k)
      if (a[size_t(t * K + k)] != 0) return true;
    return false;
  });
}

Lists linear_loss_backward(LinearArguments linear, Coefficients c, Need need, Optional kept) {
  return with_engine(linear, with_coefficient(c), [&](auto& e) { return run(e, linear, need, c, kept); });
}

}  // namespace
}  // namespace linear
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) { m.add<&w2s::linear::linear_loss_backward>("linear_loss_backward"); }
