#include "cpu/linear_loss/gradient.h"

// Preference losses, sums of terms weight f(scale x + shift + base kl) with x a number of a pair; what a kind is made of
// stands in reference/linear_loss/preference.py. A token's coefficient is the derivative of the loss in its sequence's
// log-probability, which is known once the first sweep has seen every token: then dz_tv = c_t ([v = y_t] - p_tv), and
// the second sweep takes the logits from where the first left them, in the memory of dW: three products in all.
namespace w2s {
namespace linear {
namespace {

using Optional = std::optional<Tensor>;
using Loss = std::tuple<Tensor, Tensor, Tensor, Tensors, Tensors, Tensors, Tensor>;

enum Argument { MARGIN, CHOSEN, REJECTED, ODDS, NLL };
enum Function { IDENTITY, SOFTPLUS, SIGMOID, SQUARE, RELU, NEGENTROPY, DISCOPOP };
constexpr int64_t AVERAGE = 1, REFERENCED = 2;  // bits of a mode
constexpr double HIGHEST = -1e-6;               // log-odds have a pole at probability 1
constexpr double FAR = 1e4;                     // exp(-x) is 0 from here on

struct Term {
  int64_t argument, function, mode;
  double weight, scale, shift, base, parameter;
};

std::vector<Term> terms_of(const std::vector<int64_t>& forms, const std::vector<double>& x) {
  std::vector<Term> found;
  for (size_t i = 0; 3 * i < forms.size(); ++i)
    found.push_back({forms[3 * i], forms[3 * i + 1], forms[3 * i + 2], x[5 * i], x[5 * i + 1], x[5 * i + 2], x[5 * i + 3], x[5 * i + 4]});
  return found;
}

double sigmoid(double x) { return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x)); }
double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }
double log_odds(double m) { return std::min(m, HIGHEST) - std::log(-std::expm1(std::min(m, HIGHEST))); }
double log_odds_slope(double m) { return m > HIGHEST ? 0 : -1 / std::expm1(m); }

struct Slope {
  double value, slope;
};

Slope discopop(double x, double rate) {  // -log sigma(x) sigma(-rate x) + e^-x sigma(rate x)
  const double near = std::isnan(x) ? x : std::clamp(x, -FAR, FAR), r = sigmoid(-rate * near);
  const double tail = std::exp(-softplus(-rate * near) - near);  // together: one is small where the other is large
  return {softplus(-x) * r + tail,
          -sigmoid(-x) * r - rate * softplus(-near) * r * sigmoid(rate * near) + tail * (rate * r - 1)};
}

Slope apply(int64_t function, double x, double parameter) {
  switch (function) {
    case SOFTPLUS: return {std::isnan(x) ? x : softplus(x), sigmoid(x)};
    case SIGMOID: return {sigmoid(x), sigmoid(x) * sigmoid(-x)};
    case SQUARE: return {x * x, 2 * x};
    case RELU: return {std::isnan(x) ? x : std::max(x, 0.0), std::isnan(x) ? x : double(x > 0)};
    case NEGENTROPY: {  // of sigma(x)
      const double far = std::isnan(x) ? x : std::min(std::abs(x), FAR);
      return {-softplus(-far) - far * sigmoid(-far), std::copysign(far, x) * sigmoid(x) * sigmoid(-x)};
    }
    case DISCOPOP: return discopop(x, parameter);
    default: return {x, 1};
  }
}

// What the losses are functions of, a number a sequence, and the derivatives that `loss` fills in.
struct Sequences {
  std::vector<double> sum, nll, count, ref, share, slope, nll_slope;
  std::vector<double> label;
  bool mean;  // whether ref is averaged
  double kl = 0;

  double size(int64_t s, int64_t mode) const { return mode & AVERAGE ? std::max(count[size_t(s)], 1.0) : 1.0; }
  double score(int64_t s, int64_t mode) const {
    double theirs = 0;
    if (!ref.empty() && (mode & REFERENCED)) theirs = ref[size_t(s)] / (mean ? 1.0 : size(s, mode));
    return sum[size_t(s)] / size(s, mode) - theirs;
  }

  // of the pair (w, l), or of the sequence w
  double term(const Term& t, int64_t w, int64_t l) {
    double x, dw = 0, dl = 0;
    switch (t.argument) {
      case MARGIN: x = score(w, t.mode) - score(l, t.mode), dw = 1, dl = -1; break;
      case CHOSEN: x = score(w, t.mode), dw = 1; break;
      case REJECTED: x = score(l, t.mode), dl = 1; break;
      case ODDS: {
        const double a = score(w, t.mode), b = score(l, t.mode);
        x = log_odds(a) - log_odds(b), dw = log_odds_slope(a), dl = -log_odds_slope(b);
        break;
      }
      default: x = nll[size_t(w)] * share[size_t(w)];
    }
    const double y = label.empty() ? 1 : label[size_t(w)], sign = y > 0 ? 1 : y < 0 ? -1 : y;
    const Slope f = apply(t.function, sign * (t.scale * x + t.shift + (t.base ? t.base * kl : 0)), t.parameter);
    const double g = t.weight * y * t.scale * f.slope;
    if (t.argument == NLL) nll_slope[size_t(w)] += g * share[size_t(w)];
    if (dw) slope[size_t(w)] += g * dw / size(w, t.mode);
    if (dl) slope[size_t(l)] += g * dl / size(l, t.mode);
    return t.weight * std::abs(y) * f.value;
  }

