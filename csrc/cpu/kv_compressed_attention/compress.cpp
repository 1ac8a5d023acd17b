#include "cpu/kv_compressed_attention/compress.h"

#define W2S_KERNEL "cpu/kv_compressed_attention/compress_kernels.h"
#include "cpu/for_each_target.h"

namespace w2s {
namespace compress {
namespace {

Tensor empty(const Tensor& like, std::vector<int64_t> shape, ScalarType type) { return torch::stable::new_empty(like, shape, type); }

// The sums of all rows, put into the parameters' shapes.
template <class A>
Parameters split(const Problem& p, const Tensor& like, const A* total, bool need) {
  const int64_t C = p.C, T = p.T, sets = p.sets();
  const ScalarType type = p.acc();
  const bool norm = need && p.normalize;
  Parameters found{empty(like, need && p.weight ? std::vector<int64_t>{sets, C, p.ratio, p.ratio} : std::vector<int64_t>{0}, type),
                   empty(like, need && p.bias ? std::vector<int64_t>{p.bias_sets(), C} : std::vector<int64_t>{0}, type),
                   empty(like, {norm && p.norm_weight ? C : 0}, type), empty(like, {norm && p.norm_bias ? C : 0}, type)};
  if (!need) return found;
  if (p.weight) {
    A* w = static_cast<A*>(found.weight.data_ptr());
    for (int64_t s = 0; s < sets; ++s)
      for (int64_t t = 0; t < T; ++t)
        for (int64_t c = 0; c < C; ++c) w[(s * C + c) * T + t] = total[(s * T + t) * C + c];
    total += sets * T * C;
  }
  if (p.bias) {
    std::memcpy(found.bias.data_ptr(), total, size_t(p.bias_sets() * C) * sizeof(A));
    total += p.bias_sets() * C;
  }
  if (norm && p.norm_weight) std::memcpy(found.norm_weight.data_ptr(), total, size_t(C) * sizeof(A));
  if (norm && p.norm_bias) std::memcpy(found.norm_bias.data_ptr(), total + C, size_t(C) * sizeof(A));
  return found;
}

template <Dtype d>
Parameters typed_backward(const Problem& p, const Tensor& like, const Slots& grad, const Slots& x, const void* stats,
                          const Slots& dx, bool need_x, bool need_params) {
  using A = Arithmetic<d>;
  const int64_t weights = p.weight ? p.sets() * p.T : 0, biases = p.bias ? p.bias_sets() : 0;
  std::vector<A> total(size_t((weights + biases + 2) * p.C + 64));
  W2S_DISPATCH(run_compress_backward<d>)(p, grad, x, stats, dx, need_x, need_params, total.data());
  return split<A>(p, like, total.data(), need_params);
}

}  // namespace

void forward(const Problem& p, const Slots& x, double eps, const Slots& kv, void* stats) {
  switch (x.dtype) {
    case Dtype::f32: return W2S_DISPATCH(run_compress<Dtype::f32>)(p, x, eps, kv, stats);
    case Dtype::bf16: return W2S_DISPATCH(run_compress<Dtype::bf16>)(p, x, eps, kv, stats);
    case Dtype::f16: return W2S_DISPATCH(run_compress<Dtype::f16>)(p, x, eps, kv, stats);
    case Dtype::f64: return W2S_DISPATCH(run_compress<Dtype::f64>)(p, x, eps, kv, stats);
  }
}

Parameters backward(const Problem& p, const Tensor& like, const Slots& grad, const Slots& x, const void* stats, const Slots& dx,
                    bool need_x, bool need_params) {
  switch (x.dtype) {
    case Dtype::bf16: return typed_backward<Dtype::bf16>(p, like, grad, x, stats, dx, need_x, need_params);
    case Dtype::f16: return typed_backward<Dtype::f16>(p, like, grad, x, stats, dx, need_x, need_params);
    case Dtype::f64: return typed_backward<Dtype::f64>(p, like, grad, x, stats, dx, need_x, need_params);
    default: return typed_backward<Dtype::f32>(p, like, grad, x, stats, dx, need_x, need_params);
  }
}

}  // namespace compress
}  // namespace w2s
