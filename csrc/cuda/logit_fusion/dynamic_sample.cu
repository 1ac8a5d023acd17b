// dynamic_sample on Hopper: solve the fusion weights of every row, fuse, filter and draw, in one launch that reads
// each logit from device memory once.
//
//     alpha:  KL(softmax(z_L + alpha d) || softmax(z_L)) = KL(Q_k || Q_0),   d_k = z_k - z_0k
//     token ~ filters(softmax((z_L + sum_k alpha_k d_k) / tau))
//
// One cluster of up to 16 blocks a row; z_L and the d_k stay in the blocks' shared memory as float32, 4 (1 + K) bytes
// a column (1.2 MB at V = 151,936, K = 1: 152 KB a block of 8). Every pass after the load reads shared memory only.
// Floor: B (1 + K + |anti|) V elements read once; at B = 64, V = 151,936, bfloat16, 58 MB. row.h holds the program.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/logit_fusion/row.h"
#include "cuda/team.cuh"

namespace w2s::fusion {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kPortableCluster = 8, kLargestCluster = 16;
constexpr int kLeastSlice = 2048;  // columns below which another block costs more than it saves (an estimate)
constexpr int64_t kSharedMemory = 227 * 1024;

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
struct Team : ClusterTeam {
  using ClusterTeam::ClusterTeam;
  template <class T>
  static __device__ __forceinline__ Four four(const T* x, int left) {
    return load_four<Four, T>(x, left);
  }
  template <class F>
  static __device__ __forceinline__ void of_type(Type type, F f) {
    if (type == Type::float32) return f(float{});
    if (type == Type::float16) return f(__half{});
    f(__nv_bfloat16{});
  }
};
#endif

struct Memory {
  Scratch scratch;
  Shared shared;
  alignas(16) float columns[];
};

__global__ void __launch_bounds__(kThreads, 1) dynamic_sample_kernel(const __grid_constant__ Arguments a) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) unsigned char bytes[];
  Memory& memory = *reinterpret_cast<Memory*>(bytes);
  Team team(memory.scratch);
  const int64_t row = blockIdx.x / static_cast<unsigned>(team.ranks);
  Row<Team> program{team, a, memory.shared, memory.columns, memory.columns + a.slice, row, team.rank * a.slice};
  program.run();
  team.sync_cluster();  // no block leaves while another may still read its slots
#endif
}

int64_t shared_bytes(int experts, int slice) {
  return static_cast<int64_t>(sizeof(Memory)) + 4 * (1 + static_cast<int64_t>(experts)) * slice;
}

int slice_of(int width, int blocks) { return ((width + blocks - 1) / blocks + 3) / 4 * 4; }

struct Launch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute cluster{};
  Launch(int64_t rows, int blocks, int64_t bytes, cudaStream_t stream) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(blocks);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.gridDim = dim3(static_cast<unsigned>(rows * blocks));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(bytes);
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  Launch(const Launch&) = delete;  // config points at cluster
};

