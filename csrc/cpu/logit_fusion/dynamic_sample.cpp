// dynamic_sample: dynamic_fusion_weights, then fused_sample with those weights; two reads of the logits in all, the
// second from the last-level cache when a step's logits fit there.
#include "cpu/logit_fusion/dynamic_weights.h"

namespace w2s {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dynamic_sample(
    DynamicArguments given, std::optional<Strided> temperature, double temperature_value, int64_t plausible, double plausible_value,
    Strided uniform, int64_t top_k, double top_p, double min_p) {
  const DynamicTensors found = solve_dynamic(given.base, Dynamic(given));
  const Fusion f({given.base, given.experts, given.anti, Strided{found.alpha}, {}, 1.0, temperature, temperature_value, plausible,
                  plausible_value, given.vocab_size});
  const SampleTensors drawn = draw_rows(given.base, f, Draws{numbers(uniform), {top_k, top_p, min_p}});
  return {drawn.token, drawn.logprob, drawn.lse, drawn.kept, found.alpha, found.target, found.achieved, found.saturated};
}

}  // namespace
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) { m.add<&w2s::dynamic_sample>("dynamic_sample"); }
