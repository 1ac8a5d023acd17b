#include "cpu/kv_compressed_attention/compression.h"
#include "cpu/recycled.h"

namespace w2s {
namespace compress {
namespace {

std::tuple<Tensor, Tensor> kv_compress(Rowwise x, int64_t first, CompressionArguments compression, double eps) {
  const Problem p(x, first, compression);
  Tensor kv = fresh(x, {p.B, p.M, p.groups, p.C});
  Tensor stats = fresh(x, p.normalize ? std::vector<int64_t>{p.B, p.M, p.groups, 2} : std::vector<int64_t>{0}, wide_type(p.f64));
  forward(p, Slots(x), eps, Slots(kv), stats.data_ptr());
  return {kv, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> kv_compress_backward(Rowwise grad, Rowwise x, int64_t first,
                                                                        CompressionArguments compression, Tensor stats, bool need_x,
                                                                        bool need_params) {
  const Problem p(x, first, compression);
  const int64_t N = x.size(1), S = x.size(2);
  expect(x, "x", {p.B, p.height * p.width, S, p.C}), expect(grad, "grad", {p.B, p.M, p.groups, p.C});
  if (p.normalize) expect(stats, "stats", {p.B, p.M, p.groups, 2}, wide_type(p.f64));
  Tensor dx = recycled_empty(x, need_x ? std::vector<int64_t>{p.B, N, S, p.C} : std::vector<int64_t>{0});
  const Slots out = need_x ? Slots(dx) : Slots();
  const Parameters found = backward(p, x, Slots(grad), Slots(x), stats.data_ptr(), out, need_x, need_params);
  if (need_x && first > 0)
    with_kernels<CompressKernels>(p.f64, [&](const auto& kernel) { kernel.clear(out, p.B, N, first * p.C * out.bytes); });
  return {dx, found.weight, found.bias, found.norm_weight, found.norm_bias};
}

}  // namespace
}  // namespace compress
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) {
  m.add<&w2s::compress::kv_compress>("kv_compress");
  m.add<&w2s::compress::kv_compress_backward>("kv_compress_backward");
}
