// A thread-block cluster as one team: reductions and scans over all its threads through distributed shared memory.
//
// Results are the same bits in every block: each block merges the blocks' partial results itself, in rank order.
// A slot is written for round r, read by the other blocks after that round's cluster barrier, and written again in
// round r + 2, which no block can reach before all have passed the barrier of r + 1, and so finished reading r.
#pragma once
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace w2s {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kSlot = 128;  // bytes of the largest value that is reduced or broadcast

template <class Value>
__device__ __forceinline__ Value shuffle_down(const Value& value, int distance) {
  static_assert(std::is_trivially_copyable_v<Value> && sizeof(Value) % 4 == 0 && sizeof(Value) <= kSlot);
  uint32_t words[sizeof(Value) / 4];
  memcpy(words, &value, sizeof(Value));
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Value) / 4); ++i)
    words[i] = __shfl_down_sync(0xffffffffu, words[i], distance);
  Value moved;
  memcpy(&moved, words, sizeof(Value));
  return moved;
}

template <class P>
__device__ __forceinline__ P warp_merge(P p) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) p = P::merge(p, shuffle_down(p, distance));
  return p;  // complete in lane 0
}

struct Scratch {
  alignas(16) unsigned char slot[2][kSlot];  // read by the other blocks
  alignas(16) unsigned char warp[kWarps][kSlot];
  alignas(16) unsigned char result[kSlot];
  alignas(16) unsigned char box[kSlot];
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900  // clusters; for older targets the kernel is empty
struct ClusterTeam {
  Scratch& scratch;
  int thread, threads, rank, ranks;
  int round = 0;

  struct Scan {
    uint64_t before, total;
  };

  __device__ __forceinline__ explicit ClusterTeam(Scratch& memory)
      : scratch(memory),
        thread(static_cast<int>(threadIdx.x)),
        threads(kThreads),
        rank(static_cast<int>(cooperative_groups::this_cluster().block_rank())),
        ranks(static_cast<int>(cooperative_groups::this_cluster().num_blocks())) {}

  __device__ __forceinline__ void sync_block() const { __syncthreads(); }
  __device__ __forceinline__ void sync_cluster() const { cooperative_groups::this_cluster().sync(); }

  template <class P>
  __device__ __forceinline__ const P& slot_of(int block) const {
    return *cooperative_groups::this_cluster().map_shared_rank(reinterpret_cast<P*>(scratch.slot[round & 1]), block);
  }

  template <class P>
  __device__ __forceinline__ P all(P mine) {
    const int lane = thread % 32, warp = thread / 32;
    mine = warp_merge(mine);
    if (lane == 0) *reinterpret_cast<P*>(scratch.warp[warp]) = mine;
    __syncthreads();
    if (warp == 0) {
      mine = warp_merge(lane < kWarps ? *reinterpret_cast<const P*>(scratch.warp[lane]) : P::none());
      if (lane == 0) *reinterpret_cast<P*>(scratch.slot[round & 1]) = mine;
    }
    sync_cluster();
    if (warp == 0) {
      mine = warp_merge(lane < ranks ? slot_of<P>(lane) : P::none());
      if (lane == 0) *reinterpret_cast<P*>(scratch.result) = mine;
    }
    ++round;
    __syncthreads();
    return *reinterpret_cast<const P*>(scratch.result);
  }

  template <class F>
  __device__ __forceinline__ auto leader(F f) {
    using R = decltype(f());
    static_assert(std::is_trivially_copyable_v<R> && sizeof(R) <= kSlot);
    if (thread == 0) *reinterpret_cast<R*>(scratch.box) = f();
    __syncthreads();
    const R found = *reinterpret_cast<const R*>(scratch.box);
    __syncthreads();  // the box may be written again
    return found;
  }

  __device__ __forceinline__ Scan before(uint64_t n) {
    const int lane = thread % 32, warp = thread / 32;
    uint64_t inclusive = n;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const uint64_t other = __shfl_up_sync(0xffffffffu, inclusive, distance);
      if (lane >= distance) inclusive += other;
    }
    if (lane == 31) *reinterpret_cast<uint64_t*>(scratch.warp[warp]) = inclusive;
    __syncthreads();
    uint64_t earlier = inclusive - n, block = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const uint64_t sum = *reinterpret_cast<const uint64_t*>(scratch.warp[w]);
      earlier += w < warp ? sum : 0;
      block += sum;
    }
    if (thread == 0) *reinterpret_cast<uint64_t*>(scratch.slot[round & 1]) = block;
    sync_cluster();
    if (warp == 0) {
      const uint64_t sum = lane < ranks ? slot_of<uint64_t>(lane) : 0;
      uint64_t total = sum, lower = lane < rank ? sum : 0;
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) {
        total += __shfl_down_sync(0xffffffffu, total, distance);
        lower += __shfl_down_sync(0xffffffffu, lower, distance);
      }
      if (lane == 0) *reinterpret_cast<Scan*>(scratch.result) = {lower, total};
    }
    ++round;
    __syncthreads();
    const Scan found = *reinterpret_cast<const Scan*>(scratch.result);
    return {found.before + earlier, found.total};
  }
};

#endif

// ---- loads: four neighbours, by one 16- or 8-byte access where the address allows it ------------------------------

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class Four, class T>
__device__ __forceinline__ Four load_four(const T* x, int left) {
  using Packed = std::conditional_t<sizeof(T) == 4, uint4, uint2>;
  Four found;
  if (left >= 4 && reinterpret_cast<uintptr_t>(x) % sizeof(Packed) == 0) {
    const Packed packed = __ldg(reinterpret_cast<const Packed*>(x));
    T values[4];
    memcpy(values, &packed, sizeof(packed));
#pragma unroll
    for (int j = 0; j < 4; ++j) found.v[j] = widen(values[j]);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) found.v[j] = j < left ? widen(x[j]) : -INFINITY;
  }
  return found;
}

}  // namespace w2s
