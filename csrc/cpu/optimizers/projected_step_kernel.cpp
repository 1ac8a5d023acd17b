// The passes of projected_step that are no product: Adam's moments and two sums of squares in one pass over R, sums of
// squares of G, psi - phi R, and p = keep p + back - rate phi G with G and p read once and p written once.
#include "cpu/optimizers/projected_step.h"

#include <algorithm>
#include <cmath>

#include "cpu/target_begin.h"

#include "cpu/gemm_kernel.h"
#include "cpu/tiles_kernel.h"

constexpr int64_t TOGETHER = 256;  // rows whose squares are added in the accumulating type, then in double

// work(row, column, n) for the tiles of a block
template <class F>
W2S_INLINE void block_tiles(const Block& b, const F& work) {
  for (int64_t row = b.top; row < b.bottom; ++row)
    for (int64_t c = b.begin; c < b.end; c += TILE) work(row, c, int(std::min<int64_t>(TILE, b.end - c)));
}

// The same with sums of squares beside it, `Count` of them: work returns a row's through `sum`, or adds to `columns`.
template <class A, int Count, class F>
W2S_INLINE void summed(const Block& b, bool by_row, double* const (&sums)[Count], const F& work) {
  if (by_row) {
    for (int64_t row = b.top; row < b.bottom; ++row)
      for (int64_t c = b.begin; c < b.end; c += TILE) {
        A sum[Count] = {};
        work(row, c, int(std::min<int64_t>(TILE, b.end - c)), sum, nullptr);
        for (int k = 0; k < Count; ++k) sums[k][row] += double(sum[k]);
      }
    return;
  }
  A columns[Count * TILE];
  for (int64_t c = b.begin; c < b.end; c += TILE) {
    const int n = int(std::min<int64_t>(TILE, b.end - c));
    for (int64_t top = b.top; top < b.bottom; top += TOGETHER) {
      std::fill_n(columns, Count * TILE, A(0));
      for (int64_t row = top; row < std::min(b.bottom, top + TOGETHER); ++row) work(row, c, n, nullptr, columns);
      for (int k = 0; k < Count; ++k)
        for (int i = 0; i < n; ++i) sums[k][c + i] += double(columns[k * TILE + i]);
    }
  }
}

template <class A>
W2S_INLINE void moments_tile(const Moments<A>& s, int64_t at, int n, A* sum, A* columns) {
  using V = Vec<A>;
  const A *low = s.low + at, rest1 = s.rest1, rest2 = s.rest2;
  A *first = s.first + at, *second = s.second + at, *psi = s.psi + at;
  const V b1 = V::set(s.beta1), r1 = V::set(rest1), b2 = V::set(s.beta2), r2 = V::set(rest2), eps = V::set(s.eps);
  V sum_psi = V::set(0), sum_low = V::set(0);
  int i = 0;
  for (; i + V::W <= n; i += V::W) {
    const V r = V::load(low + i), m = V::fma(b1, V::load(first + i), r1 * r), v = V::fma(b2, V::load(second + i), r2 * r * r);
    const V d = m / (v.root() + eps);
    m.store(first + i);
    v.store(second + i);
    d.store(psi + i);
    if (columns) {
      V::fma(d, d, V::load(columns + i)).store(columns + i);
      V::fma(r, r, V::load(columns + TILE + i)).store(columns + TILE + i);
    } else {
      sum_psi = V::fma(d, d, sum_psi);
      sum_low = V::fma(r, r, sum_low);
    }
  }
  if (sum) sum[0] = sum_psi.sum(), sum[1] = sum_low.sum();
  for (; i < n; ++i) {
    const A r = low[i];
    first[i] = s.beta1 * first[i] + rest1 * r;
    second[i] = s.beta2 * second[i] + rest2 * r * r;
    const A d = psi[i] = first[i] / (std::sqrt(second[i]) + s.eps);
    A& of_psi = columns ? columns[i] : sum[0];
    A& of_low = columns ? columns[TILE + i] : sum[1];
    of_psi += d * d;
    of_low += r * r;
  }
}

template <class A>
inline void moments_as(const Moments<A>& s, const Block& b) {
  double* const sums[2] = {s.sum_psi, s.sum_low};
  summed<A, 2>(b, s.by_row, sums, [&s](int64_t row, int64_t c, int n, A* sum, A* columns) {
    moments_tile(s, row * s.columns + c, n, sum, columns);
  });
}

