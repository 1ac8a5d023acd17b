// The sparse products on panels of tokens (panel_kernel.cpp): how panels, tiles and threads share the work.
//
// Forward, y += x S^T: one item is a panel of tokens (and, with few panels, some of the tiles); it turns its rows of x
// into xT once, then fills one tile of yT after another. Backward, dx = g S and dv = g^T x at the support: with many
// tokens one item is a chunk of panels with its own dv, with few an item is a range of blocks, whose dx and dv are its
// own. Floor: 2 N K FLOPs a product; limits on the way are the loads of xT from L1 (one a multiply-add) and the turning.
#include "cpu/sparse_lowrank/products.h"

namespace w2s::sparse {

namespace {

constexpr int64_t FEW_TOKENS = 128, LONG_ROWS = 96;  // fewer tokens, or longer rows: threads share blocks, not tokens
enum Slot { X_PANEL = 2, Y_TILE = 3, DX_PANEL = 4, SUMS = 5, SHARED = 6 };

// Tokens of a panel: 4 vectors while xT stays in L2 and a block of it in L1, else 2; fewer for a short rest.
template <class A>
int vectors_for(const Pattern& s, int64_t tokens, int most) {
  const int64_t w = kernels<PanelKernels, A>().vector_width();
  if (s.columns * 4 * w * int64_t(sizeof(A)) > (768 << 10) || (s.bytes && s.block > 128)) most = std::min(most, 2);
  return tokens <= w ? 1 : tokens <= 2 * w ? std::min(2, most) : most;
}

template <class A>
void turn(const Operand& m, int64_t first, int64_t tokens, int64_t c0, int64_t columns, int64_t width, A* out) {
  const int64_t bytes = bytes_of(m.dtype);
  const char* at = static_cast<const char*>(m.data) + (first * m.down + c0) * bytes;
  kernels<PanelKernels, A>().pack(at, m.dtype, 1, m.down, columns, tokens, width, out);
}

template <class A>
A* zeros(Slot slot, int64_t count) {
  A* p = scratch_of<A>(slot, count + 64);
  std::fill(p, p + count, A(0));
  return p;
}

}  // namespace

template <class A>
Values<A>::Values(const Tensor& values, const Pattern& s) {
  const Dtype dtype = dtype_of(values);
  if (dtype == own_dtype<A> && !s.order) {
    data = static_cast<const A*>(values.data_ptr());
    return;
  }
  keep = fresh(values, {std::max<int64_t>(s.nnz, 1)}, sizeof(A) == 4 ? ScalarType::Float : ScalarType::Double);
  A* out = static_cast<A*>(keep.data_ptr());
  const void* from = values.data_ptr();
  parallel_ranges(s.nnz, 1 << 14, [&](int64_t begin, int64_t end) {
    kernels<PanelKernels, A>().widen_values(from, dtype, s.order, begin, end, out);
  });
  data = out;
}

template <class A>
void store_values(const Pattern& s, const A* walked, const Tensor& out) {
  const Dtype dtype = dtype_of(out);
  char* to = static_cast<char*>(out.data_ptr());
  parallel_ranges(s.nnz, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) narrow(walked + i, 1, dtype, to + (s.order ? s.order[i] : i) * bytes_of(dtype));
  });
}

template <class A>
void multiply(const Pattern& s, const Operand& x, const A* values, const A* bias, A* y, int64_t ld, bool add) {
  s.needs_plan();
  if (x.rows == 0) return;
  const int64_t N = x.rows, w = kernels<PanelKernels, A>().vector_width();
  const int64_t step = vectors_for<A>(s, N, 4) * w, panels = pieces(N, step);
  const int64_t shares = panels >= 2 * threads() ? 1 : std::min(s.tiles, pieces(2 * threads(), panels));
  parallel_items(panels * shares, 1, [&](int64_t item) {
    const int64_t first = item / shares * step, tokens = std::min(step, N - first), share = item % shares;
    const int vectors = vectors_for<A>(s, tokens, int(step / w));
    const int64_t width = vectors * w;
    A* xt = scratch_of<A>(X_PANEL, s.columns * width + 64);
    turn(x, first, tokens, 0, s.columns, width, xt);
    A* yt = scratch_of<A>(Y_TILE, TILE * width);
    for (int64_t tile = share * s.tiles / shares; tile < (share + 1) * s.tiles / shares; ++tile) {
      const int64_t count = s.rows_of(tile);
      for (int64_t i = 0; i < count; ++i) std::fill_n(yt + i * width, width, bias ? bias[tile * TILE + i] : A(0));
      kernels<PanelKernels, A>().gather_tile(s, tile, vectors, values, xt, yt);
      kernels<PanelKernels, A>().unpack(yt, count, tokens, width, y + first * ld + tile * TILE, ld, add);
    }
  });
}

