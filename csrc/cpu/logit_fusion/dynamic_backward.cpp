#include "cpu/logit_fusion/dynamic.h"
#include "cpu/logit_fusion/sample.h"

namespace w2s {
struct DynamicGradient {
  const Dynamic& d;
  std::vector<double> grad, alpha;
  std::vector<char> saturated;
  bool has_target;
  Rows base;
  std::vector<Rows> expert, anti;
  Tensor dtarget;
};
}  // namespace w2s

#define W2S_KERNEL "cpu/logit_fusion/dynamic_backward_kernel.h"
#include "cpu/for_each_target.h"

namespace w2s {
namespace {

Tensor zeros_like(const Tensor& t) { return torch::stable::new_zeros(t, {t.size(0), t.size(1)}); }

std::tuple<Tensor, Tensors, Tensors, Tensor> dynamic_fusion_weights_backward(
    Tensor grad_alpha, Tensor alpha, Tensor saturated, Rowwise base, RowwiseTensors experts, RowwiseTensors anti, int64_t multi,
    int64_t direction_kind, std::optional<Tensor>, bool average, bool has_target, int64_t vocab_size) {
  const Dynamic d(base, experts, anti, 1.0, 2, -1, 1.0, multi, direction_kind, std::nullopt, average, std::nullopt, vocab_size);
  const bool* flags = integers<bool>(saturated);
  DynamicGradient g{d, numbers(grad_alpha), numbers(alpha), std::vector<char>(flags, flags + d.B * d.K), has_target,
                    {}, {}, {}, d.rows(d.acc(), d.K)};
  const Tensor dbase = zeros_like(base);
  Tensors dexperts, danti;
  for (const Tensor& t : experts) dexperts.push_back(zeros_like(t));
  for (const Tensor& t : anti) danti.push_back(zeros_like(t));
  g.base = Rows(dbase);
  for (const Tensor& t : dexperts) g.expert.emplace_back(t);
  for (const Tensor& t : danti) g.anti.emplace_back(t);
  W2S_DISPATCH(run_dynamic_backward)(g);
  return {dbase, dexperts, danti, g.dtarget};
}

}  // namespace
}  // namespace w2s

STABLE_TORCH_LIBRARY_IMPL(w2s_fast, CPU, m) {
  m.impl("dynamic_fusion_weights_backward", W2S_BOX(&w2s::dynamic_fusion_weights_backward));
}
