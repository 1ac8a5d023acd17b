// The engine of every loss over a vocabulary: tiles of logits z = (1/temperature) sum_i w_i cap(W_i h_i + b_i), made by
// gemm, [vocabulary tile] x [rows], never [rows] x [vocabulary].
//
// The n products run into one accumulator with w_i / temperature folded into the rows of h_i; with a softcap, or where
// bfloat16 models are multiplied as they are, each has a tile of its own. Rows with the ignored target are left out from the start (gathered), so they cost nothing.
#pragma once

#include "cpu/convert.h"
#include "cpu/products.h"
#include "cpu/linear_loss/tile.h"

namespace w2s {
namespace linear {

constexpr int64_t IN_PLACE = 8;  // rows for which gemm reads a narrower head where it lies
constexpr int64_t CHUNK = 128;  // vocabulary rows of one piece of row-kernel work; also the unit a draw computes again

template <class A>
struct Matrix {  // a view; strides in elements
  A* data;
  int64_t rows, columns, down, across;
  Matrix t() const { return {data, columns, rows, across, down}; }
  Operand operand() const { return {data, own_dtype<A>, rows, columns, down, across}; }
};

// The models, as every op of the family takes them.
struct LinearArguments {
  RowwiseTensors hiddens, heads;
  Tensors biases;
  std::optional<Strided> weights;
  std::vector<double> weight_values;
  double temperature, softcap;
  int64_t vocab_size;
  static constexpr int arguments = 8;

  int64_t rows() const { return hiddens[0].size(0); }
  void fit() const;  // a refusal unless the tensors have the shapes that an engine reads them by; in instances.cpp
  bool f64() const {
    return std::any_of(hiddens.begin(), hiddens.end(), is_double) || std::any_of(heads.begin(), heads.end(), is_double);
  }
};

template <class F>
inline std::vector<int64_t> rows_where(int64_t rows, const F& counts) {
  std::vector<int64_t> found;
  for (int64_t t = 0; t < rows; ++t)
    if (counts(t)) found.push_back(t);
  return found;
}

template <class A>
struct Engine {
  int n;
  int64_t T, V, M, Mp, width = 0;  // rows given; vocabulary; rows that count; that, padded; sum of D_i
  double temperature;
  A cap;
  std::vector<int64_t> D, offset, index;  // per model; rows that count
  std::vector<Rows> head;
  std::vector<std::vector<A>> bias, coef;  // [V]; w_i / temperature, [Mp]
  Tensors hiddens, keep;                   // inputs; memory that must live as long as this
  A* h = nullptr;                          // [M, width]; scaled by coef without a softcap
  // the current tile of the heads
  int64_t v0 = 0, nv = 0, tile = 0, shares = 0;
  std::vector<A*> narrow_tile;  // heads narrower than A, widened
  bool dots = false;            // bfloat16 models that are multiplied as they are
  bool apart = false;           // with dots and no cap: coefficients that are not 1 are taken after the product
  bool widens = true;           // whether a tile of a narrower head is widened (not for products with dots alone)
  A* part = nullptr;                 // with apart: the product of one model and block
  const uint16_t* rows16 = nullptr;  // with dots: hidden rows as they are, [M, width]

  Engine(const LinearArguments& linear, std::vector<int64_t> rows_that_count)
      : n(int(linear.hiddens.size())), T(linear.rows()), V(linear.vocab_size), temperature(linear.temperature), cap(A(linear.softcap)),
        index(std::move(rows_that_count)), hiddens(linear.hiddens) {
    linear.fit();
    M = int64_t(index.size());
    Mp = round_up(M, 16);
    for (int i = 0; i < n; ++i) {
      head.emplace_back(linear.heads[size_t(i)]);
      head.back().stride = linear.heads[size_t(i)].stride(0) * head.back().bytes;
      D.push_back(hiddens[size_t(i)].size(1));
      offset.push_back(width);
      width += D.back();
    }
    set_weights(linear.weights, linear.weight_values);
    for (const Tensor& b : linear.biases) {
      bias.emplace_back(size_t(V));
      kernels<ConvertKernels, A>().widen(b.data_ptr(), dtype_of(b), V, bias.back().data());
    }
    gather();
    if constexpr (sizeof(A) == 4) {
      dots = has_bf16_dot();
      for (int i = 0; i < n; ++i) dots &= head[size_t(i)].dtype == Dtype::bf16 && hiddens[size_t(i)].scalar_type() == ScalarType::BFloat16;
      apart = dots && !cap && (n > 1 || scales(0));
      if (dots) gather_narrow();
    }
  }

