// projected_step, in one of two orders. By tiles (P on the right, p of the accumulating type): P is packed once for both
// products; rows of G go through R, moments and, of GaLore, the product with P^T, whose tiles are written to p as they come
// from registers, keep p - rate phi G with them. Of Fira the second product is a second round, as the limiter stands between.
// By whole matrices: R from a product, moments and sums in one pass over R, then panels of p: p = keep p - rate phi G, to
// which a product adds while the panel is in cache; a p of another dtype than the product's takes it from scratch. That one
// serves where the library's products are faster on this machine.
//
// 4 m n r FLOPs, and G read twice (once more for its sums of squares, in cache), p read and written once. A bfloat16 p
// rounds what the second product adds, so that one takes bfloat16 operands where the machine multiplies those faster.
#include "cpu/optimizers/projected_step.h"

#include <cmath>
#include <cstring>

#include "cpu/choice.h"
#include "cpu/convert.h"
#include "cpu/gemm.h"
#include "cpu/tensors.h"

namespace w2s {
namespace {

struct Rule {
  double beta1, beta2, eps, rate, keep, scale, limit;
  bool right;
  int64_t outside;  // 0 nothing, 1 a factor a row or column, 2 one factor
  static constexpr int arguments = 9;
};

constexpr int64_t PANEL = 2 << 20, ROWS = 256;  // bytes of a panel of p, but of that many rows: a product packs P for each
constexpr int64_t DEPTH = 384, ROWS_OF_BLOCK = 168;  // of a tiled step: what a piece packs stays in L2
constexpr int64_t COLUMNS = 256;    // of an item, where sums are over rows

Operand operand(const Tensor& t) { return {t.data_ptr(), dtype_of(t), t.size(0), t.size(1), t.stride(0), t.stride(1)}; }

// work(block) over [top, bottom) x columns: rows are items where `by_row`, else groups of columns
template <class F>
void blocks(int64_t top, int64_t bottom, int64_t columns, bool by_row, const F& work) {
  if (by_row)
    parallel_items(bottom - top, grain_of(columns), [&](int64_t i) { work(Block{top + i, top + i + 1, 0, columns}); });
  else
    parallel_items(pieces(columns, COLUMNS), grain_of((bottom - top) * COLUMNS), [&](int64_t i) {
      work(Block{top, bottom, i * COLUMNS, std::min((i + 1) * COLUMNS, columns)});
    });
}

template <class A>
struct Step {
  const Tensor &p, &grad, &basis;
  const Rule& rule;
  int64_t m, n, r, rows, columns;  // rows x columns: of R
  const ProjectedKernels<A>& kernel = kernels<ProjectedKernels, A>();
  CallMemory memory{basis, {}};
  Moments<A> s{};
  std::vector<double> of_psi, of_low, of_grad;
  std::vector<A> phi;

  int64_t panel() const { return std::max(ROWS, PANEL / std::max<int64_t>(4 * n, 1)); }

  void project() {
    A* low = memory.get<A>(rows * columns);
    s.low = low;
    const Operand G = operand(grad), P = operand(basis);
    for (int64_t top = 0; top < m; top += panel()) {
      const int64_t count = std::min(panel(), m - top);
      if (rule.right) gemm(G.part(top, count), P, Target<A>{low + top * columns, columns, 1}, A(1), false);
      else gemm(P.part(top, count).t(), G.part(top, count), Target<A>{low, columns, 1}, A(1), top > 0);
      if (rule.outside)
        blocks(top, top + count, n, rule.right, [&](const Block& b) { kernel.squares(Rows(grad), rule.right, of_grad.data(), b); });
    }
  }

