#include "cpu/kv_compressed_attention/compress.h"

namespace w2s {
namespace norm {

using compress::Slots;

struct Problem {
  int64_t B, N, S, C, first, last;
  Slots x;
  std::optional<Tensor> weight, bias;
  bool rms;
  double eps;
};

}  // namespace norm
}  // namespace w2s

#define W2S_KERNEL "cpu/diffusion/qk_norm_kernels.h"
#include "cpu/for_each_target.h"

namespace w2s {
namespace norm {
namespace {

using Shape = std::vector<int64_t>;

Problem problem(const Tensor& x, int64_t first, int64_t last, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                bool rms, double eps) {
  return {x.size(0), x.size(1), x.size(2), x.size(3), first, last, Slots(x), weight, bias, rms, eps};
}

ScalarType acc(const Tensor& x) { return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

std::tuple<Tensor, Tensor> qk_norm(Rowwise x, int64_t first, int64_t last, std::optional<Tensor> weight, std::optional<Tensor> bias,
                                   bool rms, double eps) {
  const Problem p = problem(x, first, last, weight, bias, rms, eps);
  Tensor y = torch::stable::new_empty(x, {p.B, p.N, p.S, p.C});
  Tensor stats = torch::stable::new_empty(x, {p.B, p.N, last - first, 2}, acc(x));
  switch (p.x.dtype) {
    case Dtype::f32: W2S_DISPATCH(run_qk_norm<Dtype::f32>)(p, Slots(y), stats.data_ptr()); break;
    case Dtype::bf16: W2S_DISPATCH(run_qk_norm<Dtype::bf16>)(p, Slots(y), stats.data_ptr()); break;
    case Dtype::f16: W2S_DISPATCH(run_qk_norm<Dtype::f16>)(p, Slots(y), stats.data_ptr()); break;
    case Dtype::f64: W2S_DISPATCH(run_qk_norm<Dtype::f64>)(p, Slots(y), stats.data_ptr()); break;
  }
  return {y, stats};
}

template <Dtype d>
void typed_backward(const Problem& p, const Tensor& grad, const Tensor& stats, const Tensor& dx, const Tensor& dweight,
                    const Tensor& dbias) {
  using A = Arithmetic<d>;
  const auto pointer = [](const Tensor& t) { return t.numel() ? static_cast<A*>(t.data_ptr()) : nullptr; };
  W2S_DISPATCH(run_qk_norm_backward<d>)(p, Slots(grad), stats.data_ptr(), Slots(dx), pointer(dweight), pointer(dbias));
}

std::tuple<Tensor, Tensor, Tensor> qk_norm_backward(Rowwise grad, Rowwise x, int64_t first, int64_t last, std::optional<Tensor> weight,
                                                    std::optional<Tensor> bias, bool rms, Tensor stats, bool need_params) {
  const Problem p = problem(x, first, last, weight, bias, rms, 0.0);
  Tensor dx = torch::stable::new_empty(x, {p.B, p.N, p.S, p.C});
  Tensor dweight = torch::stable::new_empty(x, need_params && weight ? Shape{weight->size(0), p.C} : Shape{0}, acc(x));
  Tensor dbias = torch::stable::new_empty(x, need_params && bias ? Shape{bias->size(0), p.C} : Shape{0}, acc(x));
  switch (p.x.dtype) {
    case Dtype::f32: typed_backward<Dtype::f32>(p, grad, stats, dx, dweight, dbias); break;
    case Dtype::bf16: typed_backward<Dtype::bf16>(p, grad, stats, dx, dweight, dbias); break;
    case Dtype::f16: typed_backward<Dtype::f16>(p, grad, stats, dx, dweight, dbias); break;
    case Dtype::f64: typed_backward<Dtype::f64>(p, grad, stats, dx, dweight, dbias); break;
  }
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace norm
}  // namespace w2s

STABLE_TORCH_LIBRARY_IMPL(w2s_fast, CPU, m) {
  m.impl("qk_norm", W2S_BOX(&w2s::norm::qk_norm));
  m.impl("qk_norm_backward", W2S_BOX(&w2s::norm::qk_norm_backward));
}
