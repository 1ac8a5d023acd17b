#include "cpu/tensors.h"

namespace w2s {
namespace {

// `first` is the conditional prediction, or the only one; levels hold a and b, once or a row.
struct DdimStep {
  int64_t B, D;
  Rows x, first, second, out;
  bool both, f64;
  std::vector<double> levels;
  double guidance;
};

}  // namespace
}  // namespace w2s

#define W2S_KERNEL "cpu/diffusion/ddim_step_kernel.h"
#include "cpu/for_each_target.h"

namespace w2s {
namespace {

Tensor ddim_step(Tensor x, std::optional<Tensor> cond, std::optional<Tensor> uncond, std::optional<Tensor> levels, double a,
                 double b, double guidance) {
  std::vector<Tensor> given;
  for (const auto& t : {cond, uncond})
    if (t) given.push_back(*t);
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  DdimStep s{x.size(0), x.size(1), Rows(x), Rows(given[0]), Rows(given.back()), Rows(out), given.size() == 2, false,
             levels ? numbers(*levels) : std::vector<double>{a, b}, guidance};
  s.f64 = s.x.dtype == Dtype::f64 || s.first.dtype == Dtype::f64 || s.second.dtype == Dtype::f64;
  if (s.levels.size() >= 2) W2S_DISPATCH(run_step)(s);  // no levels: no rows
  return out;
}

}  // namespace
}  // namespace w2s

STABLE_TORCH_LIBRARY_IMPL(w2s_fast, CPU, m) { m.impl("ddim_step", W2S_BOX(&w2s::ddim_step)); }
