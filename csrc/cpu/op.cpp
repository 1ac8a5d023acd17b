#include "cpu/op.h"

#include "cpu/kernels.h"

namespace w2s {
namespace {

// "spmm: Tensor, ... -> Tensor, \n" for every implementation of this library
std::string& signatures() {
  static std::string all;
  return all;
}

}  // namespace

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
