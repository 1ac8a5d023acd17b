#include "cpu/logit_fusion/fusion.h"

namespace w2s {
namespace {

std::tuple<Tensor, Tensor> fused(const FusionArguments& fusion, ScalarType out_dtype, bool need_lse, bool log_softmax) {
  const Fusion f(fusion);
  const RowResults rows(fusion.base, f);
  Tensor out = rows(out_dtype, f.V);
  const std::vector<double> found =
      with_kernels<FuseKernels>(f.f64, [&](const auto& kernel) { return kernel.run(f, Rows(out), need_lse, log_softmax); });
  if (!need_lse) return {out, rows.nothing()};
  Tensor lse = rows(rows.wide);
  for (int64_t i = 0; i < f.B; ++i) Flat(lse).put(i, found[size_t(i)]);
  return {out, lse};
}

std::tuple<Tensor, Tensor> fuse_logits(FusionArguments fusion, ScalarType out_dtype, bool need_lse) {
  return fused(fusion, out_dtype, need_lse, false);
}

std::tuple<Tensor, Tensor> fused_log_softmax(FusionArguments fusion, ScalarType out_dtype) { return fused(fusion, out_dtype, true, true); }

}  // namespace
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) {
  m.add<&w2s::fuse_logits>("fuse_logits");
  m.add<&w2s::fused_log_softmax>("fused_log_softmax");
}
