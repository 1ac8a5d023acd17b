#include "cpu/sparse_lowrank/support.h"

namespace w2s::sparse {

Pattern::Pattern(const SupportArguments& s)
    : rows(s.rows), columns(s.columns), nnz(s.cols.size(0)), block(s.block ? s.block : PLAN_BLOCK), per_block(s.per_block) {
  tiles = pieces(rows, TILE);
  blocks = pieces(columns, block);
  if (s.block) {
    bytes = integers<uint8_t>(s.cols);
    const int64_t width = columns - (blocks - 1) * block;
    last_per_block = (2 * per_block * width + block) / (2 * block);
    expect(s.cols, "cols", {rows * (std::max<int64_t>(blocks - 1, 0) * per_block + last_per_block)});
    return;
  }
  expect(s.row_ptr, "row_ptr", {rows + 1});
  row_ptr = integers<int32_t>(s.row_ptr);
  check(row_ptr[rows] == nnz, "cols must have as many entries as row_ptr says");
  if (s.cols.scalar_type() == ScalarType::Int) wide = integers<int32_t>(s.cols);
  else narrow = integers<uint16_t>(s.cols);
  if (s.plan.size() == 1) {  // decoding a few tokens walks row by row
    const int64_t words = pieces(columns, 64);
    expect(s.plan[0], "plan[0]", {rows, 8 * words});
    bits = reinterpret_cast<const uint64_t*>(integers<uint8_t>(s.plan[0]));
  }
  if (s.plan.size() != 5) return;
  starts = integers<int32_t>(s.plan[0]);
  runs = integers<int32_t>(s.plan[1]);
  entry = integers<uint16_t>(s.plan[2]);
  column = integers<uint8_t>(s.plan[3]);
  order = integers<int32_t>(s.plan[4]);
  expect(s.plan[0], "plan[0]", {tiles * blocks + 1, 3});
  const int32_t* end = starts + 3 * tiles * blocks;  // what follows the last tile
  expect(s.plan[1], "plan[1]", {end[0], 2}), expect(s.plan[2], "plan[2]", {end[1]});
  expect(s.plan[3], "plan[3]", {nnz}), expect(s.plan[4], "plan[4]", {nnz});
}

void Pattern::needs_plan() const { check(starts || bytes || !nnz, "a csr support on the CPU carries its walking order (5 tensors)"); }

}  // namespace w2s::sparse