template <class A>
inline void squares_as(const Rows& x, bool by_row, double* into, const Block& b) {
  using V = Vec<A>;
  double* const sums[1] = {into};
  summed<A, 1>(b, by_row, sums, [&x](int64_t row, int64_t c, int n, A* sum, A* columns) {
    A wide[TILE];
    const A* g = read_tile(x, row, c, n, wide);
    int i = 0;
    if (columns) {
      for (; i + V::W <= n; i += V::W) V::fma(V::load(g + i), V::load(g + i), V::load(columns + i)).store(columns + i);
      for (; i < n; ++i) columns[i] += g[i] * g[i];
      return;
    }
    V part = V::set(0), other = V::set(0);
    for (; i + 2 * V::W <= n; i += 2 * V::W) {
      const V one = V::load(g + i), two = V::load(g + i + V::W);
      part = V::fma(one, one, part);
      other = V::fma(two, two, other);
    }
    A all = (part + other).sum();
    for (; i < n; ++i) all += g[i] * g[i];
    *sum = all;
  });
}

template <class A>
inline void inside_as(const Moments<A>& s, const A* phi, A scale, const Block& b) {
  using V = Vec<A>;
  block_tiles(b, [&](int64_t row, int64_t c, int n) {
    const A *low = s.low + row * s.columns + c, *of = s.by_row ? phi + row : phi + c;
    A* psi = s.psi + row * s.columns + c;
    const V factor = V::set(scale), same = V::set(*of);
    int i = 0;
    for (; i + V::W <= n; i += V::W) {
      const V f = s.by_row ? same : V::load(of + i);
      (factor * (V::load(psi + i) - f * V::load(low + i))).store(psi + i);
    }
    for (; i < n; ++i) psi[i] = scale * (psi[i] - of[s.by_row ? 0 : i] * low[i]);
  });
}

template <class A>
inline void update_as(const Update<A>& s, const Block& b) {
  using V = Vec<A>;
  block_tiles(b, [&s](int64_t row, int64_t c, int n) {
    A wide_p[TILE], wide_g[TILE], result[TILE];
    const A *p = read_tile(s.p, row, c, n, wide_p), *g = s.phi ? read_tile(s.grad, row, c, n, wide_g) : nullptr;
    const A *back = s.back ? s.back + (row - s.top) * s.columns + c : nullptr;
    const A* of = !s.phi ? nullptr : s.by_row ? s.phi + row : s.phi + c;
    write_tile(s.p, row, c, n, result, [&](A* out) {
      const V keep = V::set(s.keep), rate = V::set(-s.rate), same = V::set(of ? -s.rate * *of : 0);
      int i = 0;
      for (; i + V::W <= n; i += V::W) {
        V x = keep * V::load(p + i);
        if (back) x = x + V::load(back + i);
        if (g) x = V::fma(s.by_row ? same : rate * V::load(of + i), V::load(g + i), x);
        x.store(out + i);
      }
      for (; i < n; ++i) out[i] = s.keep * p[i] + (back ? back[i] : A(0)) - (g ? s.rate * of[s.by_row ? 0 : i] * g[i] : A(0));
    });
  });
}

// `columns` of P, or of P^T, as they are multiplied with
template <class A>
inline void pack_as(const Tiled<A>& s, bool back, int64_t k0, int64_t panel, A* to) {
  constexpr int64_t width = tile_columns<A>;
  const int64_t first = panel * width, columns = std::min(width, (back ? s.n : s.r) - first);
  const int64_t depth = back ? std::min(s.back_depth, s.r - k0) : std::min(s.depth, s.n - k0);
  const int64_t down = back ? s.across : s.down, across = back ? s.down : s.across;
  pack<A>(s.basis + k0 * down + first * across, own_dtype<A>, down, across, depth, columns, width, to);
}

