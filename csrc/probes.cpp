// Ceilings of this machine, measured: copy and read bandwidth, fused multiply-adds from registers.
//
// No Python and no torch here: optimised fully, which module.cpp is not (chains of the multiply-adds stay in registers
// only where their loop is unrolled). A probe returns the best of a few repetitions: a ceiling is what nothing disturbed.
#include "probes.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define W2S_X86 1
#include <immintrin.h>
#else
#define W2S_X86 0
#endif

namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Seconds of the best of `repetitions` runs of work(thread), all threads at once.
template <class Work>
double best_seconds(int threads, int repetitions, const Work& work) {
  double best = 1e30;
  for (int round = 0; round < repetitions; ++round) {
    const double start = now();
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
    work(0);
    for (std::thread& other : others) other.join();
    best = std::min(best, now() - start);
  }
  return best;
}

void check(int threads, int repetitions) {
  if (threads < 1 || threads > 4096) throw std::invalid_argument("threads must be in [1, 4096]");
  if (repetitions < 1) throw std::invalid_argument("repetitions must be at least 1");
}

struct Buffer {
  explicit Buffer(int megabytes) {
    if (megabytes < 1 || megabytes > 65536) throw std::invalid_argument("megabytes must be in [1, 65536]");
    size = static_cast<std::size_t>(megabytes) << 20;
    data.reset(new std::uint64_t[size / 8]);
  }
  // Part of thread t of n, a multiple of 64 bytes.
  std::size_t begin(int t, int n) const { return size / 64 * t / n * 64; }
  char* at(std::size_t offset) const { return reinterpret_cast<char*>(data.get()) + offset; }
  std::size_t size = 0;
  std::unique_ptr<std::uint64_t[]> data;
};

}  // namespace

// memcpy streams past the cache from a few MB on, so what is read and what is written is all that moves.
double w2s::copy_bandwidth(int megabytes, int threads, int repetitions) {
  check(threads, repetitions);
  const Buffer from(megabytes), to(megabytes);
  const auto work = [&](int t) {
    const std::size_t begin = from.begin(t, threads);
    std::memcpy(to.at(begin), from.at(begin), from.begin(t + 1, threads) - begin);
  };
  std::memset(from.at(0), 1, from.size);
  best_seconds(threads, 1, work);  // maps the target's pages
  return 2.0 * static_cast<double>(from.size) / best_seconds(threads, repetitions, work);
}

namespace {

#if W2S_X86 && defined(__GLIBC__)  // a clone is chosen by an ifunc
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
std::uint64_t sum(const std::uint64_t* x, std::size_t count) {
  std::uint64_t part[32] = {};  // several vectors of independent sums, so that adding never waits
  for (std::size_t i = 0; i + 32 <= count; i += 32)
    for (int lane = 0; lane < 32; ++lane) part[lane] += x[i + lane];
  std::uint64_t total = 0;
  for (std::uint64_t p : part) total += p;
  return total;
}

}  // namespace

double w2s::read_bandwidth(int megabytes, int threads, int repetitions) {
  check(threads, repetitions);
  const Buffer from(megabytes);
  std::memset(from.at(0), 1, from.size);
  std::vector<std::uint64_t> sink(threads * 8);  // a cache line a thread
  const double seconds = best_seconds(threads, repetitions + 1, [&](int t) {
    const std::size_t begin = from.begin(t, threads);
    sink[t * 8] += sum(from.data.get() + begin / 8, (from.begin(t + 1, threads) - begin) / 8);
  });
  if (sink[0] == 0) throw std::runtime_error("read_bandwidth: the sum is wrong");
  return static_cast<double>(from.size) / seconds;
}

namespace {

// Twelve independent chains cover latency 4-5 at two FMAs a cycle and fit 16 registers.
constexpr int kChains = 12;

#if W2S_X86
__attribute__((target("avx512f"))) float fma_avx512(std::int64_t steps, float seed) {
  __m512 acc[kChains], a = _mm512_set1_ps(seed), b = _mm512_set1_ps(1e-6f);
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_set1_ps(static_cast<float>(i));
  for (std::int64_t s = 0; s < steps; ++s)
    for (int i = 0; i < kChains; ++i) acc[i] = _mm512_fmadd_ps(acc[i], a, b);
  for (int i = 1; i < kChains; ++i) acc[0] = _mm512_add_ps(acc[0], acc[i]);
  return _mm512_cvtss_f32(acc[0]);
}

__attribute__((target("avx2,fma"))) float fma_avx2(std::int64_t steps, float seed) {
  __m256 acc[kChains], a = _mm256_set1_ps(seed), b = _mm256_set1_ps(1e-6f);
  for (int i = 0; i < kChains; ++i) acc[i] = _mm256_set1_ps(static_cast<float>(i));
  for (std::int64_t s = 0; s < steps; ++s)
    for (int i = 0; i < kChains; ++i) acc[i] = _mm256_fmadd_ps(acc[i], a, b);
  for (int i = 1; i < kChains; ++i) acc[0] = _mm256_add_ps(acc[0], acc[i]);
  return _mm256_cvtss_f32(acc[0]);
}
#endif

float fma_portable(std::int64_t steps, float seed) {
  float acc[kChains * 4];  // four lanes a chain: SSE2 or NEON where the compiler vectorises
  for (int i = 0; i < kChains * 4; ++i) acc[i] = static_cast<float>(i);
  for (std::int64_t s = 0; s < steps; ++s)
    for (float& a : acc) a = a * seed + 1e-6f;
  float total = 0;
  for (float a : acc) total += a;
  return total;
}

struct Fma {
  float (*run)(std::int64_t, float);
  int lanes;
  const char* isa;
};

Fma best_fma() {
#if W2S_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return {fma_avx512, 16, "avx512f"};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {fma_avx2, 8, "avx2"};
#endif
  return {fma_portable, 4, "portable"};
}

}  // namespace

const char* w2s::fma_isa() { return best_fma().isa; }

double w2s::fma_peak(int threads, int repetitions) {
  check(threads, repetitions);
  const Fma fma = best_fma();
  const std::int64_t steps = 1000000;  // a few milliseconds
  std::vector<float> sink(threads * 16);
  const double seconds =
      best_seconds(threads, repetitions, [&](int t) { sink[t * 16] += fma.run(steps, 0.999999f); });
  if (!(sink[0] > 0)) throw std::runtime_error("fma_peak: the sum is wrong");
  return 2.0 * static_cast<double>(steps) * kChains * fma.lanes * threads / seconds;
}
