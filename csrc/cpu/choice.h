// Where the library does the same work (a product, an attention), this machine takes whichever of the two it runs faster:
// found by timing both once, at first need, and kept in the user's cache folder. W2S_FAST_GEMM=own|library|auto decides
// otherwise.
//
// Our kernels sum in an order that depends on shapes alone; the library's may depend on the number of threads as well.
// torch.use_deterministic_algorithms(True) therefore takes ours.
#pragma once

#include <functional>
#include <mutex>

namespace w2s {

bool library_allowed();  // neither W2S_FAST_GEMM=own nor deterministic algorithms
bool library_forced();   // W2S_FAST_GEMM=library
// Has every class of float32 products timed, if it was not: before a parallel region that multiplies, as a race inside of it
// would be run beside the other threads' work, and what it found be kept for all calls of this machine.
void settle_products();

struct Choice {
  const char* name;
  double own = 0, library = 0;  // units of work a second

  explicit Choice(const char* name) : name(name) {}
  bool library_is_faster() const { return library > 1.03 * own; }

  using Work = std::function<void()>;
  using Race = std::function<void(double units, const Work& ours, const Work& theirs)>;
  // Reads the two rates, or calls set_up(race) to prepare the work and have both ways of it timed.
  void settle(const std::function<void(const Race&)>& set_up);

 private:
  std::once_flag once;
};

}  // namespace w2s
