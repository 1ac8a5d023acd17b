#include "cpu/tensors.h"

#include "cpu/convert.h"

namespace w2s {
namespace {

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Bool: return "bool";
    default: return "of another dtype";
  }
}

}  // namespace

Dtype dtype_of(const Tensor& t) { return dtype_of(t.scalar_type()); }

Rows::Rows(const Tensor& t) : data(static_cast<char*>(t.data_ptr())), dtype(dtype_of(t)) {
  bytes = bytes_of(dtype);
  stride = t.size(0) > 1 ? t.stride(0) * bytes : 0;
}

Flat::Flat(const Tensor& t) : data(t.data_ptr()), dtype(dtype_of(t)), count(t.numel()) {}

Slots::Slots(const Tensor& t) : data(static_cast<char*>(t.data_ptr())), dtype(dtype_of(t)) {
  bytes = bytes_of(dtype);
  batch = t.stride(0) * bytes;
  token = t.stride(1) * bytes;
  slot = t.dim() > 3 ? t.stride(2) * bytes : 0;
}

Tensor fresh(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape, std::optional<ScalarType> type) {
  using torch::stable::detail::from, torch::stable::detail::to;
  int32_t dtype;
  if (type) dtype = to<int32_t>(from(*type));
  else library_call(aoti_torch_get_dtype(like.get(), &dtype));
  std::vector<int64_t> strides(shape.size());
  int64_t next = 1;
  for (size_t i = shape.size(); i-- > 0; next *= std::max<int64_t>(shape[i], 1)) strides[i] = next;
  AtenTensorHandle made;
  library_call(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

void expect(const Tensor& t, const char* argument, torch::headeronly::IntHeaderOnlyArrayRef shape, std::optional<ScalarType> type) {
  bool same = t.dim() == int64_t(shape.size()) && (!type || t.scalar_type() == *type);
  for (size_t d = 0; same && d < shape.size(); ++d) same = t.size(int64_t(d)) == shape[d];
  if (same) return;
  const auto text = [](const auto& sizes) {
    std::string all;
    for (const int64_t n : sizes) all += (all.empty() ? "" : ", ") + std::to_string(n);
    return "[" + all + "]";
  };
  throw Refusal(argument + (" must be " + text(shape)) + (type ? std::string(" ") + name_of(*type) : "") + ", got " + text(shape_of(t)) +
                " " + name_of(t.scalar_type()) + ".");
}

std::vector<double> numbers(const Tensor& t) {
  const int64_t rows = t.dim() ? t.size(0) : 1, columns = t.dim() > 1 ? t.size(1) : 1;
  const int64_t down = t.dim() ? t.stride(0) : 0, across = t.dim() > 1 ? t.stride(1) : 0;
  std::vector<double> found(size_t(rows * columns));
  const Dtype dtype = dtype_of(t);
  const void* data = t.data_ptr();
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t at = i * down + j * across;
      double x;
      if (dtype == Dtype::f32) x = static_cast<const float*>(data)[at];
      else if (dtype == Dtype::f64) x = static_cast<const double*>(data)[at];
      else if (dtype == Dtype::bf16) x = bf16_to_float(static_cast<const uint16_t*>(data)[at]);
      else x = half_to_float(static_cast<const uint16_t*>(data)[at]);
      found[size_t(i * columns + j)] = x;
    }
  return found;
}

Tensor narrowed(const std::vector<double>& sums, const Tensor& like) {
  Tensor made = empty_of(like);
  check(made.numel() == int64_t(sums.size()), "there must be as many sums as elements");
  kernels<ConvertKernels, double>().narrow(sums.data(), made.numel(), dtype_of(like), made.data_ptr());
  return made;
}

}  // namespace w2s