  // summed over all pairs (or sequences)
  double loss(const std::vector<Term>& terms, const Optional& pairs) {
    const int64_t* index = pairs ? places(*pairs, int64_t(sum.size()), "pair_index") : nullptr;
    const int64_t count = pairs ? pairs->size(0) : int64_t(sum.size());
    double total = 0;
    for (int64_t p = 0; p < count; ++p)
      for (const Term& t : terms) total += index ? term(t, index[2 * p], index[2 * p + 1]) : term(t, p, p);
    return total;
  }
};

// A target a row and its weight; the cross-entropy's may be another than that of the scores.
struct Tokens {
  const int64_t* target;
  int64_t ignored;
  std::vector<double> weights;  // empty: 1
  double weight(int64_t t) const { return target[t] == ignored ? 0 : weights.empty() ? 1 : weights[size_t(t)]; }
};

template <class A>
Loss run(Engine<A>& e, const LinearArguments& linear, Need need, const std::vector<Tokens>& tokens,
         const int64_t* sequence, Sequences& all, const std::vector<Term>& terms, const Optional& pairs, double scale) {
  Gradients<A> g(e, linear, need);
  const auto groups = stashed(e, need);
  g.plan(widest<A>(groups), groups.size());
  g.keep_beside(groups);
  Statistics<A> s(e, tokens[0].target);
  const bool apart = tokens.size() > 1;
  std::vector<A> second(size_t(apart ? e.Mp : 0));
  first_sweep(e, g, groups, static_cast<A*>(nullptr), [&](int64_t r0, int64_t rows, A* z, int64_t ld) {
    s.add(r0, rows, z, ld);
    for (int64_t m = r0; apart && m < r0 + rows; ++m) {
      const int64_t v = tokens[1].target[e.index[size_t(m)]] - e.v0;
      if (v >= 0 && v < e.nv) second[size_t(m)] = z[v * ld + m - r0];
    }
  });
  std::vector<double>& nll = apart ? all.nll : all.sum;
  for (int64_t m = 0; m < e.M; ++m) {
    const int64_t t = e.index[size_t(m)];
    const double w = tokens[0].weight(t), lse = s.lse(m);
    if (w != 0) all.sum[size_t(sequence[t])] += double(A(w)) * (double(s.at_target[size_t(m)]) - lse);
    if (apart && tokens[1].weight(t) != 0) nll[size_t(sequence[t])] += double(second[size_t(m)]) - lse;
  }
  if (!apart) all.nll = all.sum;
  const double total = all.loss(terms, pairs);
  const size_t K = tokens.size();
  g.q.K = int64_t(K);
  g.q.ids.resize(size_t(e.M) * K), g.q.a.resize(size_t(e.M) * K);
  for (int64_t m = 0; m < e.M; ++m) {
    const int64_t t = e.index[size_t(m)];
    const size_t own = size_t(sequence[t]);
    const double slopes[2] = {apart ? all.slope[own] : all.slope[own] + all.nll_slope[own], all.nll_slope[own]};
    g.lse[size_t(m)] = A(s.lse(m));
    for (size_t k = 0; k < K; ++k) {
      const double w = tokens[k].weight(t);
      const A c = A(w == 0 ? 0 : scale * slopes[k] * double(A(w)));
      g.b[size_t(m)] -= c;
      g.q.ids[size_t(m) * K + k] = w == 0 ? -1 : tokens[k].target[t];
      g.q.a[size_t(m) * K + k] = c;
    }
  }
  g.sweep(groups);
  const auto output = [&](const std::vector<double>& x) {
    Tensor made = e.output({int64_t(x.size())});
    for (size_t i = 0; i < x.size(); ++i) static_cast<A*>(made.data_ptr())[i] = A(x[i]);
    return made;
  };
  Tensor loss = e.output({});
  *static_cast<A*>(loss.data_ptr()) = A(scale * total);
  return {loss, output(all.sum), output(all.nll), g.dhiddens, g.dheads, g.dbiases, g.dweights};
}

Loss linear_preference(LinearArguments linear, Tensor target, int64_t ignore_index, Optional token_weights, Optional nll_target,
                       Tensor segments, Tensor counts, Optional ref, bool mean, Optional pairs, Optional labels, Optional kl,
                       Optional share, std::vector<int64_t> forms, std::vector<double> numbers_of_terms, double scale,
                       Need need) {
  std::vector<Tokens> tokens{{integers<int64_t>(target), ignore_index, numbers(token_weights)}};
  if (nll_target) tokens.push_back({integers<int64_t>(*nll_target), ignore_index, {}});
  const size_t n = size_t(counts.size(0));
  Sequences all{std::vector<double>(n), std::vector<double>(n), numbers(counts), numbers(ref), numbers(share),
                std::vector<double>(n), std::vector<double>(n), numbers(labels), mean, kl ? numbers(*kl)[0] : 0};
  const std::vector<int64_t> rows = rows_where(target.size(0), [&](int64_t t) {
    return tokens[0].weight(t) != 0 || (nll_target && tokens[1].weight(t) != 0);
  });
  const std::vector<Term> terms = terms_of(forms, numbers_of_terms);
  const int64_t* sequence = places(segments, counts.size(0), "segment_ids");
  return with_engine(linear, rows, [&](auto& e) { return run(e, linear, need, tokens, sequence, all, terms, pairs, scale); });
}

}  // namespace
}  // namespace linear
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) { m.add<&w2s::linear::linear_preference>("linear_preference"); }
