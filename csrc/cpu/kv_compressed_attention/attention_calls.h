// Attention for hosts: ours, or the library's where this machine runs that faster (attention_library.cpp).
#pragma once

#include <optional>

#include "cpu/kv_compressed_attention/attention.h"
#include "cpu/tensors.h"

namespace w2s {
namespace attention {

void forward(const Problem& p, bool f64);
void backward(const Problem& p, const Gradients& g, bool f64);
bool forward_by_tiles(const Problem& p);  // attention_amx.cpp; false, and nothing done, where the tile unit does not serve
std::optional<Tensor> forward_made(const Problem& p, bool f64);  // [B, N, H, D] by the library, whatever p.out is; or none

}  // namespace attention
}  // namespace w2s