template <class A>
inline void project_as(const Tiled<A>& s, int64_t top, int64_t bottom, A* left) {
  constexpr int64_t height = tile_rows<A>, width = tile_columns<A>;
  const int64_t tiles = (bottom - top + height - 1) / height, panels = (s.r + width - 1) / width;
  for (int64_t k0 = 0; k0 < s.n; k0 += s.depth) {
    const int64_t depth = std::min(s.depth, s.n - k0);
    const int64_t down = s.grad.stride / s.grad.bytes;
    for (int64_t t = 0; t < tiles; ++t)
      pack<A>(s.grad.at(top + t * height, k0), s.grad.dtype, 1, down, depth, std::min(height, bottom - top - t * height), height,
              left + t * height * depth);
    if (s.squares) squares_as<A>(s.grad, true, s.squares, {top, bottom, k0, k0 + depth});
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t t = 0; t < tiles; ++t)
        tile<A, tile_rows<A>>(depth, left + t * height * depth, height, 1, s.forth + k0 * panels * width + p * width * depth, width,
                              std::min(height, bottom - top - t * height), std::min(width, s.r - p * width),
                              Target<A>{s.low + (top + t * height) * s.r + p * width, s.r, 1}, A(1), k0 > 0);
  }
}

// The epilogue of a tile of p, whose lines were asked for when the tile before began.
template <class A, int M>
W2S_INLINE void put_step(const Vec<A> (&sum)[M][2], const Tiled<A>& s, int64_t row, int64_t rows, int64_t column, int64_t columns,
                         bool first) {
  using V = Vec<A>;
  const bool outside = first && s.phi;
  const A keep = first ? s.keep : A(1);
  A lanes[2 * V::W], wide[TILE];
  for (int i = 0; i < M; ++i) {
    if (i >= rows) return;
    A* p = static_cast<A*>(s.p.at(row + i, column));
    const A factor = outside ? -s.rate * s.phi[row + i] : A(0);
    const A* g = outside ? read_tile(s.grad, row + i, column, int(columns), wide) : nullptr;
    if (columns == 2 * V::W) {
      for (int v = 0; v < 2; ++v) {
        V x = V::fma(V::set(keep), V::load(p + v * V::W), V::set(s.alpha) * sum[i][v]);
        if (outside) x = V::fma(V::set(factor), V::load(g + v * V::W), x);
        x.store(p + v * V::W);
      }
      continue;
    }
    for (int v = 0; v < 2; ++v) sum[i][v].store(lanes + v * V::W);
    for (int64_t j = 0; j < columns; ++j) p[j] = keep * p[j] + s.alpha * lanes[j] + (outside ? factor * g[j] : A(0));
  }
}

template <class A>
inline void apply_as(const Tiled<A>& s, int64_t top, int64_t bottom, A* left) {
  constexpr int64_t height = tile_rows<A>, width = tile_columns<A>, LINE = 64 / int64_t(sizeof(A));
  const int64_t tiles = (bottom - top + height - 1) / height, panels = (s.n + width - 1) / width;
  for (int64_t k0 = 0; k0 < s.r; k0 += s.back_depth) {
    const int64_t depth = std::min(s.back_depth, s.r - k0);
    for (int64_t t = 0; t < tiles; ++t)
      pack<A>(s.psi + (top + t * height) * s.r + k0, own_dtype<A>, 1, s.r, depth, std::min(height, bottom - top - t * height), height,
              left + t * height * depth);
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t t = 0; t < tiles; ++t) {
        const bool last = t + 1 == tiles;
        const int64_t next = last ? top : top + (t + 1) * height, column = (last ? p + 1 : p) * width;
        if (column < s.n)
          for (int64_t i = next; i < std::min(next + height, bottom); ++i)
            for (int64_t c = column; c < std::min(column + width, s.n); c += LINE) {
              __builtin_prefetch(s.p.at(i, c), 1);
              if (s.phi && k0 == 0) __builtin_prefetch(s.grad.at(i, c));
            }
        Vec<A> sum[tile_rows<A>][2];
        accumulate<A, tile_rows<A>, 2>(depth, left + t * height * depth, height, 1,
                                       s.back + k0 * panels * width + p * width * depth, width, sum);
        put_step<A, tile_rows<A>>(sum, s, top + t * height, std::min(height, bottom - top - t * height), p * width,
                                  std::min(width, s.n - p * width), k0 == 0);
      }
  }
}

W2S_KERNELS(ProjectedKernels, moments_as<Real>, squares_as<Real>, inside_as<Real>, update_as<Real>, tile_shape<Real>, pack_as<Real>,
            project_as<Real>, apply_as<Real>)

#include "cpu/target_end.h"
