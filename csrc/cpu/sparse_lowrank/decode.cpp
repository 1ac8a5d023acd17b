// Few tokens (N <= 8): y = s (x A^T) B^T + x S^T + bias in one parallel region, each weight and index read once.
//
// Threads take pieces of h = x A^T, wait until all pieces are done, then take rows of y. Whoever waits has only pieces
// to wait for that a running thread has taken, so that the region also ends where threads run one after the other.
// Floor: r (I + O) weights, K values and their index, read once.
#include "cpu/sparse_lowrank/decode.h"

#include <atomic>
#include <thread>

namespace w2s::sparse {
namespace {

enum Slot { X = 2, H = 3, Y = 4, PART = 5 };

void pause() {
#if W2S_X86
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

}  // namespace

template <class A>
const A* decode(const Pattern& s, const Operand& x, const Operand& a, const Operand& b, double scale, const Tensor& values,
                const std::vector<A>& bias, A* h) {
  const int given = int(x.rows), tokens = given <= 2 ? given : given <= 4 ? 4 : 8;
  const int64_t I = s.columns, O = s.rows, r = a.rows;
  A* xs = scratch_of<A>(X, tokens * I + 64);
  for (int t = 0; t < given; ++t)
    kernels<DecodeKernels, A>().pack(x.part(t, 1).data, x.dtype, I, 1, 1, I, I, xs + t * I);
  std::fill(xs + given * I, xs + tokens * I + 64, A(0));
  A* hidden = h && given == tokens ? h : scratch_of<A>(H, tokens * r + 64);
  A* y = scratch_of<A>(Y, tokens * O + 64);
  const int64_t threads = w2s::threads();
  const bool small = (r * (I + O) + 2 * s.nnz) * tokens < (1 << 18);  // less work than a region costs
  const int64_t workers = small ? 1 : threads;
  const int64_t first = workers == 1 ? 1 : std::max<int64_t>(1, std::min(4 * workers, r / 8));
  const int64_t second = workers == 1 ? 1 : std::max<int64_t>(1, std::min(8 * workers, O / 32));
  const void* v = values.data_ptr();
  const Dtype dtype = dtype_of(values);
  std::atomic<int64_t> taken{0}, done{0}, rows{0};
  const auto work = [&](int64_t, int64_t) {
    for (int64_t i; (i = taken.fetch_add(1)) < first; done.fetch_add(1, std::memory_order_release))
      kernels<DecodeKernels, A>().hidden(a, i * r / first, (i + 1) * r / first, tokens, xs, hidden);
    while (done.load(std::memory_order_acquire) < first) pause();
    for (int64_t i; (i = rows.fetch_add(1)) < second;) {
      const int64_t begin = i * O / second, end = (i + 1) * O / second;
      A* part = scratch_of<A>(PART, (end - begin) * std::max<int64_t>(s.per_block, 1) + 64);
      kernels<DecodeKernels, A>().output(s, b, A(scale), v, dtype, begin, end, tokens, xs, hidden, part, y);
      if (!bias.empty())
        for (int t = 0; t < given; ++t)
          for (int64_t o = begin; o < end; ++o) y[t * O + o] += bias[size_t(o)];
    }
  };
  if (workers == 1) work(0, 1);
  else parallel_ranges(workers, 1, work);
  if (h && h != hidden) std::copy(hidden, hidden + given * r, h);
  return y;
}

template const float* decode<float>(const Pattern&, const Operand&, const Operand&, const Operand&, double, const Tensor&,
                                    const std::vector<float>&, float*);
template const double* decode<double>(const Pattern&, const Operand&, const Operand&, const Operand&, double, const Tensor&,
                                      const std::vector<double>&, double*);

}  // namespace w2s::sparse
