#include "cpu/contrastive/contrastive_loss.h"

#include <unordered_map>

#include "cpu/convert.h"
#include "cpu/log_sum_exp.h"
#include "cpu/products.h"

// Scores in tiles of SIDE x SIDE. A softmax needs the sums of whole rows and columns before any gradient: a first sweep
// makes them and keeps as many tiles as fit into MEMORY, a second turns tiles into dz, those kept first, and spends each
// in two products. A sigmoid is one sweep. Of x with itself the upper half is enough: scores are symmetric, and tiles
// hold dz + dz^T. A bfloat16 dz is rounded to that where the machine multiplies bfloat16 (as a plain implementation's).
namespace w2s {
namespace {

constexpr int64_t MEMORY = 32 << 20;

struct Cut {  // n rows or columns in even pieces
  int64_t n = 0, count = 0, size = 0;
  explicit Cut(int64_t n) : n(n), count(pieces(n, SIDE)), size(count ? round_up(pieces(n, count), PAD) : 0) {}
  int64_t first(int64_t i) const { return i * size; }
  int64_t length(int64_t i) const { return std::min(size, n - i * size); }
  static constexpr int64_t PAD = 16;
};

struct ContrastiveCall {
  Tensor x;
  std::optional<Tensor> y;
  double scale, bias;
  const int64_t *labels, *column_labels;  // null but for supcon
  bool clip, sigmoid;
  int64_t first;
  bool need_x, need_y, need_scale;
  bool gradient() const { return need_x || need_y || need_scale; }
};

// The gradient of x or of y: summed over tiles in the accumulating type.
template <class A>
struct Summed {
  Tensor out;
  A* data = nullptr;
  std::vector<bool> begun;
  Summed(CallMemory& memory, const Tensor& like, bool wanted, const Cut& cut) : out(empty_of(like, wanted)), begun(size_t(cut.count)) {
    if (!wanted) return;
    const bool own = dtype_of(out) == own_dtype<A>;
    data = own ? static_cast<A*>(out.data_ptr()) : memory.get<A>(out.numel());
  }
  bool adds(int64_t i) {
    const bool was = begun[size_t(i)];
    begun[size_t(i)] = true;
    return was;
  }
  void finish() {
    if (!data) return;
    if (begun.empty() || !begun[0]) {
      torch::stable::zero_(out);
    } else if (dtype_of(out) != own_dtype<A>) {
      const Dtype type = dtype_of(out);
      const int64_t D = out.size(1);
      parallel_items(out.size(0), grain_of(D), [&](int64_t i) {
        kernels<ConvertKernels, A>().narrow(data + i * D, D, type, static_cast<char*>(out.data_ptr()) + i * D * bytes_of(type));
      });
    }
  }
};

template <class A>
struct Contrast {
  const ContrastiveCall& call;
  CallMemory memory;
  Operand x, y;
  int64_t M, N, D, ld = 0;
  bool self, dots;
  Cut rows, columns;
  std::vector<std::pair<int64_t, int64_t>> tiles;
  std::vector<A*> kept;
  std::vector<LogSumExp> row_lse, column_lse;
  std::vector<A> own, ids, column_ids, row_max, row_coef, row_share, column_max, column_coef;
  std::vector<double> positives;  // sums of z
  std::vector<int64_t> count;     // of positives
  Summed<A> dx, dy;
  double loss = 0, dscale = 0, dbias = 0;

