// A sparse matrix as the ops take it.
#pragma once

#include "cpu/sparse_lowrank/pattern.h"
#include "cpu/tensors.h"

namespace w2s::sparse {

struct SupportArguments {
  Tensor row_ptr, cols;
  Tensors plan;
  int64_t rows, columns, block, per_block;
  static constexpr int arguments = 7;
};

}  // namespace w2s::sparse
