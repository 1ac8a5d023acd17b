// Where the values of a sparse matrix [rows, columns] stand, as the CPU kernels walk it: tiles of 512 rows, blocks of
// columns, and in each (tile, block) runs of rows with the same number of values (ops/sparse_lowrank/plan.py).
#pragma once

#include <algorithm>

#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace w2s::sparse {

constexpr int64_t TILE = 512, PLAN_BLOCK = 256;
constexpr int64_t PLACE = 8;  // elements of a row that are gone over in the time of one read or written by itself

struct SupportArguments;

struct Run {  // `count` rows with q values each, next to each other from `value`
  int64_t q, count, value;
  const uint16_t* row;    // within the tile; null: 0, 1, 2, ...
  const uint8_t* column;  // within the block
};

struct Pattern {
  int64_t rows, columns, nnz, block, per_block, last_per_block = 0, tiles, blocks;
  const int32_t* row_ptr = nullptr;
  const uint16_t* narrow = nullptr;  // csr16 columns
  const int32_t* wide = nullptr;     // csr32 columns
  const uint8_t* bytes = nullptr;    // balanced columns
  const uint64_t* bits = nullptr;    // csr: which columns of a row, 64 a word
  const int32_t *starts = nullptr, *runs = nullptr, *order = nullptr;
  const uint16_t* entry = nullptr;
  const uint8_t* column = nullptr;

  explicit Pattern(const SupportArguments& s);  // support.cpp
  void needs_plan() const;
  int64_t rows_of(int64_t tile) const { return std::min(TILE, rows - tile * TILE); }
  int64_t width_of(int64_t b) const { return std::min(block, columns - b * block); }
  // rows worth waking a thread for where each value is one place in a row of columns
  int64_t row_grain() const { return grain_of(PLACE * (nnz / std::max<int64_t>(rows, 1) + 1)); }
  int64_t per_row(int64_t b) const { return b + 1 < blocks ? per_block : last_per_block; }

  // f(run) for the runs of one tile and block, whose values follow each other in memory
  template <class F>
  void visit(int64_t tile, int64_t b, const F& f) const {
    if (!nnz) return;
    if (bytes) {
      const int64_t q = per_row(b), value = b * rows * per_block + tile * TILE * q;
      if (q) f(Run{q, rows_of(tile), value, nullptr, bytes + value});
      return;
    }
    const int32_t* at = starts + 3 * (tile * blocks + b);
    int64_t row = at[1], value = at[2];
    for (int64_t r = at[0]; r < at[3]; ++r) {
      const int64_t q = runs[2 * r], count = runs[2 * r + 1];
      f(Run{q, count, value, entry + row, column + value});
      row += count;
      value += q * count;
    }
  }

  // f(column, index of the value) for the values of one row, in the order they are stored
  template <class F>
  void row_values(int64_t row, const F& f) const {
    if (bytes) {
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t q = per_row(b), first = b * rows * per_block + row * q;
        for (int64_t i = 0; i < q; ++i) f(b * block + bytes[first + i], first + i);
      }
    } else if (narrow) {
      for (int64_t i = row_ptr[row]; i < row_ptr[row + 1]; ++i) f(int64_t(narrow[i]), i);
    } else {
      for (int64_t i = row_ptr[row]; i < row_ptr[row + 1]; ++i) f(int64_t(wide[i]), i);
    }
  }
};

// panel_kernel.cpp, and pack_kernel.h
template <class A>
struct PanelKernels {
  int64_t (*vector_width)();
  void (*pack)(const void* src, Dtype dtype, int64_t sk, int64_t sj, int64_t depth, int64_t columns, int64_t width, A* dst);
  void (*unpack)(const A* rows, int64_t count, int64_t columns, int64_t width, A* c, int64_t ld, bool add);
  void (*widen_values)(const void* src, Dtype dtype, const int32_t* order, int64_t begin, int64_t end, A* dst);
  // rows [row, row + count) of the sparse matrix added to w [count, columns]; and w's entries where it has values
  void (*add_rows)(const Pattern& s, int64_t row, int64_t count, const void* values, Dtype dtype, A* w);
  void (*pick_rows)(const Pattern& s, int64_t row, int64_t count, const A* w, void* values, Dtype dtype);
  void (*gather_tile)(const Pattern& s, int64_t tile, int vectors, const A* values, const A* x, A* y);
  void (*scatter_tile)(const Pattern& s, int64_t tile, int64_t b0, int64_t b1, int vectors, const A* values, const A* g,
                       const A* x, A* dx, A* dv, A* dots);
};

// decode_kernel.cpp
template <class A>
struct DecodeKernels {
  void (*pack)(const void* src, Dtype dtype, int64_t sk, int64_t sj, int64_t depth, int64_t columns, int64_t width, A* dst);
  void (*hidden)(const Operand& a, int64_t begin, int64_t end, int tokens, const A* x, A* h);
  void (*output)(const Pattern& s, const Operand& b, A scale, const void* values, Dtype dtype, int64_t begin, int64_t end,
                 int tokens, const A* x, const A* h, A* part, A* y);
};

}  // namespace w2s::sparse
