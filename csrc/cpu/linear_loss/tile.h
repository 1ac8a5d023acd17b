// Row kernels on a chunk of a tile of logits; tile_kernel.cpp says what each does.
#pragma once

#include "cpu/kernels.h"

namespace w2s {

// z is stored vocabulary-major: z[v * ld + t]
template <class A>
struct TileKernels {
  void (*max)(const A* z, int64_t rows, int64_t ld, A* top);
  void (*exp)(A* z, int64_t rows, int64_t ld, const A* ref, A* out);
  void (*stats)(A* z, int64_t rows, int64_t ld, A* top, A* sum);
  void (*spread)(const A* z, int64_t rows, int64_t ld, const A* top, A* out);
  void (*merge)(const A* top, const A* sum, int64_t chunks, int64_t ld, const A* ref, A* newest, A* total);
  void (*grad)(const A* z, int64_t ldz, A* out, int64_t ldo, int64_t rows, int64_t columns, const A* lse, const A* coef);
  void (*grad_more)(const A* z, int64_t ldz, A* out, int64_t ldo, int64_t rows, int64_t columns, const A* lse, const A* coef,
                    const A* log_coef, const A* all, const A* weight);
  void (*keep)(const A* z, int64_t rows, int64_t ld, const A* top, uint16_t* out);
  void (*back)(const uint16_t* kept, int64_t ldk, A* out, int64_t ldo, int64_t rows, int64_t columns, const A* top);
  void (*grad_kept)(const uint16_t* kept, int64_t ldk, uint16_t* out, int64_t ldo, int64_t rows, int64_t columns, const A* top, const A* lse,
                    const A* coef);
  void (*bias)(A* z, int64_t rows, int64_t ld, int64_t columns, const A* bias, const A* coef);
  void (*cap)(A* s, int64_t rows, int64_t ld, const A* bias, A cap);
  void (*add)(A* z, int64_t ldz, const A* s, int64_t lds, int64_t rows, int64_t columns, const A* coef, bool first);
  void (*slope)(A* out, const A* g, const A* s, int64_t rows, int64_t ld, A cap);
  void (*dot)(const A* g, const A* s, const A* bias, int64_t rows, int64_t ld, A* out);
  void (*rows)(const A* g, int64_t rows, int64_t ld, int64_t columns, const A* coef, A* out);
  void (*outer)(const A* g, int64_t rows, int64_t ld, int64_t columns, const A* h, int64_t pitch, int64_t depth, Dtype dtype, void* out);
};

}  // namespace w2s