  explicit Contrast(const ContrastiveCall& call)
      : call(call), memory{call.x, {}}, x(matrix(call.x)), y(call.y ? matrix(*call.y) : x), M(x.rows), N(y.rows), D(x.columns),
        self(!call.y), dots(by_dots<A>({x.dtype, y.dtype})), rows(M),
        columns(N), own(size_t(M)), positives(size_t(M)), dx(memory, call.x, call.need_x, rows),
        dy(memory, call.y ? *call.y : call.x, call.need_y && call.y, columns) {
    ld = round_up(columns.size, 16);
    if (ld * int64_t(sizeof(A)) / 64 % 2 == 0) ld += 64 / int64_t(sizeof(A));  // an odd number of cache lines
    for (int64_t i = 0; i < rows.count; ++i)
      for (int64_t j = self ? i : 0; j < columns.count; ++j) tiles.emplace_back(i, j);
    if (tiles.empty()) return;
    const int64_t tile = rows.size * ld, most = MEMORY / (tile * int64_t(sizeof(A)));
    const int64_t wanted = call.sigmoid || !call.gradient() ? 1 : int64_t(tiles.size());
    for (int64_t i = 0; i < std::clamp<int64_t>(wanted, 1, std::max<int64_t>(most, 1)); ++i) kept.push_back(memory.get<A>(tile));
  }

  ContrastiveTile<A> tile_at(size_t t, A* raw) const {
    const auto [i, j] = tiles[t];
    ContrastiveTile<A> tile{raw, rows.length(i), columns.length(j), ld, A(call.scale), A(call.bias),
                            call.first + rows.first(i) - columns.first(j), call.labels != nullptr};
    if (call.labels) {
      tile.row_labels = ids.data() + rows.first(i);
      tile.column_labels = (self ? ids : column_ids).data() + columns.first(j);
    }
    return tile;
  }
  void scores(const ContrastiveTile<A>& tile, size_t t) const {
    const auto [i, j] = tiles[t];
    multiply(x.part(rows.first(i), tile.rows), y.part(columns.first(j), tile.columns).t(), Target<A>{tile.raw, ld, 1});
  }

  // labels as numbers from 1 on, and how many columns of its label a row has besides its own
  void number_labels() {
    if (!call.labels) return;
    std::unordered_map<int64_t, int64_t> number;
    std::vector<int64_t> members;
    const auto numbered = [&](const int64_t* labels, int64_t n, int64_t member) {
      std::vector<A> found(size_t(round_up(n, 16) + 16));
      for (int64_t i = 0; i < n; ++i) {
        const auto [at, fresh] = number.try_emplace(labels[i], int64_t(number.size()));
        if (fresh) members.push_back(0);
        members[size_t(at->second)] += member;
        found[size_t(i)] = A(at->second + 1);
      }
      return found;
    };
    ids = numbered(call.labels, M, self);
    if (!self) column_ids = numbered(call.column_labels, N, 1);
    const std::vector<A>& of_columns = self ? ids : column_ids;
    for (int64_t i = 0; i < M; ++i)
      count.push_back(members[size_t(ids[size_t(i)]) - 1] - (of_columns[size_t(call.first + i)] == ids[size_t(i)]));
  }

  void statistics(const ContrastiveTile<A>& tile, size_t t) {
    const auto [i, j] = tiles[t];
    const int64_t r0 = rows.first(i), c0 = columns.first(j);
    const auto& kernel = kernels<ContrastiveKernels, A>();
    parallel_items(tile.rows, grain_of(4 * tile.columns), [&](int64_t r) {
      const ContrastiveRow<A> found = kernel.row(tile, r);
      row_lse[size_t(r0 + r)].add(double(found.max), double(found.sum));
      positives[size_t(r0 + r)] += double(found.positives);
      if (tile.own + r >= 0 && tile.own + r < tile.columns) own[size_t(r0 + r)] = found.own;
    });
    const bool mirrored = self && i != j;
    if (!call.clip && !mirrored) return;
    parallel_items(pieces(tile.columns, STRIP), grain_of(4 * STRIP * tile.rows), [&](int64_t strip) {
      A max[STRIP], sum[STRIP], positive[STRIP];
      const int64_t c = strip * STRIP;
      kernel.columns(tile, c, max, sum, positive);
      for (int64_t k = 0; k < std::min(STRIP, tile.columns - c); ++k) {
        (mirrored ? row_lse : column_lse)[size_t(c0 + c + k)].add(double(max[k]), double(sum[k]));
        if (mirrored) positives[size_t(c0 + c + k)] += double(positive[k]);
      }
    });
  }

