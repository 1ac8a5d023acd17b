// The kernels of modulation, for for_each_target.h, which takes one header.
#include "cpu/kv_compressed_attention/rows_kernel.h"
#include "cpu/diffusion/modulation_kernel.h"
