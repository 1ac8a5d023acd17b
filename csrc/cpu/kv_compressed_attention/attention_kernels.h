// The two kernels of attention, for for_each_target.h, which takes one header.
#include "cpu/kv_compressed_attention/attention_kernel.h"
#include "cpu/kv_compressed_attention/attention_backward_kernel.h"
