#include "cpu/routing/moe_route.h"

#include "cpu/tensors.h"

namespace w2s {
namespace {

Score score_of(const std::string& name) {
  if (name == "softmax") return Score::softmax;
  if (name == "topk") return Score::topk;
  check(name == "sigmoid", "score must be softmax, topk or sigmoid");
  return Score::sigmoid;
}

template <class A>
const A* pointer(const std::optional<Tensor>& t) { return t ? static_cast<const A*>(t->data_ptr()) : nullptr; }

template <class A>
MoeRoute<A> problem(const Rowwise& logits, const std::optional<Tensor>& mask, int64_t k, const std::string& score, bool renormalize) {
  expect(mask, "mask", {logits.size(0)});
  check(k >= 1 && k <= logits.size(1), "k must be in [1, E]");
  MoeRoute<A> s{};
  s.T = logits.size(0), s.E = logits.size(1), s.k = k;
  s.score = score_of(score), s.renormalize = renormalize;
  s.logits = Rows(logits);
  s.mask = mask ? reinterpret_cast<const uint8_t*>(integers<bool>(*mask)) : nullptr;
  return s;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_route(Rowwise logits, std::optional<Tensor> bias, std::optional<Tensor> mask,
                                                                     int64_t k, std::string score, bool renormalize) {
  const int64_t T = logits.size(0), E = logits.size(1);
  const ScalarType wide = wide_type(logits);
  expect(bias, "bias", {E});
  Tensor weights = fresh(logits, {T, k}, wide), indices = fresh(logits, {T, k}, ScalarType::Long), lse = fresh(logits, {T}, wide);
  Tensor counts = fresh(logits, {E}, ScalarType::Long), psum = fresh(logits, {E}, wide), tokens = fresh(logits, {}, ScalarType::Long);
  with_type(is_double(logits), [&]<class A>(A) {
    MoeRoute<A> s = problem<A>(logits, mask, k, score, renormalize);
    s.bias = Flat(bias);
    const auto of = [](const Tensor& t) { return static_cast<A*>(t.data_ptr()); };
    const auto whole = [](const Tensor& t) { return static_cast<int64_t*>(t.data_ptr()); };
    s.weights = of(weights), s.lse = of(lse), s.psum = of(psum);
    s.indices = whole(indices), s.counts = whole(counts), s.tokens = whole(tokens);
    kernels<MoeRouteKernels, A>().forward(s);
  });
  return {weights, indices, lse, counts, psum, tokens};
}

Tensor moe_route_backward(std::optional<Tensor> grad_weights, std::optional<Tensor> grad_lse, std::optional<Tensor> grad_psum,
                          Rowwise logits, std::optional<Tensor> mask, Tensor weights, Tensor indices, std::string score,
                          bool renormalize) {
  const int64_t T = logits.size(0), E = logits.size(1), k = weights.dim() == 2 ? weights.size(1) : 0;
  const ScalarType wide = wide_type(logits);
  expect(weights, "weights", {T, k}, wide), expect(indices, "indices", {T, k}, ScalarType::Long);
  expect(grad_weights, "grad_weights", {T, k}, wide), expect(grad_lse, "grad_lse", {T}, wide);
  expect(grad_psum, "grad_psum", {E}, wide);
  Tensor dlogits = fresh(logits, {T, E});
  with_type(is_double(logits), [&]<class A>(A) {
    MoeRoute<A> s = problem<A>(logits, mask, k, score, renormalize);
    s.weights = static_cast<A*>(weights.data_ptr());
    s.indices = const_cast<int64_t*>(places(indices, E, "indices"));
    kernels<MoeRouteKernels, A>().backward(s, {pointer<A>(grad_weights), pointer<A>(grad_lse), pointer<A>(grad_psum), Rows(dlogits)});
  });
  return dlogits;
}

}  // namespace
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) {
  m.add<&w2s::moe_route>("moe_route");
  m.add<&w2s::moe_route_backward>("moe_route_backward");
}
