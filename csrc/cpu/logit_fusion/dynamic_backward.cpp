#include "cpu/logit_fusion/dynamic_weights.h"

namespace w2s {
namespace {

Tensor zeros_like(const Tensor& t) { return torch::stable::new_zeros(t, {t.size(0), t.size(1)}); }

std::tuple<Tensor, Tensors, Tensors, Tensor> dynamic_fusion_weights_backward(
    Tensor grad_alpha, Tensor alpha, Tensor saturated, Rowwise base, RowwiseTensors experts, RowwiseTensors anti, int64_t multi,
    int64_t direction_kind, std::optional<Tensor>, bool average, bool has_target, int64_t vocab_size) {
  const Dynamic d(Models(base, experts, anti, vocab_size), int(multi), int(direction_kind), average);
  const RowResults rows(base, d);
  expect(grad_alpha, "grad_alpha", {d.B, d.K}), expect(alpha, "alpha", {d.B, d.K}), expect(saturated, "saturated", {d.B, d.K});
  const bool* flags = integers<bool>(saturated);
  const Tensor dtarget = rows(rows.wide, d.K), dbase = zeros_like(base);
  DynamicGradient g{d, numbers(grad_alpha), numbers(alpha), std::vector<char>(flags, flags + d.B * d.K), has_target,
                    Rows(dbase), {}, {}, Flat(dtarget)};
  Tensors dexperts, danti;
  for (const Tensor& t : experts) dexperts.push_back(zeros_like(t));
  for (const Tensor& t : anti) danti.push_back(zeros_like(t));
  for (const Tensor& t : dexperts) g.expert.emplace_back(t);
  for (const Tensor& t : danti) g.anti.emplace_back(t);
  with_kernels<DynamicBackwardKernels>(d.f64, [&](const auto& kernel) { kernel.run(g); });
  return {dbase, dexperts, danti, dtarget};
}

}  // namespace
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) { m.add<&w2s::dynamic_fusion_weights_backward>("dynamic_fusion_weights_backward"); }
