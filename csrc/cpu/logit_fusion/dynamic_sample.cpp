// dynamic_sample: dynamic_fusion_weights, then fused_sample with those weights; two reads of the logits in all, the
// second from the last-level cache when a step's logits fit there.
#include "cpu/logit_fusion/dynamic.h"
#include "cpu/logit_fusion/sample.h"

namespace w2s {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dynamic_sample(
    W2S_DYN_PARAMETERS, std::optional<Strided> temperature, double temperature_value, int64_t plausible,
    double plausible_value, Strided uniform, int64_t top_k, double top_p, double min_p) {
  const Dynamic d(W2S_DYN_ARGUMENTS);
  const auto [alpha, target, achieved, saturated] = solve_dynamic(d).tensors(d);
  const Fusion f(base, experts, anti, alpha, {}, 1.0, temperature, temperature_value, plausible, plausible_value, vocab_size);
  SampleOutput out(f);
  draw_rows(f, Draws{numbers(uniform), {top_k, top_p, min_p}}, out);
  return {out.token, out.logprob, out.lse, out.kept, alpha, target, achieved, saturated};
}

}  // namespace
}  // namespace w2s

STABLE_TORCH_LIBRARY_IMPL(w2s_fast, CPU, m) { m.impl("dynamic_sample", W2S_BOX(&w2s::dynamic_sample)); }
