#include "cpu/logit_fusion/dynamic.h"

#include "cpu/logit_fusion/sample.h"

#define W2S_KERNEL "cpu/logit_fusion/dynamic_kernel.h"
#include "cpu/for_each_target.h"

namespace w2s {

DynamicResult solve_dynamic(const Dynamic& d) {
  DynamicResult result(d);
  W2S_DISPATCH(run_dynamic)(d, result);
  return result;
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> dynamic_fusion_weights(W2S_DYN_PARAMETERS) {
  const Dynamic d(W2S_DYN_ARGUMENTS);
  return solve_dynamic(d).tensors(d);
}

}  // namespace
}  // namespace w2s

STABLE_TORCH_LIBRARY_IMPL(w2s_fast, CPU, m) { m.impl("dynamic_fusion_weights", W2S_BOX(&w2s::dynamic_fusion_weights)); }
