#include "cpu/prototypes/prototype_distance.h"

#include "cpu/convert.h"
#include "cpu/gemm.h"
#include "cpu/log_sum_exp.h"
#include "cpu/tensors.h"

// Blocks of ROWS rows against tiles of COLUMNS prototypes: one product into a tile of scores, then each row takes from its
// part what it keeps. Memory does not grow with N or K. Floor: 2 N K D, x read once a tile of prototypes.
namespace w2s {
namespace {

constexpr int64_t ROWS = 512, COLUMNS = 2048;

using Scores = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

struct PrototypeCall {
  Rowwise x, prototypes;
  Tensor offset;
  const int64_t* labels;
  double temperature;
  int64_t k;
  bool need_lse, need_square;
};

Operand matrix(const Tensor& t) {
  return {t.data_ptr(), dtype_of(t), t.size(0), t.size(1), t.size(0) > 1 ? t.stride(0) : t.size(1), 1};
}

template <class A>
Scores scores(const PrototypeCall& call) {
  const int64_t N = call.x.size(0), K = call.prototypes.size(0), D = call.x.size(1), k = call.k;
  const auto wanted = [&](bool want) { return fresh(call.x, {want ? N : 0}, scalar_type<A>); };
  Tensor top = fresh(call.x, {N, k}, scalar_type<A>), index = fresh(call.x, {N, k}, ScalarType::Long);
  Tensor lse = wanted(call.need_lse), at_label = wanted(call.labels != nullptr), square = wanted(call.need_square);
  A *tops = static_cast<A*>(top.data_ptr()), *label_scores = static_cast<A*>(at_label.data_ptr());
  int64_t* indices = static_cast<int64_t*>(index.data_ptr());
  std::fill(tops, tops + N * k, -std::numeric_limits<A>::infinity());
  std::fill(indices, indices + N * k, int64_t(-1));

  CallMemory memory{call.x, {}};
  const int64_t width = std::min(K, COLUMNS), ld = round_up(width, 16) + 16;
  A* raw = memory.get<A>(std::min(N, ROWS) * ld);
  A* offset = memory.get<A>(K + 32);
  std::fill(offset, offset + K + 32, A(0));
  const auto& convert = kernels<ConvertKernels, A>();
  convert.widen(call.offset.data_ptr(), dtype_of(call.offset), K, offset);
  const Operand x = matrix(call.x), p = matrix(call.prototypes);
  const bool dots = sizeof(A) == 4 && x.dtype == Dtype::bf16 && p.dtype == Dtype::bf16 && has_bf16_dot();
  const auto& kernel = kernels<PrototypeKernels, A>();
  std::vector<LogSumExp> sums(size_t(std::min(N, ROWS)));
  std::vector<char> lost(sums.size());

  for (int64_t r0 = 0; r0 < N; r0 += ROWS) {
    const int64_t rows = std::min(ROWS, N - r0);
    std::fill(sums.begin(), sums.end(), LogSumExp());
    std::fill(lost.begin(), lost.end(), char(0));
    for (int64_t c0 = 0; c0 < K; c0 += COLUMNS) {
      const int64_t columns = std::min(COLUMNS, K - c0);
      const Operand some = x.part(r0, rows), others = p.part(c0, columns).t();
      bool done = false;
      if constexpr (sizeof(A) == 4)
        if (dots) gemm_bf16(some, others, {raw, ld, 1}, false), done = true;
      if (!done) gemm(some, others, Target<A>{raw, ld, 1}, A(1), false);
      parallel_items(rows, grain_of(4 * columns), [&](int64_t r) {
        const int64_t n = r0 + r;
        PrototypeRow<A> row{tops + n * k, indices + n * k, k, call.labels ? call.labels[n] : -1, call.need_lse, 0, 0, 0, false};
        kernel.row({raw + r * ld, offset + c0, columns, c0, A(1 / call.temperature)}, row);
        if (call.need_lse) sums[size_t(r)].add(double(row.max), double(row.sum));
        if (row.label >= c0 && row.label < c0 + columns) label_scores[n] = row.at_label;
        lost[size_t(r)] |= char(row.nan);
      });
    }
    parallel_items(rows, grain_of(call.need_square ? D : 1), [&](int64_t r) {
      const int64_t n = r0 + r;
      if (call.need_square)
        static_cast<A*>(square.data_ptr())[n] = A(kernel.square(Rows(call.x).at(n, 0), x.dtype, D));
      if (call.need_lse) static_cast<A*>(lse.data_ptr())[n] = A(sums[size_t(r)].value());
      if (!lost[size_t(r)]) return;
      std::fill(tops + n * k, tops + (n + 1) * k, std::numeric_limits<A>::quiet_NaN());
      std::fill(indices + n * k, indices + (n + 1) * k, int64_t(-1));
    });
  }
  return {top, index, lse, at_label, square};
}

Scores prototype_distance(Rowwise x, Rowwise prototypes, Tensor offset, std::optional<Tensor> labels, double temperature, int64_t k,
                          bool need_lse, bool need_square) {
  const int64_t K = prototypes.size(0);
  check(k >= 1 && k <= K, "k must be in [1, K]");
  check(prototypes.size(1) == x.size(1) && offset.numel() == K, "prototypes must be [K, D] and offset [K]");
  check(!labels || labels->numel() == x.size(0), "labels must be of shape [N]");
  const int64_t* classes = labels ? places(*labels, K, "labels") : nullptr;
  const PrototypeCall call{x, prototypes, offset, classes, temperature, k, need_lse, need_square};
  return with_type(is_double(x) || is_double(prototypes), [&](auto zero) { return scores<decltype(zero)>(call); });
}

}  // namespace
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) { m.add<&w2s::prototype_distance>("prototype_distance"); }
