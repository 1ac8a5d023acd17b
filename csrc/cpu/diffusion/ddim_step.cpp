#include "cpu/diffusion/ddim_step.h"

#include "cpu/tensors.h"

namespace w2s {
namespace {

Tensor ddim_step(Tensor x, std::optional<Tensor> cond, std::optional<Tensor> uncond, std::optional<Tensor> levels, double a,
                 double b, double guidance) {
  std::vector<Tensor> given;
  for (const auto& t : {cond, uncond})
    if (t) given.push_back(*t);
  Tensor out = fresh(x, {x.size(0), x.size(1)});
  DdimStep s{x.size(0), x.size(1), Rows(x), Rows(given[0]), Rows(given.back()), Rows(out), given.size() == 2,
             levels ? numbers(*levels) : std::vector<double>{a, b}, guidance};
  const bool f64 = s.x.dtype == Dtype::f64 || s.first.dtype == Dtype::f64 || s.second.dtype == Dtype::f64;
  if (s.levels.size() >= 2)  // no levels: no rows
    with_kernels<DdimKernels>(f64, [&](const auto& kernel) { kernel.step(s); });
  return out;
}

}  // namespace
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) { m.add<&w2s::ddim_step>("ddim_step"); }
