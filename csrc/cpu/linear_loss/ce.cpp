#include "cpu/linear_loss/gradient.h"

// Cross-entropy with the target q of `SoftTarget`: row_t = s_t (Q_t lse_t - sum_v q_tv z_tv + z_loss lse_t^2), Q_t = sum_v q_tv,
// and loss = sum_t weight_t row_t; s_t is 1, or the probability of the target, held fixed. Its coefficients are known after the first sweep, so gradients are made at once: three
// products in all, as long as the logits fit into the memory of dW.
namespace w2s {
namespace linear {
namespace {

using Optional = std::optional<Tensor>;
using Loss = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensors, Tensors, Tensors, Tensor>;

struct Wanted {
  double z_loss;
  bool scaled, entropy, best, kept;
};

template <class A>
Loss run(Engine<A>& e, const LinearArguments& linear, Need need, SoftTarget<A> target, const Tensor& weight,
         Wanted wanted) {
  Gradients<A> g(e, linear, need);
  const bool any = need.hiddens || need.heads || need.biases || need.weights;
  const auto groups = any ? stashed(e, need) : blocks(e);
  Tensor kept = kept_logits(e, wanted.kept);
  A* keep = wanted.kept ? static_cast<A*>(kept.data_ptr()) : nullptr;
  g.plan(widest<A>(groups), groups.size());
  if (!keep) g.keep_beside(groups);
  Statistics<A> s(e, nullptr);
  s.want(wanted.entropy, wanted.best);
  Agreement<A> at(e, target);
  first_sweep(e, g, groups, keep, [&](int64_t r0, int64_t rows, A* z, int64_t ld) {
    s.add(r0, rows, z, ld);
    at.add(r0, rows, z, ld);
  });
  std::vector<A> w = SoftTarget<A>::rows(e, weight);
  std::vector<double> row(size_t(e.Mp)), logp(size_t(e.Mp));
  double total = 0;
  for (int64_t m = 0; m < e.M; ++m) {
    const double lse = s.lse(m), mass = at.ids_mass(m, true) + at.all_mass(m) + at.dense_mass(m, true);
    const double core = at.ids_mass(m, false) + at.dense_mass(m, false);
    logp[size_t(m)] = core == 0 ? 0.0 : (at.ids_sum(m, false) + at.dense_sum(m, false)) / core - lse;
    row[size_t(m)] = mass * lse - at.ids_sum(m, true) - at.all_sum(m) - at.dense_sum(m, true) + wanted.z_loss * lse * lse;
    double weight_m = double(w[size_t(m)]);
    if (wanted.scaled) {
      const double p = std::exp(logp[size_t(m)]);
      row[size_t(m)] *= p;
      if (weight_m != 0) total += weight_m * row[size_t(m)], weight_m *= p;
      w[size_t(m)] = A(weight_m);
    } else if (weight_m != 0) {
      total += weight_m * row[size_t(m)];
    }
    g.lse[size_t(m)] = A(lse);
    // what rounding lse takes from a whole row of exp(z - lse)
    const double rounded = std::isfinite(lse) ? std::exp(double(A(lse)) - lse) : 1.0;
    g.b[size_t(m)] = A(weight_m * (mass + 2 * wanted.z_loss * lse) * rounded);
  }
  Tensor loss = e.output({});
  *static_cast<A*>(loss.data_ptr()) = A(total);
  Loss found{loss,
             scattered(e, [&](int64_t m) { return row[size_t(m)]; }),
             scattered(e, [&](int64_t m) { return logp[size_t(m)]; }),
             scattered(e, [&](int64_t m) { return s.lse(m); }),
             e.output({0}),
             fresh(e.hiddens[0], {wanted.best ? e.T : 0}, ScalarType::Long),
             e.output({0}),
             kept, {}, {}, {}, g.dweights};
  if (wanted.entropy)
    std::get<4>(found) = scattered(e, [&](int64_t m) { return std::log(s.sum[size_t(m)]) - s.spread[size_t(m)] / s.sum[size_t(m)]; });
  if (wanted.best) {
    std::get<6>(found) = scattered(e, [&](int64_t m) { return 1 / s.sum[size_t(m)]; });
    int64_t* best = static_cast<int64_t*>(std::get<5>(found).data_ptr());
    std::fill(best, best + e.T, 0);
    for (int64_t m = 0; m < e.M; ++m) best[e.index[size_t(m)]] = s.best[size_t(m)];
  }
  if (any) {
    target.weigh();
    for (int64_t m = 0; m < e.M; ++m) target.scale(m, -w[size_t(m)]);
    g.q = std::move(target);
    g.sweep(groups);
  }
  std::get<8>(found) = g.dhiddens;
  std::get<9>(found) = g.dheads;
  std::get<10>(found) = g.dbiases;
  return found;
}

Loss linear_ce(LinearArguments linear, Tensor keep, Tensor ids, Tensor probs, Optional uniform, std::optional<Rowwise> dense, Optional classes,
               Tensor weight, double z_loss, bool scaled, bool need_entropy, bool need_best, bool need_kept, Need need) {
  const bool* counts = integers<bool>(keep);
  const std::vector<int64_t> rows = rows_where(linear.rows(), [&](int64_t t) { return counts[t]; });
  const Wanted wanted{z_loss, scaled, need_entropy, need_best, need_kept};
  return with_engine(linear, rows, [&]<class A>(Engine<A>& e) {
    return run(e, linear, need, SoftTarget<A>(e, ids, probs, uniform, dense, Optional(), classes), weight, wanted);
  });
}

}  // namespace
}  // namespace linear
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) { m.add<&w2s::linear::linear_ce>("linear_ce"); }