  // phi of every row or column, with the limiter in it; returns |S|
  double factors(const std::optional<Tensor>& previous) {
    const size_t count = of_psi.size();
    if (rule.outside == 2) {
      for (auto* sums : {&of_psi, &of_low, &of_grad}) {
        double all = 0;
        for (const double x : *sums) all += x;
        sums->assign(1, all);
      }
    }
    const double share = 2 * rule.scale - rule.scale * rule.scale;
    std::vector<double> found(of_psi.size());
    double square = 0;
    for (size_t i = 0; i < found.size(); ++i) {
      found[i] = std::sqrt(of_psi[i]) / (std::sqrt(of_low[i]) + 1e-8);
      const double left = of_grad[i] - share * of_low[i];
      square += found[i] * found[i] * (left < 0 ? 0 : left);
    }
    double size = std::sqrt(square), by = 1;
    if (previous && rule.limit > 0) {
      const double growth = size / (numbers(*previous)[0] + 1e-8);
      by = (growth <= rule.limit ? rule.limit : growth) / rule.limit;  // NaN stays
    }
    phi.resize(count);
    for (size_t i = 0; i < count; ++i) phi[i] = A(found[rule.outside == 2 ? 0 : i] / by);
    return size / by;
  }

  // scale x in bfloat16, of a contiguous x
  Operand halved(const Operand& x, A scale) {
    const int64_t count = x.rows * x.columns;
    A* const room = memory.get<A>(pieces(count, 2));  // two to a float
    uint16_t* const to = reinterpret_cast<uint16_t*>(room);
    parallel_items(pieces(count, SEGMENT), 2, [&](int64_t i) {
      kernels<ConvertKernels, A>().narrow_scaled(static_cast<const A*>(x.data) + i * SEGMENT, std::min(SEGMENT, count - i * SEGMENT),
                                                 scale, Dtype::bf16, to + i * SEGMENT);
    });
    return {to, Dtype::bf16, x.rows, x.columns, x.columns, 1};
  }

  // p = keep p + back - rate phi G of `count` rows from `top` on
  void update(int64_t top, int64_t count, const A* back) {
    const Update<A> step{Rows(p), Rows(grad), back, top, n, rule.right, rule.outside ? phi.data() : nullptr, A(rule.keep), A(rule.rate)};
    blocks(top, top + count, n, true, [&](const Block& b) { kernel.update(step, b); });
  }

  void apply() {
    Operand P = operand(basis), inside{s.psi, own_dtype<A>, rows, columns, columns, 1};
    const A alpha = A(rule.outside ? -rule.rate : -rule.rate * rule.scale);
    const bool in_place = dtype_of(p) == own_dtype<A>, as_it_is = in_place && !rule.outside && rule.keep == 1;
    const bool half = dtype_of(p) == Dtype::bf16 && has_bf16_dot() && basis.is_contiguous();
    if (half) inside = halved(inside, alpha), P = halved(P, A(1));
    const int64_t step = as_it_is ? std::max<int64_t>(m, 1) : panel();
    A* const back = in_place ? nullptr : memory.get<A>(std::min(step, m) * n);
    for (int64_t top = 0; top < m; top += step) {
      const int64_t count = std::min(step, m - top);
      const Operand left = (rule.right ? inside : P).part(top, count), right = rule.right ? P.t() : inside;
      if (in_place) {
        if (!as_it_is) update(top, count, nullptr);
        gemm(left, right, Target<A>{static_cast<A*>(p.data_ptr()) + top * n, n, 1}, alpha, true);
        continue;
      }
      const Target<A> to{back, n, 1};
      if constexpr (sizeof(A) == 4) {
        if (half) gemm_bf16(left, right, to, false);
        else gemm(left, right, to, alpha, false);
      } else {
        gemm(left, right, to, alpha, false);
      }
      update(top, count, back);
    }
  }

