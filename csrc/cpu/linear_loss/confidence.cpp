// w2s_confidence_loss. Two classes: p_0 of every row, a quantile of them, then blocks of rows. More: column sums of p and w
// for the classes' shifts, then one row kernel a row, loss and gradient together.
#include <algorithm>
#include <string>

#include "cpu/linear_loss/confidence.h"

#include "cpu/gemm.h"
#include "cpu/tensors.h"

namespace w2s {
namespace {

enum Balance : int64_t { WEAK_PRIOR, MEDIAN, NONE };
constexpr double LEAST_MEAN = 1.1754943508222875e-38;  // as the reference
constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();

struct Call {
  Tensor logits, labels;
  Mixture mixture;
  Balance balance;
  std::optional<Tensor> given;  // threshold
  bool loss;

  int64_t B() const { return logits.size(0); }
  bool guesses() const { return !mixture.product && mixture.coef > 0; }
};

using Three = std::tuple<Tensor, Tensor, Tensor>;

template <class A>
Tensor make(const Call& call, std::vector<int64_t> shape) {
  return fresh(call.logits, shape, scalar_type<A>);
}

// An error for a label off [0, 1]: `outside` is one, or NaN.
void refuse(double outside) {
  check(std::isnan(outside), [&] { return "soft_labels must be in [0, 1], got " + std::to_string(outside) + "."; });
}

// The loss from its parts, in their order whatever the threads.
template <class A>
Tensor total(const Call& call, const std::vector<ConfidenceResult>& parts) {
  double sum = 0;
  for (const ConfidenceResult& part : parts) {
    refuse(part.outside);
    sum += part.loss;
  }
  Tensor loss = make<A>(call, {});
  *static_cast<A*>(loss.data_ptr()) = A(sum * call.mixture.share);
  return loss;
}

template <class A>
Tensor to_tensor(const Call& call, const A* values, int64_t n) {
  Tensor made = make<A>(call, {n});
  std::copy(values, values + n, static_cast<A*>(made.data_ptr()));
  return made;
}

// As torch.quantile: linear between order statistics.
template <class A>
A quantile(std::vector<A>& x, double q) {
  for (A value : x)
    if (std::isnan(value)) return A(NOT_A_NUMBER);
  if (std::isnan(q)) return A(NOT_A_NUMBER);
  const A rank = A(std::clamp(q, 0.0, 1.0)) * A(x.size() - 1);
  const auto at = x.begin() + int64_t(rank);
  std::nth_element(x.begin(), at, x.end());
  const A low = *at, share = rank - A(int64_t(rank));
  if (share == 0) return low;
  const A high = *std::min_element(at + 1, x.end());
  return share < A(0.5) ? low + share * (high - low) : high - (high - low) * (1 - share);
}

template <class A>
A threshold(const Call& call, const ConfidencePairs& pairs, int64_t blocks) {
  if (call.given) return A(numbers(*call.given)[0]);
  if (call.balance == NONE || !call.B()) return A(0.5);
  const int64_t B = call.B();
  std::vector<A> p0{};
  p0.resize(size_t(B));
  std::vector<double> sums(size_t(blocks), 0.0);
  parallel_items(blocks, 32, [&](int64_t i) {
    const int64_t first = i * PAIRS;
    sums[size_t(i)] = kernels<ConfidenceKernels, A>().pair_scores(pairs, first, int(std::min<int64_t>(PAIRS, B - first)), p0.data() + first);
  });
  double mean = 0;
  for (double sum : sums) mean += sum;
  return quantile(p0, call.balance == MEDIAN ? 0.5 : mean / double(B));
}

template <class A>
Three two_classes(const Call& call) {
  const int64_t B = call.B(), blocks = (B + PAIRS - 1) / PAIRS;
  const bool single = call.logits.dim() == 1;
  ConfidencePairs pairs{Rows(call.logits), Rows(call.labels), single};
  if (!call.loss) refuse(kernels<ConfidenceKernels, A>().outside(pairs.w, 0, B, single ? 1 : 2));
  A line = 0;
  Tensor made = make<A>(call, {call.guesses() && !call.given ? 1 : 0});
  if (call.guesses()) {
    line = threshold<A>(call, pairs, blocks);
    if (!call.given) *static_cast<A*>(made.data_ptr()) = line;
  }
  const bool gradient = call.mixture.gradient;
  Tensor grad = fresh(call.logits, !gradient ? std::vector<int64_t>{0}
                                                      : single  ? std::vector<int64_t>{B}
                                                                : std::vector<int64_t>{B, 2});
  std::vector<ConfidenceResult> parts(size_t(call.loss ? blocks : 0));
  char* to = static_cast<char*>(grad.data_ptr());
  const int64_t bytes = pairs.z.bytes * (single ? 1 : 2);
  parallel_items(int64_t(parts.size()), 32, [&](int64_t i) {
    const int64_t first = i * PAIRS;
    parts[size_t(i)] = kernels<ConfidenceKernels, A>().pair_rows(call.mixture, pairs, first, int(std::min<int64_t>(PAIRS, B - first)), double(line),
                                                  to + first * bytes, pairs.z.dtype);
  });
  return {total<A>(call, parts), made, grad};
}

// shift_c = log(mean p_c / mean w_c): each row's norm, then columns in blocks, so that few rows are shared out as well.
template <class A>
void prior_shifts(const Rows& z, const Rows& w, int64_t B, int64_t V, A* shift) {
  const auto& kernel = kernels<ConfidenceKernels, A>();
  std::vector<A> top(static_cast<size_t>(B)), scale(static_cast<size_t>(B));
  parallel_items(B, grain_of(2 * V), [&](int64_t r) { kernel.norm(z, r, V, &top[size_t(r)], &scale[size_t(r)]); });
  const ConfidenceColumns<A> all{z, w, B, top.data(), scale.data()};
  const int64_t blocks = pieces(V, SHIFTS);
  std::vector<A> off(static_cast<size_t>(blocks));
  parallel_items(blocks, grain_of(4 * B * std::min<int64_t>(V, SHIFTS)), [&](int64_t i) {
    const int64_t first = i * SHIFTS;
    off[size_t(i)] = kernel.shifts(all, first, int(std::min<int64_t>(SHIFTS, V - first)), LEAST_MEAN, shift + first);
  });
  if (std::any_of(off.begin(), off.end(), [](A x) { return x > 0; })) refuse(kernel.outside(w, 0, B, V));
}

template <class A>
Three many_classes(const Call& call) {
  const int64_t B = call.B(), V = call.logits.size(1), width = kd_width(V);
  const Rows z(call.logits), w(call.labels);
  std::vector<A> shift(size_t(call.guesses() ? width : 0), A(0));
  if (call.guesses() && call.given) {
    const std::vector<double> given = numbers(*call.given);
    std::copy(given.begin(), given.end(), shift.begin());
  } else if (call.guesses() && call.balance == WEAK_PRIOR && B) {
    prior_shifts<A>(z, w, B, V, shift.data());
  } else if (!call.loss) {
    refuse(kernels<ConfidenceKernels, A>().outside(w, 0, B, V));
  }
  Tensor made = to_tensor<A>(call, shift.data(), call.guesses() && !call.given ? V : 0);
  Tensor grad = fresh(call.logits, call.mixture.gradient ? std::vector<int64_t>{B, V} : std::vector<int64_t>{0});
  char* to = static_cast<char*>(grad.data_ptr());
  std::vector<ConfidenceResult> parts(size_t(call.loss ? B : 0));
  parallel_items(int64_t(parts.size()), std::max<int64_t>(1, 8192 / V), [&](int64_t r) {
    const ConfidenceRow row{V, {z.at(r, 0), z.dtype, nullptr}, {w.at(r, 0), w.dtype, nullptr}, shift.data()};
    parts[size_t(r)] =
        kernels<ConfidenceKernels, A>().row(call.mixture, row, scratch_of<A>(2, 3 * width), to + r * V * z.bytes, z.dtype);
  });
  return {total<A>(call, parts), made, grad};
}

Three w2s_confidence_loss(Rowwise logits, Rowwise soft_labels, bool product, double coef, double alpha, double beta, int64_t balance,
                          std::optional<Tensor> threshold, bool need_loss, bool need_gradient) {
  const Mixture mixture{product, coef, alpha, beta, 1.0 / double(std::max<int64_t>(logits.size(0), 1)), need_gradient};
  const Call call{logits, soft_labels, mixture, Balance(balance), threshold, need_loss};
  const bool two = logits.dim() == 1 || logits.size(1) == 2;
  return with_type(is_double(logits), [&](auto zero) { return two ? two_classes<decltype(zero)>(call) : many_classes<decltype(zero)>(call); });
}

}  // namespace
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) { m.add<&w2s::w2s_confidence_loss>("w2s_confidence_loss"); }
