#include "cpu/logit_fusion/fusion.h"

namespace w2s {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fused_stats(FusionArguments fusion, std::optional<Tensor> targets) {
  const Fusion f(fusion);
  const RowResults rows(fusion.base, f);
  Tensor lse = rows(rows.wide), max = rows(rows.wide), argmax = rows(ScalarType::Long), entropy = rows(rows.wide);
  Tensor target_logp = targets ? rows(rows.wide) : rows.nothing();
  const StatsOutput out{Flat(lse), Flat(max), Flat(entropy), Flat(target_logp), static_cast<int64_t*>(argmax.data_ptr())};
  const int64_t* target = targets ? integers<int64_t>(*targets) : nullptr;
  with_kernels<StatsKernels>(f.f64, [&](const auto& kernel) { kernel.run(f, target, out); });
  return {lse, max, argmax, entropy, target_logp};
}

}  // namespace
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) { m.add<&w2s::fused_stats>("fused_stats"); }
