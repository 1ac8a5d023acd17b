// sparse_lowrank_linear for up to 8 rows, in one cooperative launch: y = x S^T + s (x A^T) B^T + bias.
//
// One launch and not two: a layer takes 5 to 10 us at decode, a second launch would cost a fair part of that, and the
// grid's barrier that h = x A^T needs is free here, because a block computes its sparse part between the barrier's two
// halves. Needs every block resident, hence the cooperative launch; x (and then h) in shared memory, hence the limit on
// the width. Floor: 2 r (I + O) + (2 + index) K bytes, each read once (7B, 11008 x 4096, r 1024, K = 2.25M: 40 MB,
// 9.3 us at 4.3 TB/s). decode.h holds the program.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <type_traits>
#include <utility>

#include "cuda/sparse_lowrank/decode.h"

namespace w2s::sparse_lowrank {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 512, kWarps = kThreads / 32;

struct Team {
  cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  cooperative_groups::grid_group::arrival_token token{};
  int thread = static_cast<int>(threadIdx.x), threads = kThreads;
  int lane = thread % 32, lanes = 32, warp = thread / 32, warps = kWarps;
  int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);

  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ void arrive() { token = grid.barrier_arrive(); }
  __device__ __forceinline__ void wait() { grid.barrier_wait(std::move(token)); }
  __device__ __forceinline__ float sum(float v) const {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) v += __shfl_xor_sync(0xffffffffu, v, distance);
    return v;
  }
  static __device__ __forceinline__ uint4 weights16(const void* p) { return __ldg(static_cast<const uint4*>(p)); }
  static __device__ __forceinline__ float fresh(const float* p) { return __ldcg(p); }
  static __device__ __forceinline__ float widen(float x) { return x; }
  static __device__ __forceinline__ float widen(__half x) { return __half2float(x); }
  static __device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
  template <class T>
  static __device__ __forceinline__ T narrow(float x) {
    if constexpr (std::is_same_v<T, float>)
      return x;
    else if constexpr (std::is_same_v<T, __half>)
      return __float2half_rn(x);
    else
      return __float2bfloat16_rn(x);
  }
};

template <class T, int NP>
__global__ void __launch_bounds__(kThreads, NP == 1 ? 2 : 1) decode_kernel(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(128) unsigned char memory[];
  Team team;
  const int most = static_cast<int>((a.rows + gridDim.x - 1) / gridDim.x);
  const Layout<T, NP> at(a.columns, a.rank, most, kThreads, a.row_ptr == nullptr);
  Decode<Team, T, NP>(team, a, memory, at).run();
}

// One or two blocks a multiprocessor, all resident; the warps share out the rank by `parts`.
template <class T, int NP>
void launch(Arguments& a, const Tensor& like, int device, cudaStream_t stream) {
  int multiprocessors = 0, memory = 0, fit = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  const auto kernel = decode_kernel<T, NP>;
  int blocks = std::min(multiprocessors, a.rows);
  const Layout<T, NP> one(a.columns, a.rank, (a.rows + blocks - 1) / blocks, kThreads, a.row_ptr == nullptr);
  STD_TORCH_CHECK(one.total <= memory, "w2s_fast.sparse_lowrank_decode_cuda: ", a.n, " rows of ", a.columns,
                  " columns need ", one.total, " bytes of shared memory, a block has ", memory);
  const size_t bytes = static_cast<size_t>(one.total);
  // of each device, the bytes allowed so far, and the last layout's bytes and blocks: asking costs as much as a launch
  static std::atomic<int64_t> allowed[64] = {}, known[64] = {};
  if (one.total > allowed[device % 64]) {
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(one.total)));
    allowed[device % 64] = one.total;
  }
  const int64_t last = known[device % 64];
  if (last >> 8 == one.total) {
    fit = static_cast<int>(last & 255);
  } else {
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, kernel, kThreads, bytes));
    STD_TORCH_CHECK(fit >= 1, "w2s_fast.sparse_lowrank_decode_cuda: no block fits a multiprocessor");
    known[device % 64] = int64_t(one.total) << 8 | std::min(fit, 255);
  }
  blocks = std::min(multiprocessors * std::min(fit, 2), a.rows);  // more own rows a block never: `one` is the largest

  const int warps = blocks * kWarps;
  while (a.parts < 16 && a.rank * a.parts < warps && a.columns / (2 * a.parts) >= 512) a.parts *= 2;
  const int64_t shape[] = {a.parts, a.n, a.rank};
  const Tensor h = torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape, 3), ScalarType::Float);
  a.h = static_cast<float*>(h.mutable_data_ptr());

  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<const Arguments&>(a)));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T>
void launch_rows(Arguments& a, const Tensor& like, int device, cudaStream_t stream) {
  if (a.n == 1) return launch<T, 1>(a, like, device, stream);
  if (a.n <= 4) return launch<T, 4>(a, like, device, stream);
  launch<T, 8>(a, like, device, stream);
}

