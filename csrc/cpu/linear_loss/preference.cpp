#include "cpu/linear_loss/gradient.h"

// Preference losses. A token's coefficient is the derivative of the loss in its sequence's log-probability, which is
// known once the first sweep has seen every token: then dz_tv = c_t ([v = y_t] - p_tv), and the second sweep takes the
// logits from where the first left them, in the memory of dW: three products in all.
namespace w2s {
namespace linear {
namespace {

using Optional = std::optional<Tensor>;
using Loss = std::tuple<Tensor, Tensor, Tensors, Tensors, Tensors, Tensor>;

double sigmoid(double x) { return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x)); }
double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }

struct Settings {
  std::string kind;
  double beta, gamma, eps, nll;
  bool mean;
};

// A loss and its derivatives in the chosen and the rejected sequence's score, and in the chosen one's mean.
struct Slope {
  double loss, chosen, rejected, mean = 0;
};

constexpr double HIGHEST = -1e-6;  // log-odds have a pole at probability 1

double log_odds(double m) { return std::min(m, HIGHEST) - std::log(-std::expm1(std::min(m, HIGHEST))); }
double log_odds_slope(double m) { return m > HIGHEST ? 0 : -1 / std::expm1(m); }

// a, b: scores less the reference's
Slope pair_loss(const Settings& s, double a, double b, double mean) {
  if (s.kind == "orpo") {
    const double u = log_odds(a) - log_odds(b), g = -s.beta * sigmoid(-u);
    return {s.beta * softplus(-u) - (1 + s.nll) * mean, g * log_odds_slope(a), -g * log_odds_slope(b), -1 - s.nll};
  }
  double loss, g;
  if (s.kind == "ipo") {
    const double x = a - b - 1 / (2 * s.beta);
    loss = x * x, g = 2 * x;
  } else if (s.kind == "hinge") {
    const double x = 1 - s.beta * (a - b);
    loss = std::max(x, 0.0), g = x > 0 ? -s.beta : 0;
    if (std::isnan(x)) loss = g = x;
  } else {
    const double u = s.beta * (a - b) - s.gamma;
    loss = (1 - s.eps) * softplus(-u) + (s.eps ? s.eps * softplus(u) : 0);  // u may be infinite
    g = -s.beta * ((1 - s.eps) * sigmoid(-u) - s.eps * sigmoid(u));
  }
  return {s.nll ? loss - s.nll * mean : loss, g, -g, -s.nll};
}

Slope single_loss(const Settings& s, double d, double label, double kl) {
  if (s.kind == "ga") return {d, 1, 0};
  if (s.kind == "npo") return {2 / s.beta * softplus(s.beta * d), 2 * sigmoid(s.beta * d), 0};
  const double sign = label > 0 ? 1 : label < 0 ? -1 : 0, p = sigmoid(-sign * (s.beta * d - kl)), w = std::abs(label);
  return {w * p, -w * sign * s.beta * p * (1 - p), 0};
}

struct Sequences {
  std::vector<double> sum, count, ref, slope;  // slope: derivative of the loss in a sequence's sum
  Sequences(int64_t n, const Optional& reference) : sum(size_t(n)), count(size_t(n)), ref(numbers(reference)), slope(size_t(n)) {
    if (!reference) ref.assign(size_t(n), 0.0);
  }

  double size(int64_t s) const { return std::max(count[size_t(s)], 1.0); }
  double score(const Settings& given, int64_t s) const { return sum[size_t(s)] / (given.mean ? size(s) : 1.0) - ref[size_t(s)]; }

  // the summed loss of all pairs (or sequences); fills slope
  double loss(const Settings& given, const Optional& pairs, const Optional& labels, const Optional& kl) {
    double total = 0;
    if (!pairs) {
      const std::vector<double> y = numbers(labels);
      const double baseline = kl ? numbers(*kl)[0] : 0;
      for (int64_t s = 0; s < int64_t(sum.size()); ++s) {
        const Slope d = single_loss(given, score(given, s), labels ? y[size_t(s)] : 0, baseline);
        total += d.loss;
        slope[size_t(s)] += d.chosen / (given.mean ? size(s) : 1.0);
      }
      return total;
    }
    const int64_t* index = places(*pairs, int64_t(sum.size()), "pair_index");
    for (int64_t p = 0; p < pairs->size(0); ++p) {
      const int64_t w = index[2 * p], l = index[2 * p + 1];
      const Slope d = pair_loss(given, score(given, w), score(given, l), sum[size_t(w)] / size(w));
      total += d.loss;
      slope[size_t(w)] += d.chosen / (given.mean ? size(w) : 1.0) + d.mean / size(w);
      slope[size_t(l)] += d.rejected / (given.mean ? size(l) : 1.0);
    }
    return total;
  }
};

