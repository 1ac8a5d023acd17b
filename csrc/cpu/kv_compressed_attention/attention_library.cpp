// The library's attention (torch's scaled_dot_product_attention for a CPU) beside ours, where this machine runs it faster:
// on the tile unit (AMX) it multiplies bfloat16 many times as fast as float32.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "cpu/choice.h"
#include "cpu/kv_compressed_attention/attention_calls.h"

namespace w2s {
namespace attention {
namespace {

// Forward or gradient, dtype, and whether a head has LARGE scores: the library cuts queries by their number, and its rate on
// a head of 512 x 128 is a third of that on 1024 x 256 (bfloat16 gradient on a Xeon with AMX).
enum Class { forward_f32, forward_bf16, backward_f32, backward_bf16, SIZES, CLASSES = 2 * SIZES };
constexpr const char* NAMES[CLASSES] = {"attention-float32", "attention-bfloat16", "attention-gradient-float32", "attention-gradient-bfloat16",
                                        "attention-large-float32", "attention-large-bfloat16", "attention-large-gradient-float32",
                                        "attention-large-gradient-bfloat16"};
constexpr int64_t LARGE = 1 << 17;
constexpr double SMALL = 1 << 19;  // multiply-adds below which ours is taken: the library's call and copies cost more

void forward_own(const Problem& p, bool f64) {
  if (forward_by_tiles(p)) return;
  with_kernels<AttentionKernels>(f64, [&](const auto& kernel) { kernel.forward(p); });
}

void backward_own(const Problem& p, const Gradients& g, bool f64) {
  with_kernels<AttentionKernels>(f64, [&](const auto& kernel) { kernel.backward(p, g); });
}

ScalarType type_of(Dtype dtype) { return dtype == Dtype::bf16 ? ScalarType::BFloat16 : ScalarType::Float; }

// [B, H, tokens, D]
Tensor view(const Heads& x, const Problem& p, int64_t tokens) {
  const int64_t sizes[4] = {p.B, p.H, tokens, p.D}, strides[4] = {x.batch / x.bytes, x.slot / x.bytes, x.token / x.bytes, 1};
  return torch::stable::from_blob(x.data, {sizes, 4}, {strides, 4}, torch::stable::Device(torch::headeronly::DeviceType::CPU), type_of(x.dtype));
}

Tensor owned(AtenTensorHandle handle) { return Tensor(handle); }

// the largest score and the sum above it become the logarithm of the whole sum and 1, and back
Tensor whole_sum(const Problem& p) {
  const int64_t n = p.B * p.H * p.N;
  const float *top = static_cast<const float*>(p.softmax), *total = top + n;
  Tensor lse = fresh(view(p.q, p, p.N), {p.B, p.H, p.N}, ScalarType::Float);
  float* out = static_cast<float*>(lse.data_ptr());
  for (int64_t i = 0; i < n; ++i) out[i] = top[i] + std::log(total[i]);
  return lse;
}

Tensor made_by_library(const Problem& p) {
  AtenTensorHandle out, sums;
  double scale = p.scale;
  library_call(aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu(
      view(p.q, p, p.N).get(), view(p.k, p, p.M).get(), view(p.v, p, p.M).get(), 0.0, 0, nullptr, &scale, &out, &sums));
  const Tensor found = owned(out), lse = torch::stable::contiguous(owned(sums));
  const int64_t n = p.B * p.H * p.N;
  float* top = static_cast<float*>(p.softmax);
  std::memcpy(top, lse.data_ptr(), size_t(n) * sizeof(float));
  std::fill(top + n, top + 2 * n, 1.0f);
  return found;
}

void forward_by_library(const Problem& p) {
  Tensor to = view(p.out, p, p.N);
  torch::stable::copy_(to, made_by_library(p));
}

void backward_by_library(const Problem& p, const Gradients& g) {
  AtenTensorHandle q, k, v;
  double scale = p.scale;
  library_call(aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu_backward(
      view(g.grad, p, p.N).get(), view(p.q, p, p.N).get(), view(p.k, p, p.M).get(), view(p.v, p, p.M).get(), view(p.out, p, p.N).get(),
      whole_sum(p).get(), 0.0, 0, nullptr, &scale, &q, &k, &v));
  const Tensor dq = owned(q), dk = owned(k), dv = owned(v);
  const auto put = [&](const Heads& to, const Tensor& from, int64_t tokens) {
    Tensor place = view(to, p, tokens);
    torch::stable::copy_(place, from);
  };
  if (g.need_q) put(g.dq, dq, p.N);
  if (g.need_kv) put(g.dk, dk, p.M), put(g.dv, dv, p.M);
}

// Both ways on a problem of one to some milliseconds.
Choice& choice(int c) {
  static Choice choices[CLASSES] = {Choice(NAMES[0]), Choice(NAMES[1]), Choice(NAMES[2]), Choice(NAMES[3]),
                                    Choice(NAMES[4]), Choice(NAMES[5]), Choice(NAMES[6]), Choice(NAMES[7])};
  choices[c].settle([&](auto&& race) {
    const int kind = c % SIZES, twice = c >= SIZES ? 2 : 1;
    const bool narrow = kind == forward_bf16 || kind == backward_bf16;
    const int64_t B = 1, H = 4, N = 512 * twice, M = 128 * twice, D = 64, bytes = narrow ? 2 : 4;
    std::vector<char> memory[8];
    const auto heads = [&](int i, int64_t tokens) {
      memory[i].assign(size_t(B * tokens * H * D * bytes), 0);
      Heads x;
      x.data = memory[i].data(), x.bytes = bytes, x.dtype = narrow ? Dtype::bf16 : Dtype::f32;
      x.slot = D * bytes, x.token = H * D * bytes, x.batch = tokens * x.token;
      return x;
    };
    std::vector<float> softmax(size_t(2 * B * H * N), 1.0f);
    const Problem p{B, N, M, H, D, 0.125, heads(0, N), heads(1, M), heads(2, M), heads(3, N), softmax.data()};
    const Gradients g{heads(4, N), heads(5, N), heads(6, M), heads(7, M), true, true};
    const double work = 4.0 * double(B * H * N) * double(M * D);
    if (kind == forward_f32 || kind == forward_bf16) race(work, [&] { forward_own(p, false); }, [&] { forward_by_library(p); });
    else race(work, [&] { backward_own(p, g, false); }, [&] { backward_by_library(p, g); });
  });
  return choices[c];
}

bool takes(const Problem& p, int c, std::initializer_list<const Heads*> all) {
  if (double(p.B * p.H * p.N) * double(p.M * p.D) < SMALL || !library_allowed()) return false;
  if (p.q.dtype != Dtype::f32 && p.q.dtype != Dtype::bf16) return false;
  for (const Heads* x : all)
    if (x->dtype != p.q.dtype) return false;
  if (p.q.dtype == Dtype::bf16) ++c;
  if (p.N * p.M >= LARGE) c += SIZES;
  return library_forced() || choice(c).library_is_faster();
}

}  // namespace

std::optional<Tensor> forward_made(const Problem& p, bool f64) {
  if (f64 || !takes(p, forward_f32, {&p.k, &p.v})) return std::nullopt;
  return torch::stable::contiguous(torch::stable::transpose(made_by_library(p), 1, 2));
}

void forward(const Problem& p, bool f64) {
  if (!f64 && takes(p, forward_f32, {&p.k, &p.v, &p.out})) return forward_by_library(p);
  forward_own(p, f64);
}

void backward(const Problem& p, const Gradients& g, bool f64) {
  if (!f64 && takes(p, backward_f32, {&p.k, &p.v, &p.out, &g.grad})) return backward_by_library(p, g);
  backward_own(p, g, f64);
}

}  // namespace attention
}  // namespace w2s