  void gather_narrow() {
    keep.push_back(fresh(hiddens[0], {std::max<int64_t>(M * width, 1)}, ScalarType::BFloat16));
    uint16_t* to = static_cast<uint16_t*>(keep.back().data_ptr());
    for (int i = 0; i < n; ++i) {
      const Rows from(hiddens[size_t(i)]);
      parallel_items(M, 16, [&](int64_t m) {
        std::memcpy(to + m * width + offset[size_t(i)], from.at(index[size_t(m)], 0), size_t(2 * D[size_t(i)]));
      });
    }
    rows16 = to;
  }
  bool scales(int i) const {  // whether a row of model i has another coefficient than 1
    return !std::all_of(coef[size_t(i)].begin(), coef[size_t(i)].begin() + M, [](A c) { return c == 1; });
  }
  Operand hidden16(int i, int64_t r0, int64_t rows) const { return narrow_rows(rows16, i, r0, rows); }
  Operand narrow_rows(const uint16_t* from, int i, int64_t r0, int64_t rows) const {
    return {from + r0 * width + offset[size_t(i)], Dtype::bf16, rows, D[size_t(i)], width, 1};
  }
  Operand head16(int i) const { return {head[size_t(i)].at(v0, 0), Dtype::bf16, nv, D[size_t(i)], head[size_t(i)].stride / 2, 1}; }

  void set_weights(const std::optional<Strided>& weights, const std::vector<double>& values) {
    const std::vector<double> w = numbers(weights);
    for (int i = 0; i < n; ++i) {
      coef.emplace_back(size_t(Mp), A(0));
      for (int64_t m = 0; m < M; ++m)
        coef.back()[size_t(m)] = A((weights ? w[size_t(index[size_t(m)] * n + i)] : values[size_t(i)]) / temperature);
    }
  }

  void gather() {
    h = memory(M * width);
    parallel_items(M, 16, [&](int64_t m) {
      for (int i = 0; i < n; ++i)
        kernels<ConvertKernels, A>().widen_scaled(Rows(hiddens[size_t(i)]).at(index[size_t(m)], 0), dtype_of(hiddens[size_t(i)]),
                                   D[size_t(i)], cap ? A(1) : coef[size_t(i)][size_t(m)], h + m * width + offset[size_t(i)]);
    });
  }

  A* memory(int64_t elements) {
    keep.push_back(fresh(hiddens[0], {std::max<int64_t>(elements, 1)}, scalar_type<A>));
    return static_cast<A*>(keep.back().data_ptr());
  }
  Tensor output(std::vector<int64_t> shape) const { return fresh(hiddens[0], shape, scalar_type<A>); }
  bool narrower(int i) const { return head[size_t(i)].dtype != own_dtype<A>; }
  bool in_place(int i) const { return sizeof(A) == 4 && M <= IN_PLACE && narrower(i) && head[size_t(i)].dtype != Dtype::f64; }
  bool widened(int i) const { return narrower(i) && widens && !in_place(i); }

  // Rows of a block, all about the same. A product on the tile unit is done before its operands and sums have come from
  // memory: fewer passes.
  int64_t block() const {
    const int64_t some = dots && has_amx() ? 1024 : 512, count = std::max<int64_t>(1, pieces(M - some / 4, some));
    return std::max(M <= some ? some : int64_t(0), round_up(pieces(M, count), 16));
  }

  // Chooses the height of a vocabulary tile, so that all scratch of a tile with `columns` tokens and `shared` further
  // elements a vocabulary row is about 1/20 of [T, V], within [1.5 MiB, 8 MiB], and all tiles about the same.
  void plan(int64_t columns, int64_t shared) {
    for (int i = 0; i < n; ++i) shared += widened(i) ? D[size_t(i)] : 0;
    const int64_t budget = std::clamp<int64_t>(T * V * int64_t(sizeof(A)) / 20, 3 << 19, 8 << 20);
    const int64_t rows = budget / int64_t(sizeof(A)) / std::max<int64_t>(round_up(columns, 16) + shared, 1);
    const int64_t most = std::clamp<int64_t>(rows / CHUNK * CHUNK, CHUNK, std::min<int64_t>(4096, round_up(V, CHUNK)));
    tile = std::max(CHUNK, round_up(pieces(V, std::max<int64_t>(pieces(V, most), 1)), CHUNK));
    if (apart) part = memory(tile * round_up(columns, 16));
    narrow_tile.assign(size_t(n), nullptr);
    for (int i = 0; i < n; ++i)
      if (widened(i)) narrow_tile[size_t(i)] = memory(tile * D[size_t(i)]);
  }

  void load(int64_t first) {  // makes [first, first + tile) the current tile
    v0 = first;
    nv = std::min(tile, V - first);
    for (int i = 0; i < n; ++i)
      if (widened(i))
        parallel_items(nv, 64, [&](int64_t v) {
          kernels<ConvertKernels, A>().widen_scaled(head[size_t(i)].at(v0 + v, 0), head[size_t(i)].dtype, D[size_t(i)], A(1),
                                     narrow_tile[size_t(i)] + v * D[size_t(i)]);
        });
  }

