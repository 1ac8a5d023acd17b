// What hosts and kernels of adaln_modulate, gate_residual and gate_residual_adaln say to each other.
#pragma once

#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace w2s {
namespace modulation {

// A vector of C a sample, or one a token, and a row of a table that is added to each.
struct Modulator {
  Flat vector, row;
  int64_t batch = 0, token = 0;  // strides in bytes, 0 where all share one vector
  bool each = false;             // one a token
  Modulator() = default;
  template <class Vector, class Row>
  Modulator(const Vector& v, const Row& r) : vector(v), row(r) {
    if (!v) return;
    each = v->size(1) != 1;
    if (v->size(0) > 1) batch = v->stride(0) * bytes_of(vector.dtype);
    if (each) token = v->stride(1) * bytes_of(vector.dtype);
  }
};

struct Forward {
  int64_t B, N, C;
  Slots x, y, added, h;  // without slots
  Modulator gate, shift, scale;
  double eps;
  void* stats;
};

struct Backward {
  int64_t B, N, C;
  Slots grad_added, grad_h, added, y, dx, dy;
  Modulator gate, scale;
  const void* stats;
  void *dgate, *dshift, *dscale;
  bool need_x, need_y, need_gate, need_modulation;
};

template <class A>
struct ModulationKernels {  // modulation_kernel.cpp
  void (*forward)(const Forward& f, Dtype dtype);
  void (*backward)(const Backward& f, Dtype dtype);
};

}  // namespace modulation
}  // namespace w2s
