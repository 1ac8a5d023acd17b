#include "cpu/kv_compressed_attention/attention_calls.h"
#include "cpu/tensors.h"

namespace w2s {
namespace attention {
namespace {

Problem problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& softmax, double scale) {
  return {q.size(0), q.size(1), k.size(1), q.size(2), q.size(3), scale, Heads(q), Heads(k), Heads(v), Heads(out), softmax.data_ptr()};
}

std::tuple<Tensor, Tensor> compressed_attention(Rowwise q, Rowwise k, Rowwise v, double scale) {
  Tensor softmax = fresh(q, {2, q.size(0), q.size(2), q.size(1)}, wide_type(q));
  if (std::optional<Tensor> made = forward_made(problem(q, k, v, q, softmax, scale), is_double(q))) return {*made, softmax};
  Tensor out = empty_of(q);
  forward(problem(q, k, v, out, softmax, scale), is_double(q));
  return {out, softmax};
}

std::tuple<Tensor, Tensor, Tensor> compressed_attention_backward(Rowwise grad, Rowwise q, Rowwise k, Rowwise v, Tensor out,
                                                                 Tensor softmax, double scale, bool need_q, bool need_kv) {
  expect(k, "k", {q.size(0), k.size(1), q.size(2), q.size(3)}, q.scalar_type()), expect_like(v, "v", k);
  expect_like(grad, "grad", q), expect_like(out, "out", q);
  expect(softmax, "softmax", {2, q.size(0), q.size(2), q.size(1)}, wide_type(q));
  Tensor dq = empty_of(q, need_q), dk = empty_of(k, need_kv), dv = empty_of(v, need_kv);
  Gradients g{Heads(grad), {}, {}, {}, need_q, need_kv};
  if (need_q) g.dq = Heads(dq);
  if (need_kv) g.dk = Heads(dk), g.dv = Heads(dv);
  if (need_q || need_kv) backward(problem(q, k, v, out, softmax, scale), g, is_double(q));
  return {dq, dk, dv};
}

}  // namespace
}  // namespace attention
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) {
  m.add<&w2s::attention::compressed_attention>("compressed_attention");
  m.add<&w2s::attention::compressed_attention_backward>("compressed_attention_backward");
}
