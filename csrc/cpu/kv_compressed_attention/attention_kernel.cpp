#include <new>

#include "cpu/kv_compressed_attention/attention.h"

#include "cpu/target_begin.h"

#include "cpu/kv_compressed_attention/attention_forward_kernel.h"
#include "cpu/kv_compressed_attention/attention_backward_kernel.h"

using attention::AttentionKernels;
W2S_KERNELS(AttentionKernels, run_forward<Real>, run_backward<Real>)

#include "cpu/target_end.h"
