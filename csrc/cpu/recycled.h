// Memory of a large gradient, kept for the next one. glibc maps more than 32 MiB anew for every call, and first touches of
// such pages cost more than the arithmetic: 12 of 22 ms for the 56 MB of a dqkv of 4096 tokens, and 4 more to unmap it.
// The tensor owns the memory as any other does; only when its last reference goes does the memory come back here, so it is
// never handed out twice. One block is kept, that of the last such gradient.
#pragma once

#include <cstdlib>
#include <mutex>
#include <utility>

#include "cpu/tensors.h"

namespace w2s {

class Recycled {
 public:
  static Recycled& store() {
    static Recycled* const one = new Recycled;  // never destroyed: tensors may outlive static objects
    return *one;
  }
  void* take(size_t bytes) {
    void* found = swap(nullptr, 0, bytes);
    if (!found && posix_memalign(&found, 64, bytes) != 0) found = nullptr;
    return found;
  }
  void give(void* block, size_t bytes) { swap(block, bytes, 0); }

 private:
  std::mutex mutex;
  void* kept = nullptr;
  size_t size = 0;

  // keeps `block` and returns what was kept if it has the wanted size; frees it otherwise
  void* swap(void* block, size_t bytes, size_t wanted) {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      std::swap(kept, block);
      std::swap(size, bytes);
    }
    if (block && bytes == wanted) return block;
    std::free(block);
    return nullptr;
  }
};

// An uninitialised contiguous CPU tensor like `like`, of recycled memory if it is large.
inline Tensor recycled_empty(const Tensor& like, std::vector<int64_t> shape) {
  int64_t bytes = bytes_of(dtype_of(like));
  for (const int64_t n : shape) bytes *= n;
  void* block = bytes > (int64_t(32) << 20) ? Recycled::store().take(size_t(bytes)) : nullptr;
  if (!block) return fresh(like, shape);
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * shape[i];
  return torch::stable::from_blob(block, shape, strides, like.device(), like.scalar_type(),
                                  [bytes](void* p) { Recycled::store().give(p, size_t(bytes)); });
}

}  // namespace w2s
