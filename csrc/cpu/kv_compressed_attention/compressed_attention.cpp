#include "cpu/kv_compressed_attention/attention.h"

namespace w2s {
namespace attention {
namespace {

Problem problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& softmax, double scale) {
  return {q.size(0), q.size(1), k.size(1), q.size(2), q.size(3), scale, Heads(q), Heads(k), Heads(v), Heads(out), softmax.data_ptr()};
}

Tensor like(const Tensor& t, bool wanted) {
  if (!wanted) return torch::stable::new_empty(t, {0});
  return torch::stable::new_empty(t, {t.size(0), t.size(1), t.size(2), t.size(3)});
}

std::tuple<Tensor, Tensor> compressed_attention(Rowwise q, Rowwise k, Rowwise v, double scale) {
  const bool f64 = q.scalar_type() == ScalarType::Double;
  Tensor softmax = torch::stable::new_empty(q, {2, q.size(0), q.size(2), q.size(1)}, f64 ? ScalarType::Double : ScalarType::Float);
  if (std::optional<Tensor> made = forward_made(problem(q, k, v, q, softmax, scale), f64)) return {*made, softmax};
  Tensor out = like(q, true);
  forward(problem(q, k, v, out, softmax, scale), f64);
  return {out, softmax};
}

std::tuple<Tensor, Tensor, Tensor> compressed_attention_backward(Rowwise grad, Rowwise q, Rowwise k, Rowwise v, Tensor out,
                                                                 Tensor softmax, double scale, bool need_q, bool need_kv) {
  Tensor dq = like(q, need_q), dk = like(k, need_kv), dv = like(v, need_kv);
  Gradients g{Heads(grad), {}, {}, {}, need_q, need_kv};
  if (need_q) g.dq = Heads(dq);
  if (need_kv) g.dk = Heads(dk), g.dv = Heads(dv);
  if (need_q || need_kv) backward(problem(q, k, v, out, softmax, scale), g, q.scalar_type() == ScalarType::Double);
  return {dq, dk, dv};
}

}  // namespace
}  // namespace attention
}  // namespace w2s

STABLE_TORCH_LIBRARY_IMPL(w2s_fast, CPU, m) {
  m.impl("compressed_attention", W2S_BOX(&w2s::attention::compressed_attention));
  m.impl("compressed_attention_backward", W2S_BOX(&w2s::attention::compressed_attention_backward));
}
