// Host side of the dual products: tensors to and from the accumulation type.
#pragma once

#include "cpu/convert.h"
#include "cpu/gemm.h"
#include "cpu/interval_bounds/boxes.h"
#include "cpu/tensors.h"

namespace w2s::interval {
namespace {

template <class A>
struct RowMatrix {  // rows of unit stride
  const A* data;
  int64_t rows, columns, stride;
};

inline bool transposed(const Tensor& w) { return w.size(1) > 1 && w.stride(1) != 1 && w.size(0) > 1 && w.stride(0) == 1; }

// out[n][k] from a matrix that is stored by columns: 16 columns of 64 rows at a time, so that both sides are whole lines
template <class A>
void turn(const Tensor& t, A* out) {
  constexpr int64_t DOWN = 64, ACROSS = 16;
  const Dtype dtype = dtype_of(t.scalar_type());
  const int64_t n = t.size(0), k = t.size(1), bytes = bytes_of(dtype), step = t.stride(1) * bytes;
  const char* data = static_cast<const char*>(t.data_ptr());
  parallel_items(pieces(n, DOWN), grain_of(DOWN * k), [&](int64_t block) {
    const int64_t i = block * DOWN, rows = std::min(DOWN, n - i);
    A columns[ACROSS][DOWN];
    for (int64_t j = 0; j < k; j += ACROSS) {
      const int64_t wide = std::min(ACROSS, k - j);
      for (int64_t q = 0; q < wide; ++q) kernels<ConvertKernels, A>().widen(data + i * bytes + (j + q) * step, dtype, rows, columns[q]);
      for (int64_t p = 0; p < rows; ++p)
        for (int64_t q = 0; q < wide; ++q) out[(i + p) * k + j + q] = columns[q][p];
    }
  });
}

template <class A>
RowMatrix<A> widened(const Tensor& t, CallMemory& memory) {
  const Rows rows(t);
  const int64_t n = t.size(0), k = t.size(1);
  if (rows.dtype == own_dtype<A> && (k <= 1 || t.stride(1) == 1))
    return {static_cast<const A*>(t.data_ptr()), n, k, n > 1 ? t.stride(0) : k};
  A* out = memory.get<A>(n * k);
  if (transposed(t)) {
    turn<A>(t, out);
  } else if (k > 1 && t.stride(1) != 1) {  // any strides, element by element
    const std::vector<double> all = numbers(t);
    std::copy(all.begin(), all.end(), out);
  } else {
    parallel_items(n, grain_of(k), [&](int64_t i) { kernels<ConvertKernels, A>().widen(rows.at(i, 0), rows.dtype, k, out + i * k); });
  }
  return {out, n, k, k};
}

template <class A>
A* widened_bias(const std::optional<Tensor>& bias, int64_t n, CallMemory& memory) {
  if (!bias) return nullptr;
  A* out = memory.get<A>(n + 64);
  std::fill(out, out + n + 64, A(0));
  kernels<ConvertKernels, A>().widen(bias->data_ptr(), dtype_of(bias->scalar_type()), n, out);
  return out;
}

template <class A>
struct Box {  // centre and radius [batch, ld], zeros past k
  A *c, *r;
  int64_t batch, k, ld;
};

template <class A>
Box<A> centered(const Tensor& a, const Tensor& b, bool bounds, bool sound, int64_t terms, CallMemory& memory, double spread = 0) {
  const int64_t batch = a.size(0), k = a.size(1), ld = round_up(k, 16) + 16;  // + 16: rows that are not 4096 bytes apart
  Box<A> box{memory.get<A>(batch * ld), memory.get<A>(batch * ld), batch, k, ld};
  const Rows first(a), second(b);
  parallel_items(batch, grain_of(k), [&](int64_t i) {
    kernels<LinearKernels, A>().center(first.at(i, 0), second.at(i, 0), first.dtype, bounds, sound, terms, spread, k, box.c + i * ld, box.r + i * ld);
  });
  return box;
}

// The same for products alone, which read no padding: the tensors themselves where they are what is asked for.
inline Box<float> plain_box(const Tensor& a, const Tensor& b, bool bounds, CallMemory& memory) {
  const int64_t batch = a.size(0), k = a.size(1);
  if (bounds || a.scalar_type() != ScalarType::Float || batch < 2 || a.stride(0) != b.stride(0) || a.stride(0) < k)
    return centered<float>(a, b, bounds, false, 0, memory);
  return {static_cast<float*>(a.data_ptr()), static_cast<float*>(b.data_ptr()), batch, k, a.stride(0)};
}

template <class A>
Operand operand(const A* data, int64_t rows, int64_t columns, int64_t down) {
  return {data, own_dtype<A>, rows, columns, down, 1};
}

// Rows of a stored matrix that a product takes made over (their absolute values, their signs' halves) at a time: a megabyte.
inline int64_t block_rows(int64_t columns) { return std::max<int64_t>(64, (int64_t(1) << 18) / std::max<int64_t>(columns, 1)); }

template <class A>
void narrow_rows(const A* from, Tensor& to) {
  const Rows rows(to);
  const int64_t columns = to.size(1);
  parallel_items(to.size(0), grain_of(columns), [&](int64_t i) {
    kernels<ConvertKernels, A>().narrow(from + i * columns, columns, rows.dtype, static_cast<char*>(to.data_ptr()) + i * columns * rows.bytes);
  });
}

}  // namespace
}  // namespace w2s::interval
