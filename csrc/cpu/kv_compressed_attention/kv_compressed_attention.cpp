#include "cpu/kv_compressed_attention/attention.h"
#include "cpu/kv_compressed_attention/compress.h"
#include "cpu/kv_compressed_attention/recycled.h"

// The whole path on packed qkv [B, N, 3, C]: compression of slots 1 and 2, then attention of slot 0's heads.
namespace w2s {
namespace {

using attention::Heads;
using compress::Slots;

attention::Problem heads_of(const Tensor& qkv, const Tensor& keys, int64_t first, int64_t M, int64_t heads, double scale,
                            const Tensor& out, const Tensor& softmax) {
  const int64_t N = qkv.size(1), C = qkv.size(3), D = C / heads;
  Heads o;
  o.data = static_cast<char*>(out.data_ptr());
  o.dtype = dtype_of(out.scalar_type());
  o.bytes = bytes_of(o.dtype);
  o.batch = out.stride(0) * o.bytes;
  o.token = out.stride(1) * o.bytes;
  o.head = D * o.bytes;
  return {qkv.size(0), N, M, heads, D, scale, Heads::of_slot(qkv, 0, D), Heads::of_slot(keys, first, D),
          Heads::of_slot(keys, first + 1, D), o, softmax.data_ptr()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> kv_compressed_attention(Rowwise qkv, W2S_COMPRESSION_PARAMETERS, double eps,
                                                                   int64_t num_heads, double scale) {
  const compress::Problem p(qkv, 1, W2S_COMPRESSION_ARGUMENTS);
  const int64_t N = qkv.size(1);
  const bool small = ratio > 1;
  using Shape = std::vector<int64_t>;
  Tensor out = torch::stable::new_empty(qkv, {p.B, N, p.C});
  Tensor softmax = torch::stable::new_empty(qkv, {2, p.B, num_heads, N}, p.acc());
  Tensor kv = torch::stable::new_empty(qkv, small ? Shape{p.B, p.M, 2, p.C} : Shape{0});
  Tensor stats = torch::stable::new_empty(qkv, small && normalize ? Shape{p.B, p.M, 2, 2} : Shape{0}, p.acc());
  if (small) compress::forward(p, Slots(qkv), eps, Slots(kv), stats.data_ptr());
  attention::forward(heads_of(qkv, small ? kv : qkv, small ? 0 : 1, small ? p.M : N, num_heads, scale, out, softmax), p.f64);
  return {out, softmax, kv, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> kv_compressed_attention_backward(
    Rowwise grad, Rowwise qkv, W2S_COMPRESSION_PARAMETERS, int64_t num_heads, double scale, Tensor out, Tensor softmax, Tensor kv,
    Tensor stats, bool need_params) {
  const compress::Problem p(qkv, 1, W2S_COMPRESSION_ARGUMENTS);
  const int64_t N = qkv.size(1), D = p.C / num_heads;
  const bool small = ratio > 1;
  Tensor dqkv = recycled_empty(qkv, {p.B, N, 3, p.C});
  const Tensor dkv = small ? torch::stable::new_empty(qkv, {p.B, p.M, 2, p.C}, p.acc()) : dqkv;  // dk', dv' are not rounded
  const attention::Problem a =
      heads_of(qkv, small ? kv : qkv, small ? 0 : 1, small ? p.M : N, num_heads, scale, out, softmax);
  Heads g = a.out;
  g.data = static_cast<char*>(grad.data_ptr());
  g.batch = grad.stride(0) * g.bytes;
  g.token = grad.stride(1) * g.bytes;
  const int64_t first = small ? 0 : 1;
  attention::backward(a, {g, Heads::of_slot(dqkv, 0, D), Heads::of_slot(dkv, first, D), Heads::of_slot(dkv, first + 1, D), true, true},
                      p.f64);
  if (!small) {
    std::vector<Tensor> none;
    for (int i = 0; i < 4; ++i) none.push_back(torch::stable::new_empty(qkv, {0}, p.acc()));
    return {dqkv, none[0], none[1], none[2], none[3]};
  }
  const compress::Parameters found =
      compress::backward(p, qkv, Slots(dkv), Slots(qkv), stats.data_ptr(), Slots(dqkv), true, need_params);
  return {dqkv, found.weight, found.bias, found.norm_weight, found.norm_bias};
}

}  // namespace
}  // namespace w2s

STABLE_TORCH_LIBRARY_IMPL(w2s_fast, CPU, m) {
  m.impl("kv_compressed_attention", W2S_BOX(&w2s::kv_compressed_attention));
  m.impl("kv_compressed_attention_backward", W2S_BOX(&w2s::kv_compressed_attention_backward));
}
