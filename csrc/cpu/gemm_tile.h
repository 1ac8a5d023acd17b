// The shape of a register tile of gemm_kernel.h, which differs between instruction sets.
#pragma once

namespace w2s {

struct Tile {
  int rows, columns;
};

}  // namespace w2s
