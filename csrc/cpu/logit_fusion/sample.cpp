#include "cpu/logit_fusion/fusion.h"

namespace w2s {

SampleTensors draw_rows(const Tensor& base, const Fusion& f, const Draws& draws) {
  const RowResults rows(base, f);
  const SampleTensors made{rows(ScalarType::Long), rows(rows.wide), rows(rows.wide), rows(ScalarType::Int)};
  const SampleOutput out{static_cast<int64_t*>(made.token.data_ptr()), static_cast<int32_t*>(made.kept.data_ptr()), Flat(made.logprob),
                         Flat(made.lse)};
  with_kernels<SampleKernels>(f.f64, [&](const auto& kernel) { kernel.run(f, draws, out); });
  return made;
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_sample(FusionArguments fusion, Strided uniform, int64_t top_k, double top_p, double min_p) {
  const SampleTensors drawn = draw_rows(fusion.base, Fusion(fusion), Draws{numbers(uniform), {top_k, top_p, min_p}});
  return {drawn.token, drawn.logprob, drawn.lse, drawn.kept};
}

}  // namespace
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) { m.add<&w2s::fused_sample>("fused_sample"); }