namespace {

// One panel of tokens through the blocks [b0, b1) and all tiles.
template <class A>
void back_panel(const Pattern& s, const Operand& g, const Operand& x, int64_t first, int64_t tokens, int64_t b0, int64_t b1,
                const A* values, A* dx, int64_t ld, bool add, A* dv) {
  const int64_t w = kernels<PanelKernels, A>().vector_width();
  const int vectors = tokens <= w ? 1 : 2;
  const int64_t width = vectors * w, c0 = b0 * s.block, columns = std::min(s.columns, b1 * s.block) - c0;
  A* xt = dv ? scratch_of<A>(X_PANEL, columns * width + 64) : nullptr;
  if (dv) turn(x, first, tokens, c0, columns, width, xt);
  A* dxt = dx ? zeros<A>(DX_PANEL, columns * width) : nullptr;
  A* gt = scratch_of<A>(Y_TILE, TILE * width + 64);
  A* dots = scratch_of<A>(SUMS, 256 * w);
  for (int64_t tile = 0; tile < s.tiles; ++tile) {
    turn(g, first, tokens, tile * TILE, s.rows_of(tile), width, gt);
    kernels<PanelKernels, A>().scatter_tile(s, tile, b0, b1, vectors, values, gt, xt, dxt, dv, dots);
  }
  if (dx) kernels<PanelKernels, A>().unpack(dxt, columns, tokens, width, dx + first * ld + c0, ld, add);
}

}  // namespace

template <class A>
void multiply_back(const Pattern& s, const Operand& g, const Operand& x, const A* values, A* dx, int64_t ld, bool add, A* dv) {
  s.needs_plan();
  const int64_t N = g.rows, step = 2 * kernels<PanelKernels, A>().vector_width();
  // long rows pay for turning g once a thread, and need no second copy of dv, which for them is large
  if (N < FEW_TOKENS || s.nnz > LONG_ROWS * s.rows) {
    const int64_t items = std::min(s.blocks, 2 * threads());
    parallel_items(items, 1, [&](int64_t item) {
      const int64_t b0 = item * s.blocks / items, b1 = (item + 1) * s.blocks / items;
      for (int64_t first = 0; first < N && b0 < b1; first += step)
        back_panel(s, g, x, first, std::min(step, N - first), b0, b1, values, dx, ld, add, dv);
    });
    return;
  }
  // chunks of panels, each with its own sums of dv, added up in order: a number that depends on N alone
  const int64_t panels = pieces(N, step), chunks = dv ? std::clamp<int64_t>(N / 128, 2, 8) : panels;
  A* parts = dv && chunks > 1 ? scratch_of<A>(SHARED, (chunks - 1) * s.nnz) : nullptr;
  parallel_items(chunks, 1, [&](int64_t c) {
    A* own = !dv ? nullptr : c == 0 ? dv : parts + (c - 1) * s.nnz;
    if (own && c > 0) std::fill(own, own + s.nnz, A(0));
    for (int64_t p = c * panels / chunks; p < (c + 1) * panels / chunks; ++p)
      back_panel(s, g, x, p * step, std::min(step, N - p * step), 0, s.blocks, values, dx, ld, add, own);
  });
  if (!dv) return;
  parallel_ranges(s.nnz, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t c = 1; c < chunks; ++c)
      for (int64_t i = begin; i < end; ++i) dv[i] += parts[(c - 1) * s.nnz + i];
  });
}

// Whether all elements lie in one piece, in either order.
bool dense(const Operand& x) {
  return (x.across == 1 && (x.down == x.columns || x.rows == 1)) || (x.down == 1 && (x.across == x.rows || x.columns == 1));
}

template <class A>
void product(const Operand& a, const Operand& b, Target<A> c, double scale, bool add, bool low) {
  if constexpr (sizeof(A) == 4) {
    const auto fits = [](const Operand& x) { return x.dtype == Dtype::bf16 || (x.dtype == Dtype::f32 && dense(x)); };
    const bool summed = a.dtype != Dtype::bf16 || b.dtype != Dtype::bf16;  // one that takes the factor as it is rounded
    if (low && fits(a) && fits(b) && (summed || scale == 1 || !add) && a.rows && a.columns && b.columns) {
      const Low left(a, scale), right(b, scale);
      gemm_bf16(left.x, right.x, c, add);
      if (scale == 1) return;
      parallel_items(a.rows, 16, [&](int64_t i) {
        for (int64_t j = 0; j < b.columns; ++j) c.data[i * c.down + j * c.across] *= float(scale);
      });
      return;
    }
  }
  gemm(a, b, c, A(scale), add);
}

template <class A>
void form_rows(const Pattern& s, const Operand& a, const Operand& b, double scale, const Tensor& values, int64_t row, int64_t count, A* w) {
  product(b.part(row, count), a, Target<A>{w, s.columns, 1}, scale, false, by_dots<A>({a.dtype, b.dtype}));
  const Dtype dtype = dtype_of(values);
  const void* p = values.data_ptr();
  if (!s.nnz) return;
  parallel_ranges(count, s.row_grain(), [&](int64_t begin, int64_t end) {
    kernels<PanelKernels, A>().add_rows(s, row + begin, end - begin, p, dtype, w + begin * s.columns);
  });
}

#define W2S_INSTANTIATE(A)                                                                                                        \
  template struct Values<A>;                                                                                                      \
  template void multiply<A>(const Pattern&, const Operand&, const A*, const A*, A*, int64_t, bool);                              \
  template void multiply_back<A>(const Pattern&, const Operand&, const Operand&, const A*, A*, int64_t, bool, A*);               \
  template void store_values<A>(const Pattern&, const A*, const Tensor&);                                                         \
  template void product<A>(const Operand&, const Operand&, Target<A>, double, bool, bool);                                         \
  template void form_rows<A>(const Pattern&, const Operand&, const Operand&, double, const Tensor&, int64_t, int64_t, A*);
W2S_INSTANTIATE(float)
W2S_INSTANTIATE(double)

}  // namespace w2s::sparse
