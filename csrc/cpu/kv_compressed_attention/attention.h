// Attention of N queries over M keys on plain pointers; the compressed-attention ops and the whole path call these.
#pragma once

#include "cpu/tensors.h"

namespace w2s {
namespace attention {

// [B, tokens, H, D] of any strides with D contiguous.
struct Heads {
  char* data = nullptr;
  int64_t batch = 0, token = 0, head = 0, bytes = 4;  // strides in bytes
  Dtype dtype = Dtype::f32;
  Heads() = default;
  explicit Heads(const Tensor& t) : data(static_cast<char*>(t.data_ptr())), dtype(dtype_of(t.scalar_type())) {
    bytes = bytes_of(dtype);
    batch = t.stride(0) * bytes;
    token = t.stride(1) * bytes;
    head = t.stride(2) * bytes;
  }
  // [B, tokens, S, C] with slot s seen as H heads of D
  static Heads of_slot(const Tensor& t, int64_t slot, int64_t D) {
    Heads h(t);
    h.data += slot * h.head;
    h.head = D * h.bytes;
    return h;
  }
  char* at(int64_t b, int64_t n, int64_t h) const { return data + b * batch + n * token + h * head; }
};

struct Problem {
  int64_t B, N, M, H, D;
  double scale;
  Heads q, k, v, out;
  void* softmax;  // [2, B, H, N] in the arithmetic's type: the largest score, the sum of exponentials above it
};

struct Gradients {
  Heads grad, dq, dk, dv;
  bool need_q, need_kv;
};

// Ours, or the library's where this machine runs that faster (attention_library.cpp).
void forward(const Problem& p, bool f64);
void backward(const Problem& p, const Gradients& g, bool f64);
std::optional<Tensor> forward_made(const Problem& p, bool f64);  // [B, N, H, D] by the library, whatever p.out is; or none
void forward_own(const Problem& p, bool f64);
void backward_own(const Problem& p, const Gradients& g, bool f64);

// Uninitialised memory on a cache line.
template <class A>
struct Buffer {
  A* data = nullptr;
  explicit Buffer(int64_t n)
      : data(static_cast<A*>(::operator new(size_t(n + 64) * sizeof(A), std::align_val_t(64)))) {}
  ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t pieces(int64_t n, int64_t of) { return (n + of - 1) / of; }

}  // namespace attention
}  // namespace w2s