const void* matrix(const Tensor& t, const Tensor& x, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.get_device_index() == x.get_device_index(),
                  "w2s_fast.sparse_lowrank_decode_cuda: x, A, B, values and bias must share dtype and device");
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && (columns <= 1 || t.stride(1) == 1),
                  "w2s_fast.sparse_lowrank_decode_cuda: a matrix of another shape or without unit stride");
  return t.const_data_ptr();
}

const void* vector(const Tensor& t, const Tensor& x, int64_t length) {
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.get_device_index() == x.get_device_index() &&
                      t.dim() == 1 && t.size(0) == length && (length <= 1 || t.stride(0) == 1),
                  "w2s_fast.sparse_lowrank_decode_cuda: values and bias must be contiguous, of the dtype of x");
  return t.const_data_ptr();
}

Tensor decode(Tensor x, Tensor A, Tensor B, Tensor values, std::optional<Tensor> scale, double scale_value,
              std::optional<Tensor> bias, Tensor row_ptr, Tensor cols, int64_t rows, int64_t columns, int64_t block,
              int64_t per_block) {
  const int64_t n = x.size(0), rank = A.size(0), nnz = values.size(0);
  STD_TORCH_CHECK(n >= 0 && n <= 8, "w2s_fast.sparse_lowrank_decode_cuda: at most 8 rows, got ", n);
  STD_TORCH_CHECK(rows < (int64_t{1} << 31) && columns <= 65536 && rank < (int64_t{1} << 24),
                  "w2s_fast.sparse_lowrank_decode_cuda: too many rows, columns or ranks");
  STD_TORCH_CHECK(cols.scalar_type() == (block ? ScalarType::Byte : ScalarType::UInt16) && cols.size(0) == nnz,
                  "w2s_fast.sparse_lowrank_decode_cuda: layouts csr16 and balanced are served");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t shape[] = {n, rows};
  Tensor y = torch::stable::new_empty(x, torch::headeronly::IntHeaderOnlyArrayRef(shape, 2), x.scalar_type());
  if (n == 0 || rows == 0) return y;

  Arguments a{};
  a.x = matrix(x, x, n, columns), a.A = matrix(A, x, rank, columns), a.B = matrix(B, x, rows, rank);
  a.values = vector(values, x, nnz), a.cols = cols.const_data_ptr();
  a.bias = bias ? vector(*bias, x, rows) : nullptr;
  a.x_stride = x.stride(0), a.a_stride = A.stride(0), a.b_stride = B.stride(0), a.nnz = nnz;
  a.n = static_cast<int>(n), a.rows = static_cast<int>(rows), a.columns = static_cast<int>(columns);
  a.rank = static_cast<int>(rank), a.parts = 1, a.scale_value = static_cast<float>(scale_value);
  if (scale) {
    a.scale_is_float = scale->scalar_type() == ScalarType::Float;
    STD_TORCH_CHECK(a.scale_is_float || scale->scalar_type() == x.scalar_type(),
                    "w2s_fast.sparse_lowrank_decode_cuda: scale must be float32 or of the dtype of x");
    a.scale = scale->const_data_ptr();
  }
  if (block) {
    const int64_t blocks = (columns + block - 1) / block, rest = columns - (blocks - 1) * block;
    a.block = static_cast<int>(block), a.per_block = static_cast<int>(per_block);
    a.col_blocks = static_cast<int>(blocks), a.last = static_cast<int>((2 * per_block * rest + block) / (2 * block));
  } else {
    STD_TORCH_CHECK(row_ptr.scalar_type() == ScalarType::Int && row_ptr.size(0) == rows + 1,
                    "w2s_fast.sparse_lowrank_decode_cuda: row_ptr must be int32 of rows + 1");
    a.row_ptr = static_cast<const int*>(row_ptr.const_data_ptr());
  }
  for (const void* p : {a.values, a.cols})
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(p) % 16 == 0,
                    "w2s_fast.sparse_lowrank_decode_cuda: values and cols must be aligned to 16 bytes");
  a.y = y.mutable_data_ptr();

  void* stream = nullptr;
  const int device = x.get_device_index();
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const auto on = static_cast<cudaStream_t>(stream);
  switch (x.scalar_type()) {
    case ScalarType::Float: launch_rows<float>(a, x, device, on); break;
    case ScalarType::Half: launch_rows<__half>(a, x, device, on); break;
    case ScalarType::BFloat16: launch_rows<__nv_bfloat16>(a, x, device, on); break;
    default: STD_TORCH_CHECK(false, "w2s_fast.sparse_lowrank_decode_cuda: x must be float32, float16 or bfloat16");
  }
  return y;
}

}  // namespace
}  // namespace w2s::sparse_lowrank

STABLE_TORCH_LIBRARY_IMPL(w2s_fast, CUDA, m) {
  m.impl("sparse_lowrank_decode_cuda", TORCH_BOX(&w2s::sparse_lowrank::decode));
}
