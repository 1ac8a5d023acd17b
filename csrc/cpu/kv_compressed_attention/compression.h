// Compression of keys and values, for kv_compress and for the whole path.
#pragma once

#include "cpu/kv_compressed_attention/compress.h"
#include "cpu/tensors.h"

namespace w2s {
namespace compress {

struct CompressionArguments {
  int64_t height, width, ratio;
  std::string mode;
  std::optional<Tensor> weight, bias;
  bool normalize;
  std::optional<Tensor> norm_weight, norm_bias;
  static constexpr int arguments = 9;
};

// Gradients of the parameters, in the arithmetic's type; [0] where there are none.
struct Parameters {
  Tensor weight, bias, norm_weight, norm_bias;
};

// kv [B, M, groups, C]; stats [B, M, groups, 2] if normalized
void forward(const Problem& p, const Slots& x, double eps, const Slots& kv, void* stats);
// dx is written in slots `first` and later of every token, if need_x
Parameters backward(const Problem& p, const Tensor& like, const Slots& grad, const Slots& x, const void* stats, const Slots& dx,
                    bool need_x, bool need_params);

}  // namespace compress
}  // namespace w2s
