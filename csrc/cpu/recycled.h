// Memory of large gradients, kept for the next ones. glibc maps more than 32 MiB anew for every call, and first touches of
// such pages cost more than the arithmetic: 12 of 22 ms for the 56 MB of a dqkv of 4096 tokens, and 4 more to unmap it.
// Tensors own the memory as any others do; only when the last reference goes does the memory come back here, so it is
// never handed out twice. One block is kept, that of the last such call; what a call makes lies in one block.
#pragma once

#include <cstdlib>
#include <memory>
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

// Uninitialised contiguous CPU tensors of these shapes, like the tensors `like`, in recycled memory if they are large.
inline Tensors recycled_empty(const Tensors& like, const std::vector<std::vector<int64_t>>& shapes) {
  std::vector<int64_t> first(shapes.size() + 1);  // where each begins, in bytes
  for (size_t i = 0; i < shapes.size(); ++i) {
    int64_t bytes = bytes_of(dtype_of(like[i]));
    for (const int64_t n : shapes[i]) bytes *= n;
    first[i + 1] = first[i] + round_up(bytes, 64);
  }
  const int64_t total = first.back();
  void* const block = total > (int64_t(32) << 20) ? Recycled::store().take(size_t(total)) : nullptr;
  const std::shared_ptr<void> owner(block, [total](void* p) {
    if (p) Recycled::store().give(p, size_t(total));
  });
  Tensors made;
  for (size_t i = 0; i < shapes.size(); ++i) {
    const std::vector<int64_t>& shape = shapes[i];
    if (!block) {
      made.push_back(fresh(like[i], shape));
      continue;
    }
    std::vector<int64_t> strides(shape.size(), 1);
    for (size_t d = shape.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * shape[d];
    made.push_back(torch::stable::from_blob(static_cast<char*>(block) + first[i], shape, strides, like[i].device(), like[i].scalar_type(),
                                            [owner](void*) {}));
  }
  return made;
}
inline Tensor recycled_empty(const Tensor& like, std::vector<int64_t> shape) { return recycled_empty(Tensors{like}, {std::move(shape)})[0]; }

}  // namespace w2s
