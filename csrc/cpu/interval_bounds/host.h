// Tensors to and from the accumulation type. Included after for_each_target.h, which the dispatches below need.
#pragma once

#include "cpu/interval_bounds/linear.h"

namespace w2s::interval {
namespace {

template <class A>
Matrix<A> widened(const Tensor& t, Scratch<A>& scratch) {
  const Rows rows(t);
  const int64_t n = t.size(0), k = t.size(1);
  if (rows.dtype == own_dtype<A> && (k <= 1 || t.stride(1) == 1))
    return {static_cast<const A*>(t.data_ptr()), n, k, n > 1 ? t.stride(0) : k};
  A* out = scratch.get(n * k);
  if (k > 1 && t.stride(1) != 1) {  // any strides, element by element
    const std::vector<double> all = numbers(t);
    std::copy(all.begin(), all.end(), out);
  } else {
    parallel_items(n, 16, [&](int64_t i) { W2S_DISPATCH(widen_all<A>)(rows.at(i, 0), rows.dtype, k, out + i * k); });
  }
  return {out, n, k, k};
}

template <class A>
A* widened_bias(const std::optional<Tensor>& bias, int64_t n, Scratch<A>& scratch) {
  if (!bias) return nullptr;
  A* out = scratch.get(n + 64);
  std::fill(out, out + n + 64, A(0));
  W2S_DISPATCH(widen_all<A>)(bias->data_ptr(), dtype_of(bias->scalar_type()), n, out);
  return out;
}

template <class A>
struct Box {  // centre and radius [batch, ld], zeros past k
  A *c, *r;
  int64_t batch, k, ld;
};

template <class A>
Box<A> centered(const Tensor& a, const Tensor& b, bool bounds, bool sound, int64_t terms, Scratch<A>& scratch, double spread = 0) {
  const int64_t batch = a.size(0), k = a.size(1), ld = round_up(k, 16) + 16;  // + 16: rows that are not 4096 bytes apart
  Box<A> box{scratch.get(batch * ld), scratch.get(batch * ld), batch, k, ld};
  const Rows first(a), second(b);
  parallel_items(batch, 8, [&](int64_t i) {
    W2S_DISPATCH(center<A>)(first.at(i, 0), second.at(i, 0), first.dtype, bounds, sound, terms, spread, k, box.c + i * ld, box.r + i * ld);
  });
  return box;
}

template <class A>
void narrow_rows(const A* from, Tensor& to) {
  const Rows rows(to);
  const int64_t columns = to.size(1);
  parallel_items(to.size(0), 16, [&](int64_t i) {
    W2S_DISPATCH(narrow_all<A>)(from + i * columns, columns, rows.dtype, static_cast<char*>(to.data_ptr()) + i * columns * rows.bytes);
  });
}

}  // namespace
}  // namespace w2s::interval
