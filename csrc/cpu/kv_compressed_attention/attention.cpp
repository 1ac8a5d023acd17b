#include <cmath>
#include <new>

#include "cpu/kv_compressed_attention/attention.h"
#include "cpu/kv_compressed_attention/transpose.h"

#define W2S_KERNEL "cpu/kv_compressed_attention/attention_kernels.h"
#include "cpu/for_each_target.h"

namespace w2s {
namespace attention {

void forward_own(const Problem& p, bool f64) {
  if (f64) W2S_DISPATCH(run_forward<double>)(p);
  else W2S_DISPATCH(run_forward<float>)(p);
}

void backward_own(const Problem& p, const Gradients& g, bool f64) {
  if (f64) W2S_DISPATCH(run_backward<double>)(p, g);
  else W2S_DISPATCH(run_backward<float>)(p, g);
}

}  // namespace attention
}  // namespace w2s
