// Compression of keys and values on plain pointers, for kv_compress and for the whole path.
#pragma once

#include <string>

#include "cpu/tensors.h"

namespace w2s {
template <Dtype d>
using Arithmetic = std::conditional_t<d == Dtype::f64, double, float>;

namespace compress {

// [B, tokens, slots, C] of any strides with C contiguous; strides in bytes.
struct Slots {
  char* data = nullptr;
  int64_t batch = 0, token = 0, slot = 0, bytes = 4;
  Dtype dtype = Dtype::f32;
  Slots() = default;
  explicit Slots(const Tensor& t) : data(static_cast<char*>(t.data_ptr())), dtype(dtype_of(t.scalar_type())) {
    bytes = bytes_of(dtype);
    batch = t.stride(0) * bytes;
    token = t.stride(1) * bytes;
    slot = t.stride(2) * bytes;
  }
  char* at(int64_t b, int64_t n, int64_t s) const { return data + b * batch + n * token + s * slot; }
};

#define W2S_COMPRESSION_PARAMETERS                                                                                      \
  int64_t height, int64_t width, int64_t ratio, std::string mode, std::optional<Tensor> weight, std::optional<Tensor> bias, \
      bool normalize, std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias
#define W2S_COMPRESSION_ARGUMENTS height, width, ratio, mode, weight, bias, normalize, norm_weight, norm_bias

// What is compressed and how: M outputs of T tokens each, with taps [sets, T, C] or one factor for all.
struct Problem {
  int64_t B, C, first, groups;  // slots [first, first + groups)
  int64_t height, width, ratio, M, T, across;  // across: windows in a row of the grid
  bool stride, normalize;
  double factor;
  std::optional<Tensor> weight, bias, norm_weight, norm_bias;
  bool f64;

  Problem(const Tensor& x, int64_t first, W2S_COMPRESSION_PARAMETERS)
      : B(x.size(0)), C(x.size(3)), first(first), groups(x.size(2) - first), height(height), width(width), ratio(ratio),
        stride(mode == "stride"), normalize(normalize), weight(weight), bias(bias), norm_weight(norm_weight),
        norm_bias(norm_bias), f64(x.scalar_type() == ScalarType::Double) {
    const bool sums = mode == "conv" || mode == "mean";
    across = width / ratio;
    M = stride ? (height * width + ratio - 1) / ratio : (height / ratio) * across;
    T = sums ? ratio * ratio : 1;
    factor = mode == "mean" ? 1.0 / double(T) : 1.0;
  }
  int64_t sets() const { return weight ? weight->size(0) : 1; }
  int64_t bias_sets() const { return bias ? bias->size(0) : 1; }
  ScalarType acc() const { return f64 ? ScalarType::Double : ScalarType::Float; }
  int64_t token(int64_t m, int64_t tap) const {
    if (stride) return m * ratio;
    return ((m / across) * ratio + tap / ratio) * width + (m % across) * ratio + tap % ratio;
  }
  bool used(int64_t n) const {  // whether token n belongs to an output
    if (stride) return n % ratio == 0;
    const int64_t y = n / width, x = n % width;
    if (T == 1 && (y % ratio || x % ratio)) return false;
    return y < height / ratio * ratio && x < across * ratio;
  }
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
