// Blocking of the dense product (see gemm.h): depth in pieces whose packed rows of a stay in L2 and panels of b in L1.
//
// Four ways: both operands packed (many rows); few rows times a row-major b, read in place; few rows times a b whose
// depth is contiguous (x W^T), where W's rows are broadcast in place and the few rows are the vector; fewest rows or
// columns whose depth is contiguous on both sides, as sums along it.
//
// What is read in place may be bfloat16 or float16, widened as it is loaded: two operations a vector, beside two
// multiply-adds a row of it. One row of bfloat16 then waits for memory alone. Intel Ice Lake (family 6 model 106), one
// thread, 1024 x 1024, GFLOP/s of 1, 2, 4 and 8 rows: 25, 45, 75, 82 where the depth is contiguous and 23, 38, 59, 73
// where it is not, packed before 3 to 5, 7 to 10, 14 to 19 and 21 to 37 (torch.mm of
// bfloat16 16 to 20, 13 to 17, 20 and 25).
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <new>

#include "cpu/gemm.h"
#include "cpu/gemm_tile.h"
#include "cpu/parallel.h"

#define W2S_KERNEL "cpu/gemm_kernel.h"
#include "cpu/for_each_target.h"

namespace w2s {

void* scratch(int slot, int64_t bytes) {
  struct Buffer {
    void* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffers[SCRATCH_SLOTS];
  Buffer& b = buffers[slot];
#if defined(__SANITIZE_ADDRESS__)
  b.size = 0;  // memory of just the size asked for, so that what is read or written past it is seen
#endif
  if (bytes > b.size) {
    std::free(b.data);
#if defined(__SANITIZE_ADDRESS__)
    b.size = (bytes + 63) / 64 * 64;
#else
    b.size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
#endif
    b.data = std::aligned_alloc(64, size_t(b.size));
    if (!b.data) {
      b.size = 0;
      throw std::bad_alloc();
    }
  }
  return b.data;
}

namespace {

constexpr int64_t DEPTH = 384, ROWS = 168, COLUMNS = 2048;
constexpr int64_t SHALLOW = 128, NEAR = 1 << 18;  // a depth at which writing c is what takes time: along its rows then, beside bytes of
                                                  // packed b that stay in L2
constexpr int64_t DOTS = 8;  // rows of the shorter side
constexpr int64_t CACHED = 8 << 20;  // bytes of b that caches bring in time without being asked (Ice Lake: 1.5 times faster so)
constexpr int64_t READ_ONCE = 4, LINE = 64;  // rows whose product waits for memory; bytes that come at a time

template <class A>
struct Product {
  Operand a, b;
  Target<A> c;
  A alpha;
  bool add;
  int64_t M, N, K;
  Tile shape;

  static const void* at(const Operand& x, int64_t i, int64_t j) {
    return static_cast<const char*>(x.data) + (i * x.down + j * x.across) * bytes_of(x.dtype);
  }
  Target<A> out(int64_t i, int64_t j) const { return {c.data + i * c.down + j * c.across, c.down, c.across}; }

  // dst[tile][k][height]: rows of a from `first`, `tiles` tiles
  void pack_rows(int64_t first, int64_t tiles, int height, int64_t k0, int64_t depth, A* dst) const {
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = first + t * height;
      W2S_DISPATCH_AS(A, pack<A>)(at(a, row, k0), a.dtype, a.across, a.down, depth, std::min<int64_t>(height, M - row), height,
                            dst + t * depth * height);
    }
  }
  void pack_columns(int64_t first, int64_t k0, int64_t depth, int64_t width, A* dst) const {
    W2S_DISPATCH_AS(A, pack<A>)(at(b, k0, first), b.dtype, b.down, b.across, depth, std::min<int64_t>(width, N - first), width, dst);
  }

  int height_for(int64_t rows) const {  // equal tiles of an even height
    const int64_t tiles = pieces(rows, shape.rows), height = pieces(rows, tiles);
    return int(height == 1 ? 1 : (height + 1) / 2 * 2);
  }

  void many() const {
    const int height = height_for(M), width = shape.columns;
    const int64_t tiles = pieces(M, height), workers = threads();
    const int64_t cuts = pieces(K, DEPTH), depth0 = pieces(K, cuts);
    const int64_t per_block = std::max<int64_t>(1, ROWS / height);
    const int64_t blocks = std::min(tiles, pieces(pieces(tiles, per_block), workers) * workers);
    const bool along = K <= SHALLOW;
    const int64_t wide = along ? std::clamp(NEAR / int64_t(sizeof(A)) / K / width * width, int64_t(width), COLUMNS) : COLUMNS;
    A* right = scratch_of<A>(0, depth0 * std::min(pieces(N, width) * width, wide) + 64);
    for (int64_t j0 = 0; j0 < N; j0 += wide) {
      const int64_t columns = std::min(wide, N - j0), panels = pieces(columns, width);
      // with few row blocks the columns are shared out as well
      const int64_t groups = blocks >= workers ? 1 : std::min(panels, pieces(workers, blocks));
      for (int64_t k0 = 0; k0 < K; k0 += depth0) {
        const int64_t depth = std::min(depth0, K - k0);
        const bool adds = add || k0 > 0;
        parallel_items(panels, 1, [&](int64_t p) { pack_columns(j0 + p * width, k0, depth, width, right + p * width * depth); });
        parallel_items(blocks * groups, 1, [&](int64_t item) {
          const int64_t block = item / groups, group = item % groups;
          const int64_t t0 = block * tiles / blocks, t1 = (block + 1) * tiles / blocks;
          const int64_t p0 = group * panels / groups, p1 = (group + 1) * panels / groups;
          A* left = scratch_of<A>(1, (t1 - t0) * height * depth + 64);
          pack_rows(t0 * height, t1 - t0, height, k0, depth, left);
          const auto one = [&](int64_t t, int64_t p) {
            W2S_DISPATCH_AS(A, run_tile<A, A>)(height, depth, left + (t - t0) * height * depth, height, 1, right + p * width * depth, width,
                                            std::min<int64_t>(height, M - t * height), std::min<int64_t>(width, columns - p * width),
                                            out(t * height, j0 + p * width), alpha, adds);
          };
          for (int64_t t = t0; along && t < t1; ++t)
            for (int64_t p = p0; p < p1; ++p) one(t, p);
          for (int64_t p = p0; !along && p < p1; ++p)
            for (int64_t t = t0; t < t1; ++t) one(t, p);
        });
      }
    }
  }

  // Few rows; b's columns are contiguous: b is read in place, some rows of it at a time, and widened in registers.
  template <class B>
  void few_times_rows() const {
    constexpr bool narrow = sizeof(B) < sizeof(A);
    const int height = height_for(M), width = narrow ? W2S_DISPATCH_AS(A, widening_columns<A>)(height) : shape.columns;
    const int64_t tiles = pieces(M, height), panels = pieces(N, width);
    const bool near = narrow && K * N * int64_t(sizeof(B)) <= CACHED;
    const int64_t depth0 = near ? 64 : 32, next = narrow ? 2 : 4;
    const int64_t apart = height * K + 64;  // packing writes a little past a tile
    A* left = scratch_of<A>(0, tiles * apart);
    parallel_items(tiles, 1, [&](int64_t t) { pack_rows(t * height, 1, height, 0, K, left + t * apart); });
    const int64_t items = std::min(panels, 4 * threads());
    parallel_items(items, 1, [&](int64_t item) {
      const int64_t p0 = item * panels / items, p1 = (item + 1) * panels / items;
      A* tail = scratch_of<A>(1, depth0 * width + 64);
      for (int64_t k0 = 0; k0 < K; k0 += depth0) {
        const int64_t depth = std::min(depth0, K - k0);
        for (int64_t p = p0; p < p1; ++p) {
          const int64_t columns = std::min<int64_t>(width, N - p * width);
          const B* right = static_cast<const B*>(at(b, k0, p * width));
          const bool whole = columns == width;
          if (!whole) {
            pack_columns(p * width, k0, depth, width, tail);
          } else if (M <= READ_ONCE && !near) {  // no prefetcher follows so many rows, and little work hides the wait
            for (int64_t k = 0; k < depth; ++k)
              for (int64_t ahead = next * width; ahead < (next + 1) * width; ahead += LINE / int64_t(sizeof(B)))
                __builtin_prefetch(right + k * b.down + ahead);
          }
          for (int64_t t = 0; t < tiles; ++t) {
            const A* rows = left + t * apart + k0 * height;
            const int64_t there = std::min<int64_t>(height, M - t * height);
            const Target<A> to = out(t * height, p * width);
            const bool adds = add || k0 > 0;
            if (whole) W2S_DISPATCH_AS(A, run_tile<A, B>)(height, depth, rows, height, 1, right, b.down, there, columns, to, alpha, adds);
            else packed_tile(height, depth, rows, tail, width, there, columns, to, adds);
          }
        }
      }
    });
  }

  // a tile of packed columns, which may be wider than a packed tile is
  void packed_tile(int height, int64_t depth, const A* rows, const A* packed, int64_t width, int64_t there, int64_t columns, Target<A> to,
                   bool adds) const {
    for (int64_t j = 0; j < columns; j += shape.columns)
      W2S_DISPATCH_AS(A, run_tile<A, A>)(height, depth, rows, height, 1, packed + j, width, there, std::min<int64_t>(shape.columns, columns - j),
                                         Target<A>{to.data + j * to.across, to.down, to.across}, alpha, adds);
  }

  // Few rows (the vector now); b's depth is contiguous and of our type: its columns are broadcast in place.
  void few_times_columns() const {
    const int64_t width = M <= shape.columns / 2 ? shape.columns / 2 : shape.columns, panels = pieces(M, width);
    const int height = shape.rows > 8 ? 8 : shape.rows;
    A* right = scratch_of<A>(0, panels * width * K + 64);
    parallel_items(panels, 1, [&](int64_t p) {
      W2S_DISPATCH_AS(A, pack<A>)(at(a, p * width, 0), a.dtype, a.across, a.down, K, std::min(width, M - p * width), width,
                            right + p * width * K);
    });
    parallel_items(pieces(N, height), 1, [&](int64_t t) {
      const int64_t n0 = t * height, rows = std::min<int64_t>(height, N - n0);
      const A* left = static_cast<const A*>(at(b, 0, n0));
      A* copy = nullptr;
      if (rows < height) {  // a tile reads all its rows
        copy = scratch_of<A>(1, K * height + 64);
        pack_columns(n0, 0, K, height, copy);
      }
      const int64_t step = copy ? height : 1, apart = copy ? 1 : b.across;
      for (int64_t p = 0; p < panels; ++p)
        for (int64_t k0 = 0; k0 < K; k0 += DEPTH)  // in pieces, so that no sum is one long chain of roundings
          W2S_DISPATCH_AS(A, run_tile<A, A>)(height, std::min(DEPTH, K - k0), (copy ? copy : left) + k0 * step, step, apart,
                                    right + (p * K + k0) * width, width, rows, std::min(width, M - p * width),
                                    Target<A>{c.data + n0 * c.across + p * width * c.down, c.across, c.down}, alpha, add || k0 > 0);
    });
  }

  // c (+)= alpha x y^T for few rows of y, which are widened beforehand; x is where it lies
  void few_dots(const Operand& x, const Operand& y, Target<A> to) const {
    const A* few = static_cast<const A*>(y.data);
    int64_t down = y.down;
    if (y.dtype != own_dtype<A> || y.across != 1) {
      A* copy = scratch_of<A>(0, y.rows * K + 64);
      for (int64_t j = 0; j < y.rows; ++j) W2S_DISPATCH_AS(A, pack<A>)(at(y, j, 0), y.dtype, 0, y.across, 1, K, K, copy + j * K);
      few = copy, down = K;
    }
    const int64_t share = 64;
    with_element(x.dtype, [&]<class B>(B) {
      parallel_items(pieces(x.rows, share), 1, [&](int64_t block) {
        const int64_t first = block * share, count = std::min(share, x.rows - first);
        W2S_DISPATCH_AS(A, dots<A, B>)(K, static_cast<const B*>(at(x, first, 0)), x.down, count, few, down, y.rows,
                                       Target<A>{to.data + first * to.down, to.down, to.across}, alpha, add);
      });
    });
  }

  // f of an element as it lies in memory
  template <class F>
  static void with_element(Dtype dtype, const F& f) {
    if constexpr (sizeof(A) == 4) {
      if (dtype == Dtype::bf16) return f(Bf16{});
      if (dtype == Dtype::f16) return f(F16{});
    }
    f(A{});
  }
  static bool in_place(Dtype dtype) { return dtype == own_dtype<A> || (sizeof(A) == 4 && dtype != Dtype::f64); }

  void run() {
    M = a.rows, N = b.columns, K = a.columns;
    if (M == 0 || N == 0) return;
    shape = W2S_DISPATCH_AS(A, tile_shape<A>)();
    if (K == 0) {
      if (!add)
        for (int64_t i = 0; i < M; ++i)
          for (int64_t j = 0; j < N; ++j) c.data[i * c.down + j * c.across] = 0;
      return;
    }
    if (N <= M && N <= DOTS && in_place(a.dtype) && a.across == 1) return few_dots(a, b.t(), c);
    if (M < N && M <= DOTS && in_place(b.dtype) && b.down == 1) return few_dots(b.t(), a, {c.data, c.across, c.down});
    if (M <= FEW && in_place(b.dtype) && b.across == 1) return with_element(b.dtype, [&]<class B>(B) { few_times_rows<B>(); });
    if (M <= FEW && b.dtype == own_dtype<A> && b.down == 1) return few_times_columns();
    many();
  }
};

template <class A>
void product(const Operand& a, const Operand& b, Target<A> c, A alpha, bool add) {
  // vectors run along c's columns
  if (c.across == 1) Product<A>{a, b, c, alpha, add, 0, 0, 0, {}}.run();
  else Product<A>{b.t(), a.t(), {c.data, c.across, c.down}, alpha, add, 0, 0, 0, {}}.run();
}

}  // namespace

void gemm_own(const Operand& a, const Operand& b, Target<float> c, float alpha, bool add) { product<float>(a, b, c, alpha, add); }
void gemm(const Operand& a, const Operand& b, Target<float> c, float alpha, bool add) {
  if (!gemm_library(a, b, c, alpha, add) && !gemm_widened(a, b, c, alpha, add)) gemm_own(a, b, c, alpha, add);
}
void gemm(const Operand& a, const Operand& b, Target<double> c, double alpha, bool add) { product<double>(a, b, c, alpha, add); }

}  // namespace w2s
