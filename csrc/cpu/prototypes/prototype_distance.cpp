#include "cpu/prototypes/prototype_distance.h"

#include "cpu/convert.h"
#include "cpu/log_sum_exp.h"
#include "cpu/products.h"

// Blocks of ROWS rows against tiles of COLUMNS prototypes: one product into a tile of scores, then each row takes from its
// part what it keeps. Memory does not grow with N or K. Floor: 2 N K D, x read once a tile of prototypes.
//
// The gradient is that of a head with a bias. Where all scores are few enough, the products x p^T stay for it (`kept`, [N, K]
// padded) and it has two products in place of three: on a machine whose product is the library's, one more is what a plain
// implementation does not pay. Floor: 4 N K D and one pass over what was kept; dz stays in L2.
namespace w2s {
namespace {

constexpr int64_t ROWS = 512, COLUMNS = 2048;

using Scores = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

struct PrototypeCall {
  Rowwise x, prototypes;
  Tensor offset;
  const int64_t* labels;
  double temperature;
  int64_t k;
  bool need_lse, need_square, need_kept;
};

// The offsets in the accumulating type, with zeros behind them: kernels read whole vectors.
template <class A>
A* widened(CallMemory& memory, const Tensor& offset) {
  const int64_t K = offset.numel();
  A* to = memory.get<A>(K + 32);
  std::fill(to, to + K + 32, A(0));
  kernels<ConvertKernels, A>().widen(offset.data_ptr(), dtype_of(offset), K, to);
  return to;
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
  const int64_t scratch_ld = round_up(std::min(K, COLUMNS), 16) + 16;
  const int64_t block = scratch_ld <= 256 ? 2 * ROWS : ROWS;  // a call of the product costs more than narrow scores in L2
  Tensor kept = call.need_kept ? fresh(call.x, {N, round_up(K, 16)}, scalar_type<A>) : wanted(false);
  A* scratch = call.need_kept ? nullptr : memory.get<A>(std::min(N, block) * scratch_ld);
  const A* offset = widened<A>(memory, call.offset);
  const Operand x = matrix(call.x), p = matrix(call.prototypes);
  const auto& kernel = kernels<PrototypeKernels, A>();
  std::vector<LogSumExp> sums(size_t(std::min(N, block)));
  std::vector<char> lost(sums.size());

  for (int64_t r0 = 0; r0 < N; r0 += block) {
    const int64_t rows = std::min(block, N - r0);
    std::fill(sums.begin(), sums.end(), LogSumExp());
    std::fill(lost.begin(), lost.end(), char(0));
    for (int64_t c0 = 0; c0 < K; c0 += COLUMNS) {
      const int64_t columns = std::min(COLUMNS, K - c0);
      const Operand some = x.part(r0, rows), others = p.part(c0, columns).t();
      A* raw = call.need_kept ? static_cast<A*>(kept.data_ptr()) + r0 * round_up(K, 16) + c0 : scratch;
      const int64_t ld = call.need_kept ? round_up(K, 16) : scratch_ld;
      multiply(some, others, Target<A>{raw, ld, 1});
      const bool last = c0 + columns == K;
      parallel_items(rows, grain_of(4 * columns + (last && call.need_square ? D : 0)), [&](int64_t r) {
        const int64_t n = r0 + r;
        PrototypeRow<A> row{tops + n * k, indices + n * k, k, call.labels ? call.labels[n] : -1, call.need_lse, 0, 0, 0, false};
        kernel.row({raw + r * ld, offset + c0, columns, c0, A(1 / call.temperature)}, row);
        if (call.need_lse) sums[size_t(r)].add(double(row.max), double(row.sum));
        if (row.label >= c0 && row.label < c0 + columns) label_scores[n] = row.at_label;
        lost[size_t(r)] |= char(row.nan);
        if (!last) return;
        if (call.need_kept) std::fill(raw + r * ld + columns, raw + r * ld + round_up(columns, 16), A(0));
        if (call.need_square) static_cast<A*>(square.data_ptr())[n] = A(kernel.square(Rows(call.x).at(n, 0), x.dtype, D));
        if (call.need_lse) static_cast<A*>(lse.data_ptr())[n] = A(sums[size_t(r)].value());
        if (!lost[size_t(r)]) return;
        std::fill(tops + n * k, tops + (n + 1) * k, std::numeric_limits<A>::quiet_NaN());
        std::fill(indices + n * k, indices + (n + 1) * k, int64_t(-1));
      });
    }
  }
  return {top, index, lse, at_label, square, kept};
}

Scores prototype_distance(Rowwise x, Rowwise prototypes, Tensor offset, std::optional<Tensor> labels, double temperature, int64_t k,
                          bool need_lse, bool need_square, bool need_kept) {
  const int64_t K = prototypes.size(0);
  check(k >= 1 && k <= K, "k must be in [1, K]");
  check(prototypes.size(1) == x.size(1) && offset.numel() == K, "prototypes must be [K, D] and offset [K]");
  check(!labels || labels->numel() == x.size(0), "labels must be of shape [N]");
  const int64_t* classes = labels ? places(*labels, K, "labels") : nullptr;
  const PrototypeCall call{x, prototypes, offset, classes, temperature, k, need_lse, need_square, need_kept};
  return with_type(is_double(x) || is_double(prototypes), [&](auto zero) { return scores<decltype(zero)>(call); });
}

struct GradientCall {
  Tensor x, prototypes, offset, lse, ids, coef_ids, coef_lse, kept;
  double temperature;
  bool need_x, need_prototypes, need_offset;
};

template <class A>
Gradients gradients(const GradientCall& call) {
  const int64_t N = call.x.size(0), D = call.x.size(1), K = call.prototypes.size(0), C = call.ids.size(1), ldk = round_up(K, 16);
  const ScalarType sums = scalar_type<A>;
  check(call.x.scalar_type() == sums && call.prototypes.scalar_type() == sums, "x and prototypes must be of the dtype of the sums");
  expect(call.offset, "offset", {K}), expect(call.lse, "lse", {N}, sums), expect(call.coef_lse, "coef_lse", {N}, sums);
  expect(call.ids, "ids", {N, C}), expect(call.coef_ids, "coef_ids", {N, C}, sums), expect(call.kept, "kept", {N, ldk}, sums);
  Tensor dx = empty_of(call.x, call.need_x), dp = empty_of(call.prototypes, call.need_prototypes);
  Tensor doffset = empty_of(call.offset, call.need_offset);
  CallMemory memory{call.x, {}};
  const int64_t ld = round_up(std::min(K, COLUMNS), 16) + 16;
  A* dz = memory.get<A>(std::min(std::max<int64_t>(N, 1), ROWS) * ld);
  A* wide_offset = memory.get<A>(K);  // doffset's sums
  A* ones = memory.get<A>(ROWS);
  std::fill(ones, ones + ROWS, A(1));
  const A* offset = widened<A>(memory, call.offset);
  const int64_t* ids = integers<int64_t>(call.ids);
  const A *lse = static_cast<const A*>(call.lse.data_ptr()), *coef = static_cast<const A*>(call.coef_lse.data_ptr());
  const A *coefs = static_cast<const A*>(call.coef_ids.data_ptr()), *kept = static_cast<const A*>(call.kept.data_ptr());
  const Operand x = matrix(call.x), p = matrix(call.prototypes);
  const A inverse = A(1 / call.temperature);
  const auto& kernel = kernels<PrototypeKernels, A>();
  for (int64_t i = 0; i < N * C; ++i) check(ids[i] < K, "ids must be below the number of prototypes");

  for (int64_t r0 = 0; r0 < N; r0 += ROWS) {
    const int64_t rows = std::min(ROWS, N - r0);
    for (int64_t c0 = 0; c0 < K; c0 += COLUMNS) {
      const int64_t columns = std::min(COLUMNS, K - c0);
      parallel_items(rows, grain_of(8 * columns), [&](int64_t r) {
        const int64_t n = r0 + r;
        A* out = dz + r * ld;
        bool counts = coef[n] != 0;
        for (int64_t c = 0; c < C; ++c) counts |= coefs[n * C + c] != 0;
        if (!counts) {  // also if its scores are NaN
          std::fill(out, out + columns, A(0));
          return;
        }
        kernel.gradient({kept + n * ldk + c0, offset + c0, columns, c0, inverse}, lse[n], coef[n], out);
        for (int64_t c = 0; c < C; ++c) {
          const int64_t id = ids[n * C + c];  // negative: none
          if (id >= c0 && id < c0 + columns) out[id - c0] += coefs[n * C + c];
        }
      });
      const Operand part{dz, own_dtype<A>, rows, columns, ld, 1};
      if (call.need_x)
        gemm(part, p.part(c0, columns), Target<A>{static_cast<A*>(dx.data_ptr()) + r0 * D, D, 1}, inverse, c0 > 0);
      if (call.need_prototypes)
        gemm(part.t(), x.part(r0, rows), Target<A>{static_cast<A*>(dp.data_ptr()) + c0 * D, D, 1}, inverse, r0 > 0);
      if (call.need_offset) gemm({ones, own_dtype<A>, 1, rows, rows, 1}, part, Target<A>{wide_offset + c0, K, 1}, inverse, r0 > 0);
    }
  }
  if (N == 0) {
    for (Tensor* t : {&dp, &doffset}) torch::stable::zero_(*t);
  } else if (call.need_offset) {
    kernels<ConvertKernels, A>().narrow(wide_offset, K, dtype_of(doffset), doffset.data_ptr());
  }
  return {dx, dp, doffset};
}

Gradients prototype_distance_backward(Rowwise x, Rowwise prototypes, Tensor offset, Tensor lse, Tensor ids, Tensor coef_ids,
                                      Tensor coef_lse, Tensor kept, double temperature, bool need_x, bool need_prototypes,
                                      bool need_offset) {
  check(prototypes.size(1) == x.size(1) && offset.numel() == prototypes.size(0), "prototypes must be [K, D] and offset [K]");
  check(ids.dim() == 2, "ids must have two dimensions");
  const GradientCall call{x, prototypes, offset, lse, ids, coef_ids, coef_lse, kept, temperature, need_x, need_prototypes, need_offset};
  return with_type(is_double(x) || is_double(prototypes), [&](auto zero) { return gradients<decltype(zero)>(call); });
}

}  // namespace
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) {
  m.add<&w2s::prototype_distance>("prototype_distance");
  m.add<&w2s::prototype_distance_backward>("prototype_distance_backward");
}
