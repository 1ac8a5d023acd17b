#include "cpu/parallel.h"

#include <algorithm>
#include <torch/csrc/stable/ops.h>

namespace w2s {

int64_t threads() { return std::max<int64_t>(1, torch::stable::get_num_threads()); }

void parallel_call(int64_t count, int64_t grain, void (*work)(const void*, int64_t, int64_t), const void* context) {
  torch::stable::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { work(context, begin, end); });
}

}  // namespace w2s
