// Tiles of scores and what is done with a row or a strip of columns of one; contrastive_loss_kernel.cpp says how.
#pragma once

#include "cpu/kernels.h"

namespace w2s {

constexpr int64_t SIDE = 1024;  // most columns of a tile
constexpr int64_t STRIP = 64;   // columns of one item of work

// z = scale raw + bias. What belongs to a column can be read up to the next multiple of PAD.
template <class A>
struct ContrastiveTile {
  A* raw;  // row r at raw + r ld; ld is at least the columns, padded
  int64_t rows, columns, ld;
  A scale, bias;
  int64_t own;   // column of row 0's own, one further a row; may lie outside
  bool exclude;  // an own column is left out
  const A *row_labels = nullptr, *column_labels = nullptr;  // from 1 on; padding is 0; or null
};

template <class A>
struct ContrastiveRow {
  A max, sum;        // sum of exp(z - max)
  A own, positives;  // z of the own column, 0 where it lies outside; sum of z over columns of the row's label but the own
};

// Gradient in z: coef_r exp(z - max_r) + coef_c exp(z - max_c) - [same label] (share_r + share_c), less `own` on the own
// column (0 there where it is left out). Null: none.
template <class A>
struct ContrastiveWeights {
  const A *row_max, *row_coef, *row_share;
  const A *column_max, *column_coef, *column_share;
  A own;
};

struct ContrastiveSums {
  double gradient, product, loss;  // sums over a row: dz, dz raw, and the losses of a sigmoid
};

template <class A>
struct ContrastiveKernels {
  ContrastiveRow<A> (*row)(const ContrastiveTile<A>& t, int64_t r);
  // of STRIP columns from c on: max, sum, and sum of z over rows of the column's label (with labels)
  void (*columns)(const ContrastiveTile<A>& t, int64_t c, A* max, A* sum, A* positives);
  // scale dz in place of row r, as numbers of `dtype` from the row's start
  ContrastiveSums (*gradient)(const ContrastiveTile<A>& t, const ContrastiveWeights<A>& w, int64_t r, Dtype dtype);
  // the same of share (sigmoid(z) - [own]), with the sum of softplus(z) - [own] z
  ContrastiveSums (*sigmoid)(const ContrastiveTile<A>& t, A share, int64_t r, Dtype dtype);
};

}  // namespace w2s
