// Dual products of the library: x W^T and r |W|^T, and dW of both, in blocks of the results. One thread makes a block from |W|
// to what leaves it: what lies between stays in its second cache, threads meet once a product, and the library runs at the
// rate of one thread. All threads on one product of 128 x 512 x 512 reach 1.2 to 1.35 times that with two (Ice Lake).
#pragma once

#include "cpu/choice.h"
#include "cpu/interval_bounds/host.h"

namespace w2s::interval {
namespace {

// W [n, k] as it lies in memory: its rows one after another, or its columns (a transposed view).
struct Stored {
  RowMatrix<float> lines;
  bool turned;
  int64_t n() const { return turned ? lines.columns : lines.rows; }
  int64_t k() const { return turned ? lines.rows : lines.columns; }
  Stored t() const { return {lines, !turned}; }
  const float* at(int64_t row, int64_t column) const { return lines.data + (turned ? column * lines.stride + row : row * lines.stride + column); }
  Operand part(int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    return of(at(row, column), rows, columns, lines.stride);
  }
  // the absolute values of that part, made in `size`
  Operand absolute(int64_t row, int64_t rows, int64_t column, int64_t columns, float* size) const {
    const int64_t count = turned ? columns : rows, length = turned ? rows : columns;
    const float* from = at(row, column);
    for (int64_t i = 0; i < count; ++i) kernels<LinearKernels, float>().absolute(from + i * lines.stride, length, size + i * length);
    return of(size, rows, columns, length);
  }

 private:
  Operand of(const float* data, int64_t rows, int64_t columns, int64_t stride) const {
    return turned ? operand(data, columns, rows, stride).t() : operand(data, rows, columns, stride);
  }
};

inline Stored stored(const Tensor& w, CallMemory& memory) {
  if (transposed(w) && w.scalar_type() == ScalarType::Float)
    return {{static_cast<const float*>(w.data_ptr()), w.size(1), w.size(0), w.stride(1)}, true};
  return {widened<float>(w, memory), false};
}

// n in even pieces of about `most`, as many as there are threads where they are then at least `least`
inline int64_t even_pieces(int64_t n, int64_t most, int64_t least) {
  const int64_t workers = threads(), whole = std::max<int64_t>(1, n / most);
  const int64_t count = whole < workers ? std::clamp<int64_t>(n / least, whole, workers) : whole - whole % workers;
  return round_up(pieces(n, count), 16);
}

// Blocks of a matrix that are made in parallel, by products of the library or ours.
struct Blocks {
  int64_t rows, columns, tall, wide;
  // work(row, rows, column, columns), all blocks in parallel
  template <class F>
  void each(const F& work) const {
    const int64_t across = pieces(columns, wide);
    settle_products();
    parallel_items(across * pieces(rows, tall), 1, [&](int64_t i) {
      const int64_t row = i / across * tall, column = i % across * wide;
      work(row, std::min(tall, rows - row), column, std::min(wide, columns - column));
    });
  }
};

enum Slot { SIZES = 2, SUMS = 3 };  // of scratch

// finish(row, column, columns, m, s) for parts of rows of m = c w^T and s = r |w|^T, which are readable to whole PADs; or the
// products into `m` and `s` themselves, and nothing is finished.
template <class F>
void dual_products(const float* c, const float* r, int64_t ldx, int64_t batch, const Stored& w, float* m, float* s, const F& finish) {
  // the library is slow at fewer columns (128 against rows of W: 95 GFLOP/s, 256: 150; Ice Lake)
  constexpr int64_t DEPTH = 1024, WIDE = 256, TALL = 256, LEAST = 32;
  const int64_t n = w.n(), k = w.k(), cuts = pieces(k, DEPTH), depth = pieces(k, cuts), wide_block = even_pieces(n, WIDE, WIDE);
  const int64_t share = std::clamp<int64_t>(pieces(threads(), pieces(n, wide_block)), 1, pieces(batch, LEAST));
  Blocks{batch, n, pieces(batch, share), wide_block}.each([&](int64_t first, int64_t rows, int64_t j, int64_t wide) {
    const int64_t tall = cuts > 1 ? 2 * TALL : TALL, ld = m ? n : round_up(wide, 16) + 16;
    float* size = scratch_of<float>(SIZES, wide * depth + 16);
    float* sums = m ? nullptr : scratch_of<float>(SUMS, 2 * std::min(rows, tall) * ld);
    Operand parts{}, sizes{};
    for (int64_t p = first; p < first + rows; p += tall) {
      const int64_t count = std::min(tall, first + rows - p);
      float *to_m = m ? m + p * n + j : sums, *to_s = m ? s + p * n + j : sums + count * ld;
      for (int64_t i = 0; i < k; i += depth) {
        const int64_t deep = std::min(depth, k - i);
        if (cuts > 1 || p == first) parts = w.part(j, wide, i, deep), sizes = w.absolute(j, wide, i, deep, size);
        gemm(operand(c + p * ldx + i, count, deep, ldx), parts.t(), Target<float>{to_m, ld, 1}, 1.0f, i > 0);
        gemm(operand(r + p * ldx + i, count, deep, ldx), sizes.t(), Target<float>{to_s, ld, 1}, 1.0f, i > 0);
      }
      for (int64_t q = 0; !m && q < count; ++q) finish(p + q, j, wide, to_m + q * ld, to_s + q * ld);
    }
  });
}

// dw [n, k] = gm^T c + sign(w) o gr^T r; w and dw by rows
inline void weight_products(const float* gm, const float* gr, int64_t ldg, int64_t batch, const Box<float>& x, const RowMatrix<float>& w, float* dw) {
  constexpr int64_t ELEMENTS = 1 << 17, LONG = 1024;  // a block that is still in the second cache when its signs come
  const int64_t n = w.rows, k = w.columns, wide = pieces(k, pieces(k, LONG));
  Blocks{n, k, even_pieces(n, std::max<int64_t>(64, ELEMENTS / wide), 64), wide}.each([&](int64_t j, int64_t rows, int64_t i, int64_t columns) {
    float* turned = scratch_of<float>(SIZES, rows * columns);
    gemm(operand(gm + j, batch, rows, ldg).t(), operand(x.c + i, batch, columns, x.ld), Target<float>{dw + j * k + i, k, 1}, 1.0f, false);
    gemm(operand(gr + j, batch, rows, ldg).t(), operand(x.r + i, batch, columns, x.ld), Target<float>{turned, columns, 1}, 1.0f, false);
    for (int64_t q = 0; q < rows; ++q)
      kernels<LinearKernels, float>().add_signed(w.data + (j + q) * w.stride + i, turned + q * columns, columns, dw + (j + q) * k + i);
  });
}

}  // namespace
}  // namespace w2s::interval