  // weight / sum, beside the maximum; padded
  static void coefficients(const std::vector<LogSumExp>& lse, const std::vector<double>& weight, std::vector<A>& max, std::vector<A>& coef) {
    max.assign(lse.size() + 32, A(0)), coef.assign(lse.size() + 32, A(0));
    for (size_t i = 0; i < lse.size(); ++i) {
      const bool mass = !(lse[i].max == -std::numeric_limits<double>::infinity());
      if (weight[i] == 0) continue;
      max[i] = mass ? A(lse[i].max) : A(0);
      coef[i] = A(weight[i] / lse[i].sum);
    }
  }

  void weigh() {
    const double mean = 1.0 / double(M), each = call.clip ? 0.5 * mean : mean;
    std::vector<double> weight(size_t(M), each);
    for (int64_t i = 0; i < M; ++i) {
      if (call.labels && !count[size_t(i)]) {
        weight[size_t(i)] = 0;
        continue;
      }
      const LogSumExp& l = row_lse[size_t(i)];
      const double toward = call.labels ? positives[size_t(i)] / double(count[size_t(i)]) : double(own[size_t(i)]);
      loss += each * ((l.reference() - toward) + l.log_sum());
      if (!call.clip) continue;
      const LogSumExp& c = column_lse[size_t(i)];
      loss += each * ((c.reference() - toward) + c.log_sum());
    }
    if (!call.gradient()) return;
    coefficients(row_lse, weight, row_max, row_coef);
    if (call.clip) coefficients(column_lse, weight, column_max, column_coef);
    if (!call.labels) return;
    row_share.assign(size_t(M + 32), A(0));
    for (int64_t i = 0; i < M; ++i)
      if (count[size_t(i)]) row_share[size_t(i)] = A(weight[size_t(i)] / double(count[size_t(i)]));
  }

  ContrastiveWeights<A> weights(size_t t) const {
    const auto [i, j] = tiles[t];
    const int64_t r0 = rows.first(i), c0 = columns.first(j);
    ContrastiveWeights<A> w{row_max.data() + r0, row_coef.data() + r0, nullptr, nullptr, nullptr, nullptr, A(0)};
    if (call.labels) w.row_share = row_share.data() + r0;
    else w.own = A(1.0 / double(M));
    if (self) w.column_max = row_max.data() + c0, w.column_coef = row_coef.data() + c0, w.column_share = row_share.data() + c0;
    if (call.clip) w.column_max = column_max.data() + c0, w.column_coef = column_coef.data() + c0;
    return w;
  }

  // dz in place of the tile, and what it gives
  void spend(const ContrastiveTile<A>& tile, size_t t) {
    const auto [i, j] = tiles[t];
    const Dtype type = dots ? Dtype::bf16 : own_dtype<A>;
    const auto& kernel = kernels<ContrastiveKernels, A>();
    std::vector<ContrastiveSums> sums(size_t(tile.rows));
    const ContrastiveWeights<A> w = call.sigmoid ? ContrastiveWeights<A>{} : weights(t);
    parallel_items(tile.rows, grain_of(4 * tile.columns), [&](int64_t r) {
      sums[size_t(r)] = call.sigmoid ? kernel.sigmoid(tile, A(1.0 / double(M)), r, type) : kernel.gradient(tile, w, r, type);
    });
    const double share = self && i == j ? 0.5 : 1.0;  // on the diagonal a tile holds each pair twice
    for (const ContrastiveSums& s : sums) dbias += share * s.gradient, dscale += share * s.product, loss += s.loss / double(M);
    const Operand dz{tile.raw, type, tile.rows, tile.columns, ld * int64_t(sizeof(A)) / bytes_of(type), 1};
    const auto add = [&](Summed<A>& to, int64_t piece, const Cut& cut, const Operand& a, const Operand& b) {
      if (to.data) multiply(a, b, Target<A>{to.data + cut.first(piece) * D, D, 1}, to.adds(piece));
    };
    add(dx, i, rows, dz, y.part(columns.first(j), tile.columns));
    if (self ? i != j : true) add(self ? dx : dy, j, columns, dz.t(), x.part(rows.first(i), tile.rows));
  }

