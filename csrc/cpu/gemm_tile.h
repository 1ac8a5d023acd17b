// The shape of a register tile of gemm_kernel.h, which differs between instruction sets, and what it reads in place.
#pragma once

#include <cstdint>

namespace w2s {

struct Bf16 {  // numbers as they lie in memory, widened as they are loaded
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

struct Tile {
  int rows, columns;
};

}  // namespace w2s
