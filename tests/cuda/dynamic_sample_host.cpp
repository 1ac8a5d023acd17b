// Runs the row program of csrc/cuda/logit_fusion on host threads that stand for the blocks and threads of a cluster:
// the same decisions, barriers, merges and scans as on the device, with std::barrier in place of its barriers.
// A C interface for ctypes: tests/test_cuda_build.py compares it with the float64 reference.
#include <barrier>
#include <memory>
#include <thread>
#include <vector>

#include "cuda/logit_fusion/row.h"

namespace {

using namespace w2s::fusion;

constexpr int kSlot = 128;

struct World {  // what all blocks share
  World(int blocks, int threads)
      : ranks(blocks), per_block(threads), all(blocks * threads), slot(blocks * threads), total(blocks * threads) {
    for (int b = 0; b < blocks; ++b) block.push_back(std::make_unique<std::barrier<>>(threads));
    box.resize(blocks);
  }
  struct alignas(16) Bytes {
    unsigned char data[kSlot];
  };
  int ranks, per_block;
  std::barrier<> all;
  std::vector<std::unique_ptr<std::barrier<>>> block;
  std::vector<Bytes> slot, box;
  std::vector<uint64_t> total;
};

struct HostTeam {
  World& world;
  int thread, threads, rank, ranks;

  struct Scan {
    uint64_t before, total;
  };
  void sync_block() { world.block[rank]->arrive_and_wait(); }
  int me() const { return rank * threads + thread; }

  template <class P>
  P all(P mine) {
    static_assert(sizeof(P) <= kSlot && std::is_trivially_copyable_v<P>);
    memcpy(world.slot[me()].data, &mine, sizeof(P));
    world.all.arrive_and_wait();
    P found = P::none();
    for (const World::Bytes& bytes : world.slot) {
      P other;
      memcpy(&other, bytes.data, sizeof(P));
      found = P::merge(found, other);
    }
    world.all.arrive_and_wait();
    return found;
  }
  template <class F>
  auto leader(F f) {
    using R = decltype(f());
    static_assert(sizeof(R) <= kSlot && std::is_trivially_copyable_v<R>);
    if (thread == 0) {
      const R mine = f();
      memcpy(world.box[rank].data, &mine, sizeof(R));
    }
    sync_block();
    R found;
    memcpy(&found, world.box[rank].data, sizeof(R));
    sync_block();
    return found;
  }
  Scan before(uint64_t n) {
    world.total[me()] = n;
    world.all.arrive_and_wait();
    Scan scan = {0, 0};
    for (int i = 0; i < static_cast<int>(world.total.size()); ++i) {
      if (i < me()) scan.before += world.total[i];
      scan.total += world.total[i];
    }
    world.all.arrive_and_wait();
    return scan;
  }
  template <class T>
  static Four four(const T* x, int left) {
    Four found;
    for (int j = 0; j < 4; ++j) found.v[j] = j < left ? x[j] : -HUGE_VALF;
    return found;
  }
  template <class F>
  static void of_type(Type, F f) {
    f(float{});
  }
};

}  // namespace

// Rows of float32 logits; expert and anti are arrays of K pointers. Shapes of the results as in the op.
extern "C" void dynamic_sample_host(
    int rows, int experts, int width, const float* base, const float** expert, const float** anti, long stride,
    int blocks, int threads, double alpha_max, int nodes, int first_candidate, double tol, int decoupled,
    int direction_kind, const double* direction, int average, const double* target_kl, double temperature,
    int plausible, double plausible_value, const double* uniform, int top_k, double top_p, double min_p,
    int64_t* token, float* logprob, float* lse, int* kept, float* alpha, float* target, float* achieved,
    bool* saturated) {
  Arguments a{};
  a.base = {base, stride};
  for (int k = 0; k < experts; ++k) a.expert[k] = {expert[k], stride}, a.anti[k] = {anti[k], stride};
  a.experts = experts, a.width = width, a.slice = ((width + blocks - 1) / blocks + 3) / 4 * 4;
  a.alpha_max = alpha_max, a.tol = tol, a.nodes = nodes, a.first_candidate = first_candidate;
  a.direction_kind = direction_kind, a.decoupled = decoupled, a.average = average;
  a.direction = {direction, experts, 1, true}, a.target_kl = {target_kl, experts, 1, true};
  a.temperature = {nullptr, 0, 0, false}, a.temperature_value = temperature, a.uniform = {uniform, 1, 0, true};
  a.plausible = plausible, a.plausible_value = plausible_value, a.top_k = top_k, a.top_p = top_p, a.min_p = min_p;
  a.token = token, a.logprob = logprob, a.lse = lse, a.kept = kept;
  a.alpha = alpha, a.target = target, a.achieved = achieved, a.saturated = saturated;
  for (int64_t row = 0; row < rows; ++row) {
    World world(blocks, threads);
    std::vector<std::vector<float>> columns(blocks, std::vector<float>(static_cast<size_t>(1 + experts) * a.slice));
    std::vector<Shared> shared(blocks);
    std::vector<std::thread> team;
    for (int i = 0; i < blocks * threads; ++i)
      team.emplace_back([&, i] {
        HostTeam me{world, i % threads, threads, i / threads, blocks};
        float* memory = columns[me.rank].data();
        Row<HostTeam> program{me, a, shared[me.rank], memory, memory + a.slice, row, me.rank * a.slice};
        program.run();
      });
    for (std::thread& t : team) t.join();
  }
}