  void run() {
    const size_t last = kept.size() - 1;
    const auto made = [&](size_t t, A* raw) {
      const ContrastiveTile<A> tile = tile_at(t, raw);
      scores(tile, t);
      return tile;
    };
    if (call.sigmoid) {
      for (size_t t = 0; t < tiles.size(); ++t) spend(made(t, kept[0]), t);
      return;
    }
    number_labels();
    row_lse.resize(size_t(M)), column_lse.resize(size_t(call.clip ? N : 0));
    for (size_t t = 0; t < tiles.size(); ++t) statistics(made(t, kept[std::min(t, last)]), t);
    weigh();
    if (!call.gradient()) return;
    for (size_t t = 0; t < last; ++t) spend(tile_at(t, kept[t]), t);
    spend(tile_at(tiles.size() - 1, kept[last]), tiles.size() - 1);
    for (size_t t = last; t + 1 < tiles.size(); ++t) spend(made(t, kept[last]), t);
  }
};

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class A>
Result contrast(const ContrastiveCall& call) {
  Contrast<A> c(call);
  if (!c.tiles.empty()) c.run();
  c.dx.finish(), c.dy.finish();
  const auto number = [&](double value, bool wanted) {
    Tensor t = fresh(call.x, wanted ? std::vector<int64_t>{} : std::vector<int64_t>{0}, scalar_type<A>);
    if (wanted) *static_cast<A*>(t.data_ptr()) = A(value);
    return t;
  };
  Tensor positives = fresh(call.x, {call.labels ? c.M : 0}, ScalarType::Long);
  std::copy(c.count.begin(), c.count.end(), static_cast<int64_t*>(positives.data_ptr()));
  return {number(c.loss, true), positives, c.dx.out, c.dy.out, number(c.dscale, call.need_scale), number(c.dbias, call.need_scale)};
}

Result contrastive_loss(Rowwise x, std::optional<Rowwise> y, Tensor scale, std::optional<Tensor> bias, std::optional<Tensor> labels,
                        std::optional<Tensor> column_labels, std::string kind, int64_t first, bool need_x, bool need_y, bool need_scale) {
  std::optional<Tensor> other;
  if (y) other = *y;
  const bool supervised = kind == "supcon";
  check(scale.numel() == 1 && (!bias || bias->numel() == 1), "scale and bias must be tensors of one number");
  check(!y || y->size(1) == x.size(1), "y must have as many columns as x");
  check(kind != "clip" || (y && y->size(0) == x.size(0) && first == 0), "y must have as many rows as x with kind 'clip'");
  check(first >= 0 && first + x.size(0) <= (y ? *y : x).size(0), "y must have at least first + M rows");
  check(!supervised || (labels && labels->numel() == x.size(0)), "labels must be of shape [M] with kind 'supcon'");
  check(!supervised || !y || (column_labels && column_labels->numel() == y->size(0)), "column_labels must be of shape [N] with kind 'supcon'");
  check(supervised || y, "y must be a tensor");
  const ContrastiveCall call{x, other, numbers(scale)[0], bias ? numbers(*bias)[0] : 0.0, supervised ? integers<int64_t>(*labels) : nullptr,
                             supervised && column_labels ? integers<int64_t>(*column_labels) : nullptr, kind == "clip", kind == "siglip",
                             first, need_x, need_y, need_scale};
  return with_type(is_double(x) || (y && is_double(*y)), [&](auto zero) { return contrast<decltype(zero)>(call); });
}

}  // namespace
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) { m.add<&w2s::contrastive_loss>("contrastive_loss"); }