void allow_large_clusters() {
  STD_CUDA_CHECK(cudaFuncSetAttribute(dynamic_sample_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedMemory));
  STD_CUDA_CHECK(cudaFuncSetAttribute(dynamic_sample_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
}

// Blocks of the largest cluster that the device runs: 16 need as many multiprocessors in one of its groups.
int largest_cluster(int device) {
  static std::atomic<int> known[64] = {};  // the query costs as much as a launch
  if (known[device % 64] != 0) return known[device % 64];
  allow_large_clusters();
  int clusters = 0;
  const Launch launch(1, kLargestCluster, kSharedMemory, nullptr);
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, dynamic_sample_kernel, &launch.config);
  if (error != cudaSuccess) (void)cudaGetLastError();
  return known[device % 64] = error == cudaSuccess && clusters > 0 ? kLargestCluster : kPortableCluster;
}

// The smallest cluster that holds the row, made larger while multiprocessors would idle.
int blocks_for(const Arguments& a, int64_t rows, int multiprocessors, int largest) {
  int blocks = 1;
  while (blocks < largest && shared_bytes(a.experts, slice_of(a.width, blocks)) > kSharedMemory) blocks *= 2;
  while (blocks < largest && 2 * blocks * rows <= multiprocessors && a.width / (2 * blocks) >= kLeastSlice) blocks *= 2;
  return blocks;
}

void launch(Arguments& a, int64_t rows, int device, cudaStream_t stream) {
  int multiprocessors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  const int blocks = blocks_for(a, rows, multiprocessors, largest_cluster(device));
  a.slice = slice_of(a.width, blocks);
  const int64_t bytes = shared_bytes(a.experts, a.slice);
  STD_TORCH_CHECK(bytes <= kSharedMemory, "w2s_fast.dynamic_sample_cuda: ", a.width, " columns of ", 1 + a.experts,
                  " rows do not fit the shared memory of ", blocks, " blocks");
  const Launch to(rows, blocks, bytes, stream);
  STD_CUDA_CHECK(cudaLaunchKernelEx(&to.config, dynamic_sample_kernel, static_cast<const Arguments&>(a)));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Scalars scalars(const std::optional<Tensor>& t) {
  if (!t) return {nullptr, 0, 0, false};
  const bool is_double = t->scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(is_double || t->scalar_type() == ScalarType::Float, "per-row arguments must be float32 or float64");
  return {t->const_data_ptr(), t->stride(0), t->dim() > 1 ? t->stride(1) : 0, is_double};
}

Logits logits(const Tensor& t, const Tensor& base, int64_t width) {
  STD_TORCH_CHECK(t.scalar_type() == base.scalar_type() && t.get_device_index() == base.get_device_index(),
                  "w2s_fast.dynamic_sample_cuda: base, experts and anti must share dtype and device");
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == base.size(0) && t.size(1) >= width && (width == 1 || t.stride(1) == 1),
                  "w2s_fast.dynamic_sample_cuda: logits must be [B, >= vocab_size] with unit stride in a row");
  return {t.const_data_ptr(), t.stride(0)};
}

Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Type::float32;
    case ScalarType::Half: return Type::float16;
    case ScalarType::BFloat16: return Type::bfloat16;
    default: STD_TORCH_CHECK(false, "w2s_fast.dynamic_sample_cuda: logits must be float32, float16 or bfloat16");
  }
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs dynamic_sample(Tensor base, std::vector<Tensor> experts, std::vector<Tensor> anti, double alpha_max,
                       int64_t nodes, int64_t first_candidate, double tol, int64_t multi, int64_t direction_kind,
                       std::optional<Tensor> direction, bool average, std::optional<Tensor> target_kl,
                       int64_t vocab_size, std::optional<Tensor> temperature, double temperature_value,
                       int64_t plausible, double plausible_value, Tensor uniform, int64_t top_k, double top_p,
                       double min_p) {
  const int64_t rows = base.size(0), count = static_cast<int64_t>(experts.size());
  STD_TORCH_CHECK(count >= 1 && count <= kMaxExperts && (anti.size() == 1 || anti.size() == experts.size()),
                  "w2s_fast.dynamic_sample_cuda: 1 to ", kMaxExperts, " experts and 1 or as many anti are served");
  STD_TORCH_CHECK(multi == 0 || multi == 1, "w2s_fast.dynamic_sample_cuda: multi must be 0 (ray) or 1 (decoupled)");
  STD_TORCH_CHECK(vocab_size >= 1 && vocab_size < (int64_t{1} << 24) && rows < (int64_t{1} << 26),
                  "w2s_fast.dynamic_sample_cuda: too many columns or rows");
  const torch::stable::accelerator::DeviceGuard guard(base.get_device_index());
  const auto make = [&](std::vector<int64_t> shape, ScalarType type) {
    return torch::stable::new_empty(base, torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()), type);
  };
  Outputs out{make({rows}, ScalarType::Long),         make({rows}, ScalarType::Float),
              make({rows}, ScalarType::Float),        make({rows}, ScalarType::Int),
              make({rows, count}, ScalarType::Float), make({rows, count}, ScalarType::Float),
              make({rows, multi == 1 ? count : 1}, ScalarType::Float), make({rows, count}, ScalarType::Bool)};
  if (rows == 0) return out;

  Arguments a{};
  a.type = type_of(base);
  a.base = logits(base, base, vocab_size);
  for (int64_t k = 0; k < count; ++k) {
    a.expert[k] = logits(experts[k], base, vocab_size);
    a.anti[k] = logits(anti[anti.size() == 1 ? 0 : k], base, vocab_size);
  }
  a.experts = static_cast<int>(count), a.width = static_cast<int>(vocab_size);
  a.alpha_max = alpha_max, a.tol = tol, a.nodes = static_cast<int>(nodes);
  a.first_candidate = static_cast<int>(first_candidate), a.direction_kind = static_cast<int>(direction_kind);
  a.decoupled = multi == 1, a.average = average, a.direction = scalars(direction), a.target_kl = scalars(target_kl);
  a.temperature = scalars(temperature), a.temperature_value = temperature_value, a.uniform = scalars(uniform);
  a.plausible = static_cast<int>(plausible), a.plausible_value = plausible_value;
  a.top_k = static_cast<int>(top_k < vocab_size ? top_k : 0), a.top_p = top_p, a.min_p = min_p;
  a.token = static_cast<int64_t*>(std::get<0>(out).mutable_data_ptr());
  a.logprob = static_cast<float*>(std::get<1>(out).mutable_data_ptr());
  a.lse = static_cast<float*>(std::get<2>(out).mutable_data_ptr());
  a.kept = static_cast<int*>(std::get<3>(out).mutable_data_ptr());
  a.alpha = static_cast<float*>(std::get<4>(out).mutable_data_ptr());
  a.target = static_cast<float*>(std::get<5>(out).mutable_data_ptr());
  a.achieved = static_cast<float*>(std::get<6>(out).mutable_data_ptr());
  a.saturated = static_cast<bool*>(std::get<7>(out).mutable_data_ptr());

  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(base.get_device_index(), &stream));
  const int device = base.get_device_index();
  launch(a, rows, device, static_cast<cudaStream_t>(stream));
  return out;
}

int64_t dynamic_sample_blocks(Tensor on) {
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  return largest_cluster(on.get_device_index());
}

}  // namespace
}  // namespace w2s::fusion

STABLE_TORCH_LIBRARY_IMPL(w2s_fast, CUDA, m) {
  m.impl("dynamic_sample_cuda", TORCH_BOX(&w2s::fusion::dynamic_sample));
  m.impl("dynamic_sample_cuda_blocks", TORCH_BOX(&w2s::fusion::dynamic_sample_blocks));
}
