// Losses whose gradient needs whole rows of logits: rows in chunks, a tile [rows, V] a model, the student's turned into
// its gradient in place, and the two products that spend it.
//
// A bfloat16 head on a machine that multiplies bfloat16 has its gradient rounded to that (as a plain implementation's
// is), so that all three products run at twice the rate; sums over the chunks are float32.
//
// Rows that do not count are left out from the start (gathered). Chunks are as long as memory allows, BUDGET for the
// tiles of all models, and even: every chunk is a sweep over W and dW, which a few rows would not pay for.
#pragma once

#include <cstring>

#include "cpu/convert.h"
#include "cpu/products.h"

namespace w2s {
namespace linear {

constexpr int64_t BUDGET = 64 << 20, FEWEST = 64, COLUMNS = 2048;

// z = W h + b of the rows that count.
template <class A>
struct Head {
  int64_t V, D, M;
  Operand W;
  const A *h = nullptr, *bias = nullptr;
  const uint16_t* h16 = nullptr;  // in place of h: bfloat16 rows beside a bfloat16 W, where the machine multiplies those

  Head(CallMemory& memory, const Tensor& hidden, const Tensor& head, const Tensor* b, int64_t vocab, const std::vector<int64_t>& index)
      : V(vocab), D(hidden.size(1)), M(int64_t(index.size())) {
    W = matrix(head).part(0, V);
    const Rows from(hidden);
    if (by_dots<A>({W.dtype, from.dtype})) {
      uint16_t* to = reinterpret_cast<uint16_t*>(memory.get<float>((M * D + 1) / 2));
      parallel_items(M, 16, [&](int64_t m) { std::memcpy(to + m * D, from.at(index[size_t(m)], 0), size_t(D) * 2); });
      h16 = to;
    } else {
      A* to = memory.get<A>(M * D);
      parallel_items(M, 16, [&](int64_t m) {
        kernels<ConvertKernels, A>().widen(from.at(index[size_t(m)], 0), from.dtype, D, to + m * D);
      });
      h = to;
    }
    if (!b) return;
    A* offset = memory.get<A>(V);
    kernels<ConvertKernels, A>().widen(b->data_ptr(), dtype_of(*b), V, offset);
    bias = offset;
  }

  // bytes of dW summed over chunks, where that is not dW itself
  int64_t sum_of_chunks(bool wanted) const { return wanted && W.dtype != own_dtype<A> ? V * D * int64_t(sizeof(A)) : 0; }
  Operand rows(int64_t first, int64_t count) const {
    if (h16) return {h16 + first * D, Dtype::bf16, count, D, D, 1};
    return {h + first * D, own_dtype<A>, count, D, D, 1};
  }
  void logits(int64_t first, int64_t count, A* z, int64_t ld) const {  // without the bias
    multiply(rows(first, count), W.t(), Target<A>{z, ld, 1});
  }
};

// How the rows are cut. `spare`: bytes that a single chunk does without.
struct Chunks {
  int64_t rows, size, ld;
  Chunks(int64_t count, int64_t V, int64_t tiles, int64_t bytes, int64_t spare) : rows(count) {
    ld = (V + 15) / 16 * 16;
    if (ld * bytes / 64 % 2 == 0) ld += 64 / bytes;  // an odd number of cache lines: a column falls on all sets
    const int64_t row = ld * bytes * tiles, memory = rows * row <= BUDGET + spare ? BUDGET + spare : BUDGET;
    const int64_t most = std::max(FEWEST, memory / row);
    const int64_t pieces = std::max<int64_t>((rows + most - 1) / most, 1);
    size = ((rows + pieces - 1) / pieces + 13) / 14 * 14;  // gemm's tiles have 14 rows
  }
  int64_t pieces() const { return size ? (rows + size - 1) / size : 0; }
};

// Gradients of hidden, head and bias from tiles of dz, chunk by chunk. A row of dz is `dtype` from the start of the
// logits' row.
template <class A>
struct Spend {
  const Head<A>& head;
  Tensor dhidden, dhead, dbias;
  bool hidden, weight, offset, whole;  // which are wanted; whether dW is summed over chunks in a matrix of its own
  Dtype dtype;
  A *raw = nullptr, *wide = nullptr, *sums = nullptr;