  // Each item's rows go through both products, where nothing of all rows stands between them.
  double tiled(const std::optional<Tensor>& previous) {
    const Tile shape = kernel.shape();
    const int64_t depth = piece(n), back_depth = piece(r);
    A* const low = memory.get<A>(m * r);
    A* const forth = memory.get<A>(n * round_up(r, shape.columns));
    A* const back = memory.get<A>(r * round_up(n, shape.columns));
    s.low = low, s.psi = rule.outside ? memory.get<A>(m * r) : low;
    Tiled<A> t{Rows(p), Rows(grad), static_cast<const A*>(basis.data_ptr()), forth, back, basis.stride(0), basis.stride(1), m, n, r,
               depth, back_depth, low, s.psi, rule.outside ? of_grad.data() : nullptr, nullptr, A(rule.keep), A(rule.rate), A(rule.outside ? -rule.rate : -rule.rate * rule.scale)};
    packed(t, false, n, r, depth, shape.columns, forth);
    packed(t, true, r, n, back_depth, shape.columns, back);
    const int64_t tiles = pieces(m, shape.rows), workers = threads(), per_block = std::max<int64_t>(1, ROWS_OF_BLOCK / shape.rows);
    const int64_t blocks = std::min(tiles, pieces(pieces(tiles, per_block), workers) * workers);
    const auto each = [&](const auto& work) {
      parallel_items(blocks, grain_of(pieces(m, blocks) * n), [&](int64_t i) {
        const int64_t top = i * tiles / blocks * shape.rows, bottom = std::min(m, (i + 1) * tiles / blocks * shape.rows);
        work(top, bottom, scratch_of<A>(1, round_up(bottom - top, shape.rows) * std::max(depth, back_depth) + 64));
      });
    };
    each([&](int64_t top, int64_t bottom, A* left) {
      kernel.project(t, top, bottom, left);
      kernel.moments(s, {top, bottom, 0, r});
      if (!rule.outside) kernel.apply(t, top, bottom, left);
    });
    if (!rule.outside) return 0;
    const double size = factors(previous);
    t.phi = phi.data();
    each([&](int64_t top, int64_t bottom, A* left) {
      kernel.inside(s, phi.data(), A(rule.scale), {top, bottom, 0, r});
      kernel.apply(t, top, bottom, left);
    });
    return size;
  }

  static int64_t piece(int64_t depth) { return pieces(depth, pieces(depth, DEPTH)); }

  // P or P^T, [depth, columns], in panels of pieces of the depth
  void packed(const Tiled<A>& t, bool turned, int64_t depth, int64_t columns, int64_t piece, int64_t width, A* to) {
    const int64_t panels = pieces(columns, width), cuts = pieces(depth, piece);
    parallel_items(panels * cuts, grain_of(piece * width), [&](int64_t i) {
      const int64_t k0 = i / panels * piece, panel = i % panels;
      kernel.pack(t, turned, k0, panel, to + k0 * panels * width + panel * width * std::min(piece, depth - k0));
    });
  }

