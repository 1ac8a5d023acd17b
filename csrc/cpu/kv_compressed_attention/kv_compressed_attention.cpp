#include "cpu/kv_compressed_attention/attention_calls.h"
#include "cpu/kv_compressed_attention/compression.h"
#include "cpu/recycled.h"

// The whole path on packed qkv [B, N, 3, C]: compression of slots 1 and 2, then attention of slot 0's heads.
namespace w2s {
namespace {

using attention::Heads;

attention::Problem heads_of(const Tensor& qkv, const Tensor& keys, int64_t first, int64_t M, int64_t heads, double scale,
                            const Tensor& out, const Tensor& softmax) {
  const int64_t N = qkv.size(1), C = qkv.size(3), D = C / heads;
  Heads o;
  o.data = static_cast<char*>(out.data_ptr());
  o.dtype = dtype_of(out);
  o.bytes = bytes_of(o.dtype);
  o.batch = out.stride(0) * o.bytes;
  o.token = out.stride(1) * o.bytes;
  o.slot = D * o.bytes;
  return {qkv.size(0), N, M, heads, D, scale, Slots(qkv).heads(0, D), Slots(keys).heads(first, D),
          Slots(keys).heads(first + 1, D), o, softmax.data_ptr()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> kv_compressed_attention(Rowwise qkv, compress::CompressionArguments compression, double eps,
                                                                   int64_t num_heads, double scale) {
  const compress::Problem p(qkv, 1, compression);
  const int64_t N = qkv.size(1);
  const bool small = p.ratio > 1;
  using Shape = std::vector<int64_t>;
  Tensor out = fresh(qkv, {p.B, N, p.C});
  Tensor softmax = fresh(qkv, {2, p.B, num_heads, N}, wide_type(p.f64));
  Tensor kv = fresh(qkv, small ? Shape{p.B, p.M, 2, p.C} : Shape{0});
  Tensor stats = fresh(qkv, small && p.normalize ? Shape{p.B, p.M, 2, 2} : Shape{0}, wide_type(p.f64));
  if (small) compress::forward(p, Slots(qkv), eps, Slots(kv), stats.data_ptr());
  const attention::Problem a = heads_of(qkv, small ? kv : qkv, small ? 0 : 1, small ? p.M : N, num_heads, scale, out, softmax);
  attention::forward(a, p.f64);
  return {out, softmax, kv, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> kv_compressed_attention_backward(
    Rowwise grad, Rowwise qkv, compress::CompressionArguments compression, int64_t num_heads, double scale, Tensor out, Tensor softmax, Tensor kv,
    Tensor stats, bool need_params) {
  const compress::Problem p(qkv, 1, compression);
  const int64_t N = qkv.size(1), D = p.C / num_heads;
  const bool small = p.ratio > 1;
  expect(qkv, "qkv", {p.B, p.height * p.width, 3, p.C}), expect(grad, "grad", {p.B, N, p.C}, qkv.scalar_type()), expect_like(out, "out", grad);
  expect(softmax, "softmax", {2, p.B, num_heads, N}, wide_type(p.f64));
  if (small) expect(kv, "kv", {p.B, p.M, 2, p.C}, qkv.scalar_type());
  if (small && p.normalize) expect(stats, "stats", {p.B, p.M, 2, 2}, wide_type(p.f64));
  Tensor dqkv = recycled_empty(qkv, {p.B, N, 3, p.C});
  const Tensor dkv = small ? fresh(qkv, {p.B, p.M, 2, p.C}, wide_type(p.f64)) : dqkv;  // dk', dv' are not rounded
  const attention::Problem a =
      heads_of(qkv, small ? kv : qkv, small ? 0 : 1, small ? p.M : N, num_heads, scale, out, softmax);
  Heads g = a.out;
  g.data = static_cast<char*>(grad.data_ptr());
  g.batch = grad.stride(0) * g.bytes;
  g.token = grad.stride(1) * g.bytes;
  const int64_t first = small ? 0 : 1;
  const attention::Gradients d{g, Slots(dqkv).heads(0, D), Slots(dkv).heads(first, D), Slots(dkv).heads(first + 1, D), true, true};
  attention::backward(a, d, p.f64);
  if (!small) {
    std::vector<Tensor> none;
    for (int i = 0; i < 4; ++i) none.push_back(fresh(qkv, {0}, wide_type(p.f64)));
    return {dqkv, none[0], none[1], none[2], none[3]};
  }
  const compress::Parameters found =
      compress::backward(p, qkv, Slots(dkv), Slots(qkv), stats.data_ptr(), Slots(dqkv), true, need_params);
  return {dqkv, found.weight, found.bias, found.norm_weight, found.norm_bias};
}

}  // namespace
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) {
  m.add<&w2s::kv_compressed_attention>("kv_compressed_attention");
  m.add<&w2s::kv_compressed_attention_backward>("kv_compressed_attention_backward");
}