  Spend(CallMemory& memory, const Head<A>& of, const Tensor& h, const Tensor& w, const Tensor* b, bool need_hidden,
        bool need_head, bool need_bias, int64_t pieces)
      : head(of), dhidden(empty_of(h, need_hidden)), dhead(empty_of(w, need_head)), dbias(empty_of(b ? *b : h, need_bias)),
        hidden(need_hidden), weight(need_head), offset(need_bias), whole(pieces > 1),
        dtype(of.h16 ? Dtype::bf16 : own_dtype<A>) {
    if (hidden) raw = memory.get<A>(head.M * head.D);
    if (weight && !own()) wide = memory.get<A>((whole ? head.V : std::min(head.V, COLUMNS)) * head.D);
    if (offset) {
      sums = memory.get<A>(head.V);
      std::fill(sums, sums + head.V, A(0));
    }
  }
  bool own() const { return dtype_of(dhead) == own_dtype<A>; }
  bool any() const { return hidden || weight || offset; }

  // dz: `count` rows, each in the place of `ld` logits
  void chunk(int64_t first, int64_t count, const A* dz, int64_t ld, bool last) {
    const int64_t V = head.V, D = head.D, bytes = bytes_of(dtype), down = ld * int64_t(sizeof(A)) / bytes;
    const auto at = [&](int64_t v) { return reinterpret_cast<const char*>(dz) + v * bytes; };
    for (int64_t v = 0; v < V && (hidden || weight); v += COLUMNS) {
      const int64_t n = std::min(COLUMNS, V - v);
      const Operand tile{at(v), dtype, count, n, down, 1};
      if (hidden) multiply(tile, head.W.part(v, n), Target<A>{raw + first * D, D, 1}, v > 0);
      if (!weight) continue;
      A* to = own() ? static_cast<A*>(dhead.data_ptr()) + v * D : wide + (whole ? v * D : 0);
      multiply(tile.t(), head.rows(first, count), Target<A>{to, D, 1}, first > 0);
      if (!own() && last) narrowed(to, n, D, static_cast<char*>(dhead.data_ptr()), v, dhead);
    }
    if (!offset) return;
    parallel_items((V + 1023) / 1024, 1, [&](int64_t t) {
      kernels<ConvertKernels, A>().add_columns(at(t * 1024), dtype, count, down, std::min<int64_t>(1024, V - t * 1024), sums + t * 1024);
    });
  }

  static void narrowed(const A* from, int64_t rows, int64_t D, char* to, int64_t first, const Tensor& t) {
    const Dtype type = dtype_of(t);
    parallel_items(rows, 64, [&](int64_t r) {
      kernels<ConvertKernels, A>().narrow(from + r * D, D, type, to + (first + r) * D * bytes_of(type));
    });
  }

  void finish(const std::vector<int64_t>& index) {
    if (hidden) {
      if (int64_t(index.size()) * head.D < dhidden.numel()) torch::stable::zero_(dhidden);
      const Dtype type = dtype_of(dhidden);
      char* to = static_cast<char*>(dhidden.data_ptr());
      parallel_items(head.M, 16, [&](int64_t m) {
        kernels<ConvertKernels, A>().narrow(raw + m * head.D, head.D, type, to + index[size_t(m)] * head.D * bytes_of(type));
      });
    }
    if (weight && head.M == 0) torch::stable::zero_(dhead);
    if (offset) kernels<ConvertKernels, A>().narrow(sums, head.V, dtype_of(dbias), dbias.data_ptr());
  }
};

// once for all losses: instances.cpp
extern template struct Head<float>;
extern template struct Head<double>;
extern template struct Spend<float>;
extern template struct Spend<double>;

}  // namespace linear
}  // namespace w2s
