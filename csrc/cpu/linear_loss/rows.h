// A row of numbers in any dtype, and a bias in the accumulating type that is added to it, or null.
#pragma once

#include "cpu/vec.h"

namespace w2s {

struct RowSource {
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;
  const void* bias = nullptr;
};

}  // namespace w2s
