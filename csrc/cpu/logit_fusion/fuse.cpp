#include "cpu/logit_fusion/sample.h"

#define W2S_KERNEL "cpu/logit_fusion/fuse_kernel.h"
#include "cpu/for_each_target.h"

namespace w2s {
namespace {

Tensor lse_tensor(const Fusion& f, const std::vector<double>& lse) {
  Tensor out = f.rows(f.acc());
  for (int64_t i = 0; i < f.B; ++i) put(out, f.f64, i, lse[size_t(i)]);
  return out;
}

std::tuple<Tensor, Tensor> fuse_logits(W2S_FUSE_PARAMETERS, ScalarType out_dtype, bool need_lse) {
  const Fusion f(W2S_FUSE_ARGUMENTS);
  Tensor out = f.rows(out_dtype, f.V);
  const std::vector<double> lse = W2S_DISPATCH(run_fuse)(f, out, need_lse, false);
  return {out, need_lse ? lse_tensor(f, lse) : f.nothing()};
}

std::tuple<Tensor, Tensor> fused_log_softmax(W2S_FUSE_PARAMETERS, ScalarType out_dtype) {
  const Fusion f(W2S_FUSE_ARGUMENTS);
  Tensor out = f.rows(out_dtype, f.V);
  return {out, lse_tensor(f, W2S_DISPATCH(run_fuse)(f, out, true, true))};
}

}  // namespace
}  // namespace w2s

STABLE_TORCH_LIBRARY_IMPL(w2s_fast, CPU, m) {
  m.impl("fuse_logits", W2S_BOX(&w2s::fuse_logits));
  m.impl("fused_log_softmax", W2S_BOX(&w2s::fused_log_softmax));
}