  Matrix<A> W(int i) const {  // [nv, D_i] of the current tile
    const int64_t d = D[size_t(i)];
    if (narrower(i)) return {narrow_tile[size_t(i)], nv, d, d, 1};
    return {static_cast<A*>(head[size_t(i)].at(v0, 0)), nv, d, head[size_t(i)].stride / int64_t(sizeof(A)), 1};
  }
  Operand head_operand(int i) const {
    if (!in_place(i)) return W(i).operand();
    const Rows& rows = head[size_t(i)];
    return {rows.at(v0, 0), rows.dtype, nv, D[size_t(i)], rows.stride / rows.bytes, 1};
  }
  Matrix<A> H(int i, int64_t r0, int64_t rows) const {
    return {h + r0 * width + offset[size_t(i)], rows, D[size_t(i)], width, 1};
  }

  // work(chunk, first row, rows) for every chunk of the current tile, in parallel
  template <class F>
  void chunks(const F& work) const {
    parallel_items(pieces(nv, CHUNK), 1, [&](int64_t c) { work(c, c * CHUNK, std::min(CHUNK, nv - c * CHUNK)); });
  }

  // z[v * ld + t], v in the current tile, t in [r0, r0 + rows). With a softcap parts[i] holds model i's capped logits.
  void logits(int64_t r0, int64_t rows, A* z, int64_t ld, A* const* parts) const {
    // z may be a few columns of a wider tile (ld), so only this block's are touched
    const int64_t columns = round_up(rows, 16), own = apart ? columns : ld;
    for (int i = 0; i < n; ++i) {
      A* out = cap ? parts[i] : apart ? part : z;
      const Target<A> to{out, own, 1};
      if (dots) multiply(head16(i), hidden16(i, r0, rows).t(), to);
      else multiply(head_operand(i), H(i, r0, rows).t().operand(), to, !cap && i > 0);
      const A* c = coef[size_t(i)].data() + r0;
      const A* b = bias.empty() ? nullptr : bias[size_t(i)].data() + v0;
      if (cap || apart)
        chunks([&](int64_t, int64_t v, int64_t count) {
          if (cap) kernels<TileKernels, A>().cap(out + v * own, count, own, b ? b + v : nullptr, cap);
          kernels<TileKernels, A>().add(z + v * ld, ld, out + v * own, own, count, columns, c, i == 0);
        });
      if (b && !cap)
        chunks([&](int64_t, int64_t v, int64_t count) { kernels<TileKernels, A>().bias(z + v * ld, count, ld, columns, b + v, c); });
    }
  }
};

// once for all losses: instances.cpp
extern template struct Engine<float>;
extern template struct Engine<double>;

// f(engine), with the engine of the call's accumulating type
template <class F>
inline auto with_engine(const LinearArguments& linear, std::vector<int64_t> rows, const F& f) {
  return with_type(linear.f64(), [&](auto zero) {
    Engine<decltype(zero)> engine(linear, std::move(rows));
    return f(engine);
  });
}

// Whether all rows count and fill one block without a cap: what logits [V, Mp] are kept of from forward to backward.
template <class A>
inline bool keeps_logits(const Engine<A>& e) {
  return e.M == e.T && e.M <= e.block() && !e.cap && e.n == 1;
}

// Their memory, empty unless wanted.
template <class A>
inline Tensor kept_logits(const Engine<A>& e, bool wanted) {
  if (wanted && !keeps_logits(e)) throw Refusal("logits are kept of one block of rows that all count");
  if (!wanted) return e.output({0});
  Tensor kept = e.output({e.V, e.Mp});
  A* end = static_cast<A*>(kept.data_ptr());
  for (int64_t v = 0; v < e.V; ++v) end += e.Mp, std::fill(end - (e.Mp - e.M), end, A(0));  // nobody writes behind the rows
  return kept;
}

// Those that forward left, or null: none, or not of the rows that count now.
template <class A>
inline const A* found_logits(const Engine<A>& e, const std::optional<Tensor>& kept) {
  if (!kept || !keeps_logits(e)) return nullptr;
  check(kept->scalar_type() == scalar_type<A> && kept->dim() == 2 && kept->size(0) == e.V && kept->size(1) == e.Mp, [&] {
    return "kept must be [" + std::to_string(e.V) + ", " + std::to_string(e.Mp) + "], of the dtype that sums are in";
  });
  return static_cast<const A*>(kept->data_ptr());
}

// Rows that count put back among all rows; the others get 0.
template <class A, class F>
inline Tensor scattered(const Engine<A>& e, const F& value) {
  Tensor out = e.output({e.T});
  A* p = static_cast<A*>(out.data_ptr());
  std::fill(p, p + e.T, A(0));
  for (int64_t m = 0; m < e.M; ++m) p[e.index[size_t(m)]] = A(value(m));
  return out;
}

}  // namespace linear
}  // namespace w2s
