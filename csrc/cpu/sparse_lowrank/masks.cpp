// topk_mask: the k-th largest of a row by bisection while the row stays in L2. Of a longer one, a sample brackets it, one pass
// writes the mask of what is above the bracket and lists what is inside, bisection among those gives the threshold, and the
// listed places are mended. Where the bracket fails (few values, sorted scores) digits are counted, 11 bits a pass.
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/gemm.h"
#include "cpu/sparse_lowrank/masks.h"
#include "cpu/tensors.h"

namespace w2s::sparse {
namespace {

constexpr int64_t SHORT = 1 << 15;  // columns of a row that is read again and again: its magnitudes stay in L2
constexpr int64_t MOST = 1 << 15;   // of a sample
constexpr int64_t PART = 1 << 12;   // of a sample that a thread takes
constexpr int64_t CHUNK = 1 << 16;  // columns of an item of work
constexpr int64_t BEHIND = 16;      // entries behind a list of magnitudes
constexpr int DIGIT = 11;           // bits that a pass over a row decides where all else fails
constexpr double DEVIATIONS = 4;    // of a sample's rank, on each side of the guess

// The power of two below D^(2/3): more of a sample narrows the bracket by less than it costs.
int64_t sample_size(int64_t D) {
  int64_t size = 1;
  while (size < MOST && double(2 * size) <= std::cbrt(double(D) * double(D))) size *= 2;
  return size;
}

template <class F>
void each_chunk(int64_t chunks, const F& work) {
  if (chunks == 1) return work(0);
  parallel_items(chunks, 1, work);
}

template <class A>
struct Counted : Threshold<A> {
  std::vector<int64_t> equal;  // how many there are of the value, a chunk
};

// The k-th largest of the first D magnitudes of a row, 1 <= k <= D, by its digits from the top.
template <class A>
Counted<A> select(const Rows& x, int64_t row, int64_t D, int64_t k) {
  using Key = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;
  const int64_t chunks = pieces(D, CHUNK);
  constexpr int bits = DIGIT;
  std::vector<uint32_t> counts(size_t(chunks) << bits);
  Digit digit{0, int(8 * sizeof(A)) - 1, 0};
  int64_t chosen = 0;
  while (digit.shift > 0) {
    digit.width = std::min(bits, digit.shift);
    digit.shift -= digit.width;
    std::memset(counts.data(), 0, counts.size() * sizeof(uint32_t));
    each_chunk(chunks, [&](int64_t c) {
      kernels<MaskKernels, A>().histogram({&x, row, c * CHUNK, std::min(CHUNK, D - c * CHUNK)}, digit, counts.data() + (c << bits));
    });
    for (chosen = (int64_t(1) << digit.width) - 1;; --chosen) {
      int64_t all = 0;
      for (int64_t c = 0; c < chunks; ++c) all += counts[size_t((c << bits) + chosen)];
      if (k <= all) break;
      k -= all;
    }
    digit.prefix = digit.prefix << digit.width | uint64_t(chosen);
  }
  const Key key = Key(digit.prefix);
  Counted<A> found{{0, k}, std::vector<int64_t>(size_t(chunks))};
  std::memcpy(&found.value, &key, sizeof(A));
  for (int64_t c = 0; c < chunks; ++c) found.equal[size_t(c)] = counts[size_t((c << bits) + chosen)];
  return found;
}

template <class A>
int64_t by_digits(const Rows& x, int64_t row, int64_t D, int64_t k, uint8_t* mask) {
  const Counted<A> found = select<A>(x, row, D, k);
  const int64_t chunks = pieces(D, CHUNK);
  std::vector<int64_t> nans(static_cast<size_t>(chunks)), ties(static_cast<size_t>(chunks));
  int64_t left = found.ties;
  for (size_t c = 0; c < size_t(chunks); ++c) {
    ties[c] = std::min(left, found.equal[c]);
    left -= ties[c];
  }
  each_chunk(chunks, [&](int64_t c) {
    nans[size_t(c)] = kernels<MaskKernels, A>().threshold({&x, row, c * CHUNK, std::min(CHUNK, D - c * CHUNK)}, found.value,
                                                          ties[size_t(c)], mask + c * CHUNK);
  });
  int64_t sum = 0;
  for (const int64_t n : nans) sum += n;
  return sum;
}

// Bits at the end that are 0 in every number of a dtype once it is widened to A.
template <class A>
int empty_bits(Dtype dtype) {
  const int of = dtype == Dtype::bf16 ? 8 : dtype == Dtype::f16 ? 11 : dtype == Dtype::f32 ? 24 : 53;  // digits of the fraction
  return (sizeof(A) == 8 ? 53 : 24) - of;
}

template <class A>
int64_t by_halves(const Rows& x, int64_t row, int64_t D, int64_t k, uint8_t* mask) {
  const auto& kernel = kernels<MaskKernels, A>();
  const Span all{&x, row, 0, D};
  A* sizes = scratch_of<A>(2, D + BEHIND);
  const int64_t nans = kernel.load(all, sizes);
  const Threshold<A> found = kernel.largest(sizes, D, k, empty_bits<A>(x.dtype));
  kernel.threshold(all, found.value, found.ties, mask);
  return nans;
}

template <class A>
struct Near {
  std::vector<A> sizes;
  std::vector<int32_t> places;
  Found found;
};

// The number of NaN; -1 where the bracket failed.
template <class A>
int64_t by_bracket(const Rows& x, int64_t row, int64_t D, int64_t k, uint8_t* mask) {
  const auto& kernel = kernels<MaskKernels, A>();
  const int64_t S = sample_size(D), step = D / S, part = std::min(S, PART);
  std::vector<A> sample(size_t(S + BEHIND), A(-1));
  each_chunk(S / part, [&](int64_t c) { kernel.sample(x, row, c * part * step, step, part, sample.data() + c * part); });
  const double share = double(k) / double(D), rank = share * double(S);
  const double spread = DEVIATIONS * std::sqrt(rank * (1 - share)) + 1;
  const int64_t first = int64_t(std::floor(rank - spread)), last = int64_t(std::ceil(rank + spread));
  const int empty = empty_bits<A>(x.dtype);
  const auto ranked = [&](std::vector<A> of, int64_t rank) { return kernel.largest(of.data(), S, rank, empty).value; };
  const A high = first >= 1 ? ranked(sample, first) : std::numeric_limits<A>::infinity();
  const A low = last <= S ? ranked(std::move(sample), last) : A(0);

  const int64_t chunks = pieces(D, CHUNK);
  std::vector<Near<A>> near(static_cast<size_t>(chunks));
  each_chunk(chunks, [&](int64_t c) {
    A* sizes = scratch_of<A>(2, CHUNK + 16);
    int32_t* places = scratch_of<int32_t>(3, CHUNK + 16);
    Near<A>& mine = near[size_t(c)];
    mine.found = kernel.bracket({&x, row, c * CHUNK, std::min(CHUNK, D - c * CHUNK)}, low, high, mask + c * CHUNK, sizes, places);
    if (mine.found.near > CHUNK / 4) return;  // not kept: too many for a bracket
    mine.sizes.assign(sizes, sizes + mine.found.near);
    mine.places.assign(places, places + mine.found.near);
  });
  std::vector<A> inside;
  int64_t wanted = k, nans = 0;
  for (const Near<A>& of : near) {
    if (of.found.near > CHUNK / 4) return -1;
    wanted -= of.found.above;
    nans += of.found.nans;
    inside.insert(inside.end(), of.sizes.begin(), of.sizes.end());
  }
  if (wanted < 1 || wanted > int64_t(inside.size())) return -1;
  const int64_t count = int64_t(inside.size());
  inside.insert(inside.end(), BEHIND, A(-1));
  Threshold<A> threshold = kernel.largest(inside.data(), count, wanted, empty);
  for (int64_t c = 0; c < chunks; ++c) {
    const Near<A>& of = near[size_t(c)];
    uint8_t* out = mask + c * CHUNK;
    for (size_t i = 0; i < of.sizes.size(); ++i) {
      const bool tie = of.sizes[i] == threshold.value && threshold.ties > 0;
      out[of.places[i]] = tie || of.sizes[i] > threshold.value;
      threshold.ties -= tie;
    }
  }
  return nans;
}

template <class A>
int64_t topk_row(const Rows& x, int64_t row, int64_t D, int64_t k, uint8_t* mask) {
  if (k == 0) {  // all is above nothing
    const int64_t nans = topk_row<A>(x, row, D, 1, mask);
    std::memset(mask, 0, size_t(D));
    return nans;
  }
  if (D <= SHORT) return by_halves<A>(x, row, D, k, mask);
  if (k < D) {
    const int64_t nans = by_bracket<A>(x, row, D, k, mask);
    if (nans >= 0) return nans;
  }
  return by_digits<A>(x, row, D, k, mask);
}

std::tuple<Tensor, Tensor> counted(Tensor mask, const std::vector<int64_t>& nans) {
  Tensor sum = fresh(mask, {}, ScalarType::Long);
  int64_t& total = *static_cast<int64_t*>(sum.data_ptr());
  total = 0;
  for (const int64_t n : nans) total += n;
  return {mask, sum};
}

std::tuple<Tensor, Tensor> topk_mask(Tensor scores, int64_t k) {
  const int64_t R = scores.size(0), D = scores.size(1);
  check(k >= 0 && k <= D, "k is out of range");
  Tensor mask = fresh(scores, {R, D}, ScalarType::Bool);
  uint8_t* out = static_cast<uint8_t*>(mask.data_ptr());
  std::vector<int64_t> nans(static_cast<size_t>(R));
  const Rows x(scores);
  with_type(is_double(scores), [&](auto type) {
    const auto row = [&](int64_t r) { nans[size_t(r)] = topk_row<decltype(type)>(x, r, D, k, out + r * D); };
    if (D == 0) return;
    if (D <= CHUNK) parallel_items(R, grain_of(4 * D), row);
    else
      for (int64_t r = 0; r < R; ++r) row(r);  // whose chunks are shared out
  });
  return counted(mask, nans);
}

std::tuple<Tensor, Tensor> nm_mask(Tensor scores, int64_t n, int64_t m) {
  const int64_t size = scores.numel();
  check(m >= 1 && m <= 32 && n >= 1 && n <= m && scores.size(1) % m == 0, "n or m is out of range");
  Tensor mask = fresh(scores, shape_of(scores), ScalarType::Bool);
  uint8_t* out = static_cast<uint8_t*>(mask.data_ptr());
  Rows x(scores);
  const int64_t step = SEGMENT / m * m, items = pieces(size, step);
  std::vector<int64_t> nans(static_cast<size_t>(items));
  with_kernels<MaskKernels>(is_double(scores), [&](const auto& kernel) {
    parallel_items(items, grain_of(step / 2), [&](int64_t i) {
      nans[size_t(i)] = kernel.groups({&x, 0, i * step, std::min(step, size - i * step)}, int(n), int(m), out + i * step);
    });
  });
  return counted(mask, nans);
}

}  // namespace
}  // namespace w2s::sparse

W2S_IMPLEMENTATIONS(m) {
  m.add<&w2s::sparse::topk_mask>("topk_mask");
  m.add<&w2s::sparse::nm_mask>("nm_mask");
}
