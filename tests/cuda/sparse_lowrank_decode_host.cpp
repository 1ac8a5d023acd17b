// Runs the program of csrc/cuda/sparse_lowrank/decode.h on host threads that stand for the blocks and warps of a grid,
// with std::barrier in place of its barriers. A C interface for ctypes: tests/test_cuda_sparse_lowrank.py.
#include <barrier>
#include <memory>
#include <thread>
#include <vector>

#include "cuda/sparse_lowrank/decode.h"

namespace {

using namespace w2s::sparse_lowrank;

struct Short {  // bfloat16
  uint16_t bits;
};
struct alignas(16) Packed {
  unsigned char bytes[16];
};

struct World {
  World(int blocks, int threads) : all(blocks * threads), lane(blocks * threads) {
    for (int b = 0; b < blocks; ++b) block.push_back(std::make_unique<std::barrier<>>(threads));
  }
  std::barrier<> all;
  std::vector<std::unique_ptr<std::barrier<>>> block, warp;
  std::vector<float> lane;  // what the lanes of a warp sum
};

struct HostTeam {
  World& world;
  int thread, threads, lane, lanes, warp, warps, block, blocks;

  void sync() { world.block[block]->arrive_and_wait(); }
  void arrive() { token = std::make_unique<std::barrier<>::arrival_token>(world.all.arrive()); }
  void wait() { world.all.wait(std::move(*token)); }
  float sum(float v) {
    std::barrier<>& mine = *world.warp[block * warps + warp];
    float* slot = world.lane.data() + (block * warps + warp) * lanes;
    slot[lane] = v;
    mine.arrive_and_wait();
    float total = 0;
    for (int i = 0; i < lanes; ++i) total += slot[i];
    mine.arrive_and_wait();
    return total;
  }
  static Packed weights16(const void* p) {
    Packed found;
    memcpy(&found, __builtin_assume_aligned(p, 16), 16);
    return found;
  }
  static float fresh(const float* p) { return *p; }
  static float widen(float x) { return x; }
  static float widen(Short x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
  }
  template <class T>
  static T narrow(float x) {
    if constexpr (sizeof(T) == 4) return x;
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return T{0x7fff};
    return T{static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  }
  std::unique_ptr<std::barrier<>::arrival_token> token{};
};

template <>
float HostTeam::narrow<float>(float x) {
  return x;
}

template <class T, int NP>
void run(const Arguments& a, int blocks, int warps, int lanes) {
  const int threads = warps * lanes;
  World world(blocks, threads);
  for (int i = 0; i < blocks * warps; ++i) world.warp.push_back(std::make_unique<std::barrier<>>(lanes));
  const Layout<T, NP> at(a.columns, a.rank, (a.rows + blocks - 1) / blocks, threads, a.row_ptr == nullptr);
  const size_t units = static_cast<size_t>(at.total / 16 + 1);
  std::vector<std::vector<Packed>> memory(blocks, std::vector<Packed>(units, Packed{}));
  for (auto& m : memory) memset(m.data(), 0xff, units * 16);  // NaN: what is read must have been written
  std::vector<std::thread> team;
  for (int i = 0; i < blocks * threads; ++i)
    team.emplace_back([&, i] {
      const int thread = i % threads;
      HostTeam me{world, thread, threads, thread % lanes, lanes, thread / lanes, warps, i / threads, blocks};
      Decode<HostTeam, T, NP>(me, a, memory[me.block].data()->bytes, at).run();
    });
  for (std::thread& t : team) t.join();
}

}  // namespace

// float32 (short_weights 0) or bfloat16 tensors; row_ptr null for a balanced support.
extern "C" void sparse_lowrank_decode_host(int short_weights, int n, int rows, int columns, int rank, const void* x,
                                           long x_stride, const void* A, long a_stride, const void* B, long b_stride,
                                           const void* values, long nnz, const void* bias, const float* scale,
                                           float scale_value, const int* row_ptr, const void* cols, int block,
                                           int per_block, int parts, int blocks, int warps, int lanes, float* h,
                                           void* y) {
  Arguments a{};
  a.x = x, a.A = A, a.B = B, a.values = values, a.cols = cols, a.bias = bias, a.scale = scale, a.scale_is_float = true;
  a.row_ptr = row_ptr, a.h = h, a.y = y, a.x_stride = x_stride, a.a_stride = a_stride, a.b_stride = b_stride;
  a.nnz = nnz, a.n = n, a.rows = rows, a.columns = columns, a.rank = rank, a.parts = parts, a.scale_value = scale_value;
  if (block) {
    a.block = block, a.per_block = per_block, a.col_blocks = (columns + block - 1) / block;
    a.last = (2 * per_block * (columns - (a.col_blocks - 1) * block) + block) / (2 * block);
  }
  if (short_weights) return n == 1 ? run<Short, 1>(a, blocks, warps, lanes)
                     : n <= 4      ? run<Short, 4>(a, blocks, warps, lanes)
                                   : run<Short, 8>(a, blocks, warps, lanes);
  return n == 1   ? run<float, 1>(a, blocks, warps, lanes)
         : n <= 4 ? run<float, 4>(a, blocks, warps, lanes)
                  : run<float, 8>(a, blocks, warps, lanes);
}
