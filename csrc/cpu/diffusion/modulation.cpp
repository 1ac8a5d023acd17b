#include "cpu/kv_compressed_attention/compress.h"

// adaln_modulate, gate_residual and gate_residual_adaln.
namespace w2s {
namespace modulation {

struct Tokens {  // [B, N, C], C contiguous; strides in bytes
  char* data = nullptr;
  int64_t batch = 0, token = 0;
  Tokens() = default;
  explicit Tokens(const Tensor& t) : data(static_cast<char*>(t.data_ptr())) {
    const int64_t bytes = bytes_of(dtype_of(t.scalar_type()));
    batch = t.stride(0) * bytes;
    token = t.stride(1) * bytes;
  }
  explicit Tokens(const std::optional<Tensor>& t) {
    if (t) *this = Tokens(*t);
  }
  char* at(int64_t b, int64_t n) const { return data + b * batch + n * token; }
};

using Optional = std::optional<Tensor>;
using OptionalRows = std::optional<Rowwise>;

struct Forward {
  int64_t B, N, C;
  Tokens x, y, added, h;
  Optional gate, gate_row, shift, shift_row, scale, scale_row;
  double eps;
  void* stats;
};

struct Backward {
  int64_t B, N, C;
  Tokens grad_added, grad_h, added, y, dx, dy;
  Optional gate, gate_row, scale, scale_row;
  const void* stats;
  void *dgate, *dshift, *dscale;
  bool need_x, need_y, need_gate, need_modulation;
};

}  // namespace modulation
}  // namespace w2s

#define W2S_KERNEL "cpu/diffusion/modulation_kernels.h"
#include "cpu/for_each_target.h"

namespace w2s {
namespace modulation {
namespace {

using Shape = std::vector<int64_t>;

std::tuple<Tensor, Tensor, Tensor> modulate(Rowwise x, OptionalRows y, OptionalRows gate, Optional gate_row, OptionalRows shift,
                                            Optional shift_row, OptionalRows scale, Optional scale_row, double eps) {
  const int64_t B = x.size(0), N = x.size(1), C = x.size(2);
  const Dtype dtype = dtype_of(x.scalar_type());
  const bool norm = shift.has_value();
  Tensor added = torch::stable::new_empty(x, y ? Shape{B, N, C} : Shape{0});
  Tensor h = torch::stable::new_empty(x, norm ? Shape{B, N, C} : Shape{0});
  Tensor stats = torch::stable::new_empty(x, norm ? Shape{B, N, 2} : Shape{0}, dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float);
  const Forward f{B,    N,        C,     Tokens(x), Tokens(y), y ? Tokens(added) : Tokens(), norm ? Tokens(h) : Tokens(),
                  gate, gate_row, shift, shift_row, scale,     scale_row,                    eps,
                  stats.data_ptr()};
  switch (dtype) {
    case Dtype::f32: W2S_DISPATCH(run_modulate<Dtype::f32>)(f); break;
    case Dtype::bf16: W2S_DISPATCH(run_modulate<Dtype::bf16>)(f); break;
    case Dtype::f16: W2S_DISPATCH(run_modulate<Dtype::f16>)(f); break;
    case Dtype::f64: W2S_DISPATCH(run_modulate<Dtype::f64>)(f); break;
  }
  return {added, h, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> modulate_backward(OptionalRows grad_added, OptionalRows grad_h, Rowwise added, OptionalRows y,
                                                                     OptionalRows gate, Optional gate_row, OptionalRows scale,
                                                                     Optional scale_row, Tensor stats, bool need_x, bool need_y,
                                                                     bool need_gate, bool need_modulation) {
  const int64_t B = added.size(0), N = added.size(1), C = added.size(2);
  const Dtype dtype = dtype_of(added.scalar_type());
  const ScalarType acc = dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float;
  Tensor dx = torch::stable::new_empty(added, need_x ? Shape{B, N, C} : Shape{0}), dy = torch::stable::new_empty(added, need_y ? Shape{B, N, C} : Shape{0});
  // a gradient a token for a vector a token, else their sum; dshift is a sum always: a token's is grad_h itself
  const auto sums = [&](bool need, const Optional& vector) {
    return torch::stable::new_empty(added, need ? Shape{B, vector ? vector->size(1) : 1, C} : Shape{0}, acc);
  };
  Tensor dgate = sums(need_gate, gate), dshift = sums(need_modulation, {}), dscale = sums(need_modulation, scale);
  const Backward f{B, N, C, Tokens(grad_added), Tokens(grad_h), Tokens(added), Tokens(y), need_x ? Tokens(dx) : Tokens(),
                   need_y ? Tokens(dy) : Tokens(), gate, gate_row, scale, scale_row, stats.data_ptr(), dgate.data_ptr(),
                   dshift.data_ptr(), dscale.data_ptr(), need_x, need_y, need_gate, need_modulation};
  switch (dtype) {
    case Dtype::f32: W2S_DISPATCH(run_modulate_backward<Dtype::f32>)(f); break;
    case Dtype::bf16: W2S_DISPATCH(run_modulate_backward<Dtype::bf16>)(f); break;
    case Dtype::f16: W2S_DISPATCH(run_modulate_backward<Dtype::f16>)(f); break;
    case Dtype::f64: W2S_DISPATCH(run_modulate_backward<Dtype::f64>)(f); break;
  }
  return {dx, dy, dgate, dshift, dscale};
}

}  // namespace
}  // namespace modulation
}  // namespace w2s

STABLE_TORCH_LIBRARY_IMPL(w2s_fast, CPU, m) {
  m.impl("modulate", W2S_BOX(&w2s::modulation::modulate));
  m.impl("modulate_backward", W2S_BOX(&w2s::modulation::modulate_backward));
}
