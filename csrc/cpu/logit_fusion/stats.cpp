#include "cpu/logit_fusion/sample.h"

namespace w2s {
struct StatsOutput {
  Tensor lse, max, argmax, entropy, target_logp;
};
}  // namespace w2s

#define W2S_KERNEL "cpu/logit_fusion/stats_kernel.h"
#include "cpu/for_each_target.h"

namespace w2s {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fused_stats(W2S_FUSE_PARAMETERS, std::optional<Tensor> targets) {
  const Fusion f(W2S_FUSE_ARGUMENTS);
  const StatsOutput out{f.rows(f.acc()), f.rows(f.acc()), f.rows(ScalarType::Long), f.rows(f.acc()),
                        targets ? f.rows(f.acc()) : f.nothing()};
  W2S_DISPATCH(run_stats)(f, targets ? integers<int64_t>(*targets) : nullptr, out);
  return {out.lse, out.max, out.argmax, out.entropy, out.target_logp};
}

}  // namespace
}  // namespace w2s

STABLE_TORCH_LIBRARY_IMPL(w2s_fast, CPU, m) { m.impl("fused_stats", W2S_BOX(&w2s::fused_stats)); }
