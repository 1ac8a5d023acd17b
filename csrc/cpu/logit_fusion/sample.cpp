#include "cpu/logit_fusion/sample.h"

#define W2S_KERNEL "cpu/logit_fusion/sample_kernel.h"
#include "cpu/for_each_target.h"

namespace w2s {

void draw_rows(const Fusion& f, const Draws& draws, SampleOutput& out) { W2S_DISPATCH(run_sample)(f, draws, out); }

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_sample(W2S_FUSE_PARAMETERS, Strided uniform, int64_t top_k, double top_p,
                                                        double min_p) {
  const Fusion f(W2S_FUSE_ARGUMENTS);
  SampleOutput out(f);
  draw_rows(f, Draws{numbers(uniform), {top_k, top_p, min_p}}, out);
  return {out.token, out.logprob, out.lse, out.kept};
}

}  // namespace
}  // namespace w2s

STABLE_TORCH_LIBRARY_IMPL(w2s_fast, CPU, m) { m.impl("fused_sample", W2S_BOX(&w2s::fused_sample)); }