  double run(const Tensor& exp_avg, const Tensor& exp_avg_sq, const std::optional<Tensor>& previous, bool by_tiles) {
    const size_t sums = size_t(rule.right ? rows : columns);
    of_psi.assign(sums, 0), of_low.assign(sums, 0), of_grad.assign(sums, 0);
    s.first = static_cast<A*>(exp_avg.data_ptr()), s.second = static_cast<A*>(exp_avg_sq.data_ptr());
    s.columns = columns, s.by_row = rule.right;
    s.beta1 = A(rule.beta1), s.rest1 = A(1 - rule.beta1), s.beta2 = A(rule.beta2), s.rest2 = A(1 - rule.beta2);
    s.eps = A(rule.eps);
    s.sum_psi = of_psi.data(), s.sum_low = of_low.data();
    if (by_tiles && rule.right && dtype_of(p) == own_dtype<A> && m > 0 && n > 0 && r > 0) return tiled(previous);
    project();
    s.psi = memory.get<A>(rows * columns);
    blocks(0, rows, columns, rule.right, [&](const Block& b) { kernel.moments(s, b); });
    double size = 0;
    if (rule.outside) {
      size = factors(previous);
      blocks(0, rows, columns, true, [&](const Block& b) { kernel.inside(s, phi.data(), A(rule.scale), b); });
    }
    apply();
    return size;
  }
};

Tensor filled(const Tensor& like, int64_t rows, int64_t columns, float value) {
  Tensor made = fresh(like, {rows, columns}, ScalarType::Float);
  std::fill_n(static_cast<float*>(made.data_ptr()), made.numel(), value);
  return made;
}

// Whether a step by tiles is faster here than products of whole matrices, which may be the library's.
bool tiles_are_faster(const Tensor& like) {
  if (!library_allowed()) return true;
  static Choice choice("projected-step");
  choice.settle([&](auto&& race) {
    constexpr int64_t side = 768, rank = 192;
    const Tensor p = filled(like, side, side, 0.5f), grad = filled(like, side, side, 0.25f), basis = filled(like, side, rank, 0.01f);
    const Tensor first = filled(like, side, rank, 0.01f), second = filled(like, side, rank, 0.01f);
    const Rule rule{0.9, 0.999, 1e-6, 1e-3, 1, 0.25, 0, true, 0};
    const auto run = [&](bool by_tiles) { Step<float>{p, grad, basis, rule, side, side, rank, side, rank}.run(first, second, {}, by_tiles); };
    race(4.0 * side * side * rank, [&] { run(true); }, [&] { run(false); });
  });
  return !library_forced() && !choice.library_is_faster();
}

// Changes p and the moments in place; returns |S|, of no elements without anything outside.
Tensor projected_step_(Strided p, Strided grad, Tensor basis, Strided exp_avg, Strided exp_avg_sq, std::optional<Tensor> previous,
                       Rule rule) {
  const int64_t m = p.size(0), n = p.size(1), r = basis.size(1), rows = rule.right ? m : r, columns = rule.right ? r : n;
  expect(grad, "grad", {m, n});
  expect(basis, "basis", {rule.right ? n : m, r}, wide_type(p));
  expect(exp_avg, "exp_avg", {rows, columns}, wide_type(p));
  expect_like(exp_avg_sq, "exp_avg_sq", exp_avg);
  check(p.is_contiguous() && grad.is_contiguous() && exp_avg.is_contiguous() && exp_avg_sq.is_contiguous(),
        "p, grad and the moments must be contiguous");
  Tensor norm = fresh(basis, rule.outside ? std::vector<int64_t>{} : std::vector<int64_t>{0});
  with_type(is_double(p), [&](auto type) {
    using A = decltype(type);
    const double size = Step<A>{p, grad, basis, rule, m, n, r, rows, columns}.run(exp_avg, exp_avg_sq, previous, sizeof(A) == 8 || tiles_are_faster(basis));
    if (rule.outside) *static_cast<A*>(norm.data_ptr()) = A(size);
  });
  return norm;
}

Tensor copy_of(const Tensor& t) {
  Tensor out = empty_of(t);
  if (t.numel()) std::memcpy(out.data_ptr(), t.data_ptr(), size_t(t.numel() * bytes_of(dtype_of(t))));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> projected_step(Tensor p, Tensor grad, Tensor basis, Tensor exp_avg, Tensor exp_avg_sq,
                                                          std::optional<Tensor> previous, Rule rule) {
  Strided moved{copy_of(p)}, first{copy_of(exp_avg)}, second{copy_of(exp_avg_sq)};
  Tensor norm = projected_step_(moved, Strided{grad}, basis, first, second, previous, rule);
  return {moved, first, second, norm};
}

}  // namespace
}  // namespace w2s

STABLE_TORCH_LIBRARY_FRAGMENT(w2s_fast, m) {
  m.def(
      "projected_step_(Tensor(a!) p, Tensor grad, Tensor basis, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor? previous, "
      "float beta1, float beta2, float eps, float rate, float keep, float scale, float limit, bool right, int outside) -> Tensor");
}
W2S_IMPLEMENTATIONS(m) {
  m.add<&w2s::projected_step>("projected_step");
  m.add<&w2s::projected_step_>("projected_step_");
}
