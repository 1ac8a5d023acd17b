// c = alpha a b, or c += alpha a b, for matrices of any strides: the one dense product of the CPU kernels.
//
// Ours: operands of any dtype are widened while they are packed, sums are in the type of c, and their order depends on
// the shapes alone, not on the number of threads. The library's (torch.mm) takes one dtype and rounds a bfloat16 product
// to bfloat16; it runs AVX2 code on AMD (235 of 530 GFLOP/s on two Zen 5 cores, ours 490) and is at its best on Intel.
// So float32 products take whichever this machine runs faster (gemm_library.cpp).
#pragma once

#include <cstdint>

#include "cpu/vec.h"

namespace w2s {

struct Operand {  // a view of a matrix; strides in elements
  const void* data;
  Dtype dtype;
  int64_t rows, columns, down, across;
  Operand t() const { return {data, dtype, columns, rows, across, down}; }
  Operand part(int64_t row, int64_t count) const {  // rows [row, row + count)
    return {static_cast<const char*>(data) + row * down * bytes_of(dtype), dtype, count, columns, down, across};
  }
};

template <class A>
struct Target {  // where a product goes; strides in elements
  A* data;
  int64_t down, across;
};

constexpr int64_t FEW = 32;  // rows that are not worth packing the other operand for

// a.rows x b.columns; a.columns == b.rows. Calls torch's parallel_for; inside one it runs on that thread alone.
void gemm(const Operand& a, const Operand& b, Target<float> c, float alpha, bool add);
void gemm(const Operand& a, const Operand& b, Target<double> c, double alpha, bool add);

// Our own product, and the library's where it is to be taken (else false, and nothing is done).
void gemm_own(const Operand& a, const Operand& b, Target<float> c, float alpha, bool add);
bool library_takes(int64_t rows, int64_t columns, int64_t depth, bool transposed);  // transposed: b's depth is contiguous
bool gemm_library(const Operand& a, const Operand& b, Target<float> c, float alpha, bool add);
// The same of operands narrower than float32, of which pieces are widened for it.
bool gemm_widened(const Operand& a, const Operand& b, Target<float> c, float alpha, bool add);
// c [a.rows, b.columns], next to each other, = a b rounded to bfloat16, of bfloat16 operands, where the library's product is to
// be taken (else false, and nothing is done): it rounds, so what is added to it is added to a rounded sum, as by eager PyTorch.
bool gemm_library_bf16(const Operand& a, const Operand& b, void* c);

// c = a b, or c += a b, of bfloat16 operands with the machine's own bfloat16 instructions, where it has them: exact
// products summed in float32, subnormal numbers taken as 0. The dot instruction runs at twice the rate of gemm, the tile
// unit (AMX) at ten times. Where it has neither: gemm.
bool has_bf16_dot();
void gemm_bf16(const Operand& a, const Operand& b, Target<float> c, bool add);
// c = a b rounded to bfloat16 as it leaves the registers, of operands that gemm_bf16 sums in one piece; else false, and
// nothing is done. c.across is 1.
bool gemm_bf16_rounded(const Operand& a, const Operand& b, Target<uint16_t> c);
bool has_amx();
void gemm_amx(const Operand& a, const Operand& b, Target<float> c, bool add);

// Memory of this thread that stays allocated between calls (fresh pages cost as much as the work). 64-byte aligned; the
// content is lost at the next call with the same slot.
constexpr int SCRATCH_SLOTS = 8;  // 0 and 1 are gemm's
void* scratch(int slot, int64_t bytes);
template <class A>
inline A* scratch_of(int slot, int64_t elements) {
  return static_cast<A*>(scratch(slot, elements * int64_t(sizeof(A))));
}

}  // namespace w2s
