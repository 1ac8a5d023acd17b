// A step of Adam in a subspace, and of the gradient outside it: what the passes over matrices take.
#pragma once

#include "cpu/gemm.h"
#include "cpu/gemm_tile.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace w2s {

struct Block {  // rows [top, bottom), columns [begin, end)
  int64_t top, bottom, begin, end;
};

// R [rows, columns] contiguous, and the moments and psi like it. Sums of squares go to one number a row, or a column.
template <class A>
struct Moments {
  const A* low;
  A *first, *second, *psi;
  int64_t columns;
  bool by_row;
  A beta1, rest1, beta2, rest2, eps;  // rest = 1 - beta, taken in double
  double *sum_psi, *sum_low;
};

template <class A>
struct Update {  // p = keep p + back - rate phi G; back [.., columns] from row `top` of p on, or null; phi null: no G
  Rows p, grad;
  const A* back;
  int64_t top, columns;
  bool by_row;
  const A* phi;
  A keep, rate;
};

// A step with P on the right, by tiles of rows: P [n, r] packed for both products, in panels of `width` columns of pieces
// of the depth. low and psi [m, r]; p = keep p - rate phi G + alpha psi P^T, phi null: no G.
template <class A>
struct Tiled {
  Rows p, grad;
  const A *basis, *forth, *back;
  int64_t down, across;  // of basis
  int64_t m, n, r, depth, back_depth;
  A *low, *psi;
  double* squares;  // of G, to the rows' sums, or null
  const A* phi;
  A keep, rate, alpha;
};

template <class A>
struct ProjectedKernels {  // projected_step_kernel.cpp
  void (*moments)(const Moments<A>& s, const Block& b);
  void (*squares)(const Rows& x, bool by_row, double* sums, const Block& b);  // added to the sums
  void (*inside)(const Moments<A>& s, const A* phi, A scale, const Block& b);  // psi = scale (psi - phi R)
  void (*update)(const Update<A>& s, const Block& b);
  Tile (*shape)();
  void (*pack)(const Tiled<A>& s, bool back, int64_t k0, int64_t panel, A* to);
  void (*project)(const Tiled<A>& s, int64_t top, int64_t bottom, A* left);  // rows of low; left: rows x depth and a vector
  void (*apply)(const Tiled<A>& s, int64_t top, int64_t bottom, A* left);    // rows of p; left: rows x back_depth and a vector
};

}  // namespace w2s
