#include "cpu/op.h"

#include <string_view>

#include "cpu/kernels.h"

namespace w2s {
namespace {

// "spmm: Tensor, ... -> Tensor, \n" for every implementation of this library
std::string& signatures() {
  static std::string all;
  return all;
}

Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
Tensor with_rows(const Tensor& t) {
  const int64_t n = t.dim();
  return n == 0 || t.size(n - 1) <= 1 || t.stride(n - 1) == 1 ? t : torch::stable::contiguous(t);
}

template <class T>
T laid_out(const Tensor& t) {
  if constexpr (std::is_same_v<T, Tensor>) return packed(t);
  else if constexpr (std::is_same_v<T, Rowwise>) return {with_rows(t)};
  else return {t};
}

}  // namespace

template <class T>
T taken(StableIValue given) {
  using torch::stable::detail::to;
  constexpr std::string_view type = type_of<T>;
  if constexpr (type == "Tensor") {
    return laid_out<T>(to<Tensor>(given));
  } else if constexpr (type == "Tensor?") {
    const auto t = to<std::optional<Tensor>>(given);
    return t ? T(laid_out<typename T::value_type>(*t)) : T();
  } else if constexpr (type == "Tensor[]") {
    Tensors list = to<Tensors>(given);
    for (Tensor& t : list) t = std::is_same_v<T, Tensors> ? packed(t) : with_rows(t);
    return T{std::move(list)};
  } else {
    return to<T>(given);
  }
}
template double taken(StableIValue);
template int64_t taken(StableIValue);
template bool taken(StableIValue);
template std::string taken(StableIValue);
template ScalarType taken(StableIValue);
template std::vector<double> taken(StableIValue);
template std::vector<int64_t> taken(StableIValue);
template Tensor taken(StableIValue);
template Rowwise taken(StableIValue);
template Strided taken(StableIValue);
template std::optional<Tensor> taken(StableIValue);
template std::optional<Rowwise> taken(StableIValue);
template std::optional<Strided> taken(StableIValue);
template Tensors taken(StableIValue);
template RowwiseTensors taken(StableIValue);

StableIValue handed(Tensor result) { return torch::stable::detail::from(std::move(result)); }
StableIValue handed(Tensors results) { return torch::stable::detail::from(std::move(results)); }

void wrong_count(const char* op, size_t wanted, uint64_t given) {
  throw std::runtime_error("w2s_fast." + std::string(op) + ": the implementation takes or gives " + std::to_string(wanted) +
                           " values, the schema has " + std::to_string(given) + ". The extension is of another version.");
}

void refused(const char* op, const Refusal& error) { throw std::runtime_error("w2s_fast." + std::string(op) + ": " + error.what()); }

void Implementations::add(const char* op, const char* types, void (*call)(StableIValue*, uint64_t, uint64_t)) {
  signatures() += std::string(op) + ": " + types + "\n";
  if (!refusal()) library.impl(op, call);
}

}  // namespace w2s

// For w2s_fast/extension.py: why nothing was registered, or null; and what the implementations take and give.
extern "C" __attribute__((visibility("default"))) const char* w2s_fast_refusal() { return w2s::refusal(); }
extern "C" __attribute__((visibility("default"))) const char* w2s_fast_signatures() { return w2s::signatures().c_str(); }
