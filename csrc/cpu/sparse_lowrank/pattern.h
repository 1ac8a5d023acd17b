// Where the values of a sparse matrix [rows, columns] stand, as the CPU kernels walk it: tiles of 512 rows, blocks of
// columns, and in each (tile, block) runs of rows with the same number of values (ops/sparse_lowrank/plan.py).
#pragma once

#include <algorithm>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/gemm.h"
#include "cpu/tensors.h"

namespace w2s::sparse {

constexpr int64_t TILE = 512, PLAN_BLOCK = 256;
inline int64_t pieces(int64_t n, int64_t of) { return (n + of - 1) / of; }

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
  const int32_t *starts = nullptr, *runs = nullptr, *order = nullptr;
  const uint16_t* entry = nullptr;
  const uint8_t* column = nullptr;

  Pattern(const Tensor& ptr, const Tensor& cols, const Tensors& plan, int64_t rows, int64_t columns, int64_t block, int64_t per_block)
      : rows(rows), columns(columns), nnz(cols.size(0)), block(block ? block : PLAN_BLOCK), per_block(per_block) {
    tiles = pieces(rows, TILE);
    blocks = pieces(columns, this->block);
    if (block) {
      bytes = integers<uint8_t>(cols);
      const int64_t width = columns - (blocks - 1) * block;
      last_per_block = (2 * per_block * width + block) / (2 * block);
      return;
    }
    row_ptr = integers<int32_t>(ptr);
    if (cols.scalar_type() == ScalarType::Int) wide = integers<int32_t>(cols);
    else narrow = integers<uint16_t>(cols);
    if (plan.size() != 5) return;  // decoding a few tokens walks row by row
    starts = integers<int32_t>(plan[0]);
    runs = integers<int32_t>(plan[1]);
    entry = integers<uint16_t>(plan[2]);
    column = integers<uint8_t>(plan[3]);
    order = integers<int32_t>(plan[4]);
  }

  void needs_plan() const {
    STD_TORCH_CHECK(starts || bytes || !nnz, "w2s_fast: a csr support on the CPU carries its walking order (5 tensors)");
  }
  int64_t rows_of(int64_t tile) const { return std::min(TILE, rows - tile * TILE); }
  int64_t width_of(int64_t b) const { return std::min(block, columns - b * block); }
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

#define W2S_SUPPORT_PARAMETERS \
  Tensor row_ptr, Tensor cols, Tensors plan, int64_t rows, int64_t columns, int64_t block, int64_t per_block
#define W2S_SUPPORT_ARGUMENTS row_ptr, cols, plan, rows, columns, block, per_block

}  // namespace w2s::sparse
