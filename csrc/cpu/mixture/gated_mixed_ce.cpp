#include "cpu/mixture/gated_mixed_ce.h"

#include "cpu/output.h"
#include "cpu/recycled.h"
#include "cpu/tensors.h"

namespace w2s {
namespace {

// a target is a place to read and write, and under torch.compile nobody has looked at it yet
void check_target(const int64_t* target, int64_t n, int64_t classes, int64_t ignored) {
  for (int64_t i = 0; i < n; ++i)
    check((target[i] >= 0 && target[i] < classes) || target[i] == ignored, [&] {
      return "target must be in [0, " + std::to_string(classes) + ") or ignore_index, got " + std::to_string(target[i]) + ".";
    });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_mixed_ce(Rowwise a, Rowwise b, Tensor target, Tensor gate, Tensor factor, int64_t ignore_index,
                                                          bool logits, bool need_a, bool need_b) {
  const int64_t n = a.size(0), classes = a.size(1);
  expect(b, "b", {n, classes}), expect(target, "target", {n}), expect(gate, "gate", {n}), expect(factor, "factor", {});
  const int64_t* y = integers<int64_t>(target);
  check_target(y, n, classes, ignore_index);
  const bool wide = any_double({&a, &b, &gate});
  const std::vector<int64_t> whole = {n, classes}, none = {0};
  const Tensors made = recycled_empty({a, b}, {need_a ? whole : none, need_b ? whole : none});
  Tensor loss = fresh(a, {}, wide_type(wide)), dgate = fresh(a, {n}, wide_type(wide));
  const GatedMixedCe s{n, classes, ignore_index, Rows(a), Rows(b), y, Flat(gate), numbers(factor)[0], logits,
                       need_a ? Rows(made[0]) : Rows(), need_b ? Rows(made[1]) : Rows(), Flat(dgate)};
  with_kernels<GatedMixedCeKernels>(wide, [&](const auto& of) { Flat(loss).put(0, of.loss(s)); });
  return {loss, made[0], made[1], dgate};
}

}  // namespace
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) { m.add<&w2s::gated_mixed_ce>("gated_mixed_ce"); }