template <class A>
Loss run(Engine<A>& e, const Tensors& heads, const Tensors& biases, Need need, const int64_t* target, const Optional& weight,
         const int64_t* sequence, Sequences& all, const Settings& given, const Optional& pairs, const Optional& labels,
         const Optional& kl, double scale) {
  Gradients<A> g(e, heads, biases, need);
  const auto groups = stashed(e, need);
  g.plan(widest<A>(groups));
  Statistics<A> s(e, target);
  first_sweep(e, g, groups, [&](int64_t r0, int64_t rows, A* z, int64_t ld) { s.add(r0, rows, z, ld); });
  const std::vector<A> w = weight ? Target<A>::rows(e, *weight) : std::vector<A>(size_t(e.Mp), A(1));
  for (int64_t m = 0; m < e.M; ++m)
    all.sum[size_t(sequence[e.index[size_t(m)]])] += double(w[size_t(m)]) * (double(s.at_target[size_t(m)]) - s.lse(m));
  const double total = all.loss(given, pairs, labels, kl);
  g.q.K = 1;
  g.q.ids.resize(size_t(e.M)), g.q.a.resize(size_t(e.M));
  for (int64_t m = 0; m < e.M; ++m) {
    const int64_t t = e.index[size_t(m)];
    const A c = A(scale * all.slope[size_t(sequence[t])] * double(w[size_t(m)]));
    g.lse[size_t(m)] = A(s.lse(m));
    g.b[size_t(m)] = -c;
    g.q.ids[size_t(m)] = target[t];
    g.q.a[size_t(m)] = c;
  }
  g.sweep(groups);
  Tensor loss = e.output({}), sums = e.output({int64_t(all.sum.size())});
  *static_cast<A*>(loss.data_ptr()) = A(scale * total);
  for (size_t i = 0; i < all.sum.size(); ++i) static_cast<A*>(sums.data_ptr())[i] = A(all.sum[i]);
  return {loss, sums, g.dhiddens, g.dheads, g.dbiases, g.dweights};
}

Loss linear_preference(W2S_LINEAR_PARAMETERS, Tensor target, int64_t ignore_index, Optional token_weights, Tensor segments,
                       Tensor counts, Optional ref, Optional pairs, Optional labels, Optional kl, std::string kind,
                       std::vector<double> settings, bool mean, double scale, W2S_NEED_PARAMETERS) {
  const int64_t* y = integers<int64_t>(target);
  const int64_t* sequence = places(segments, counts.size(0), "segment_ids");
  const Settings given{kind, settings[0], settings[1], settings[2], settings[3], mean};
  Sequences all(counts.size(0), ref);
  all.count = numbers(counts);
  const std::vector<double> w = numbers(token_weights);
  const std::vector<int64_t> rows = rows_where(
      target.size(0), [&](int64_t t) { return y[t] != ignore_index && (w.empty() || w[size_t(t)] != 0); });
  if (wants_double(hiddens, heads)) {
    Engine<double> e(W2S_LINEAR_ARGUMENTS, rows);
    return run(e, heads, biases, W2S_NEED, y, token_weights, sequence, all, given, pairs, labels, kl, scale);
  }
  Engine<float> e(W2S_LINEAR_ARGUMENTS, rows);
  return run(e, heads, biases, W2S_NEED, y, token_weights, sequence, all, given, pairs, labels, kl, scale);
}

}  // namespace
}  // namespace linear
}  // namespace w2s

STABLE_TORCH_LIBRARY_IMPL(w2s_fast, CPU, m) { m.impl("linear_preference", W2S_BOX(&w2s::linear::linear_preference)); }
