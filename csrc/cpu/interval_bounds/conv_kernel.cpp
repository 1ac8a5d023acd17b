// the dual products of a convolution, positions along the vectors.
//
// A sample's centre and radius lie padded with zeros in planes [channel][row][phase][column]: columns of one residue
// modulo the stride are next to each other, so every row of the unfolded input is made of plain runs.
#include "cpu/interval_bounds/boxes.h"

#include "cpu/target_begin.h"

#include "cpu/interval_bounds/blocks_kernel.h"

using interval::ConvShape;

// Runs of output positions [first, first + count), row by row: f(output row, output column, length, offset)
template <class F>
W2S_INLINE void runs(const ConvShape& s, int64_t first, int64_t count, const F& f) {
  for (int64_t done = 0; done < count;) {
    const int64_t y = (first + done) / s.out_w, x = (first + done) % s.out_w;
    const int64_t length = s.out_w - x < count - done ? s.out_w - x : count - done;
    f(y, x, length, done);
    done += length;
  }
}

// Offset in a padded plane of the inputs that tap (ky, kx) shows to output (y, x)
W2S_INLINE int64_t tap_at(const ConvShape& s, int64_t ky, int64_t kx, int64_t y, int64_t x) {
  const int64_t column = kx * s.dilation_x;
  return ((y * s.stride_y + ky * s.dilation_y) * s.stride_x + column % s.stride_x) * s.phase_w + column / s.stride_x + x;
}

// Channels along the vectors, WIDTH of them; positions (or taps) are broadcast from the planes where they lie, HIGH at a
// time, so that nothing is unfolded.
template <class A>
constexpr int HIGH = wide_file<A> ? 6 : 2;
template <class A>
constexpr int WIDTH = 2 * Vec<A>::W;
constexpr int64_t POSITIONS = 128;  // of a block of the gradient of W: they stay in L1 while all taps pass

// One sample, `channels` channels from `a`, `b` (rows of in_w contiguous elements), as padded planes.
template <class A>
inline void pad_sample(const ConvShape& s, int64_t channels, const char* a, const char* b, Dtype dtype, bool bounds, bool sound, int64_t terms,
                       double spread, A* c, A* r) {
  const int64_t bytes = dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2, size = s.plane();
  const Rounding<A> rounding = rounding_of<A>(sound, terms, spread);
  A* row_c = workspace<A, 2>(2 * (s.in_w + TILE));
  A* row_r = row_c + s.in_w + TILE;
  std::memset(c, 0, size_t(channels * size) * sizeof(A));
  std::memset(r, 0, size_t(channels * size) * sizeof(A));
  for (int64_t i = 0; i < channels; ++i)
    for (int64_t y = 0; y < s.in_h; ++y) {
      const int64_t from = (i * s.in_h + y) * s.in_w * bytes, to = i * size + (y + s.padding_y) * s.stride_x * s.phase_w;
      if (s.stride_x == 1 && s.in_w % PAD == 0) {
        center_row<A>(a + from, b + from, dtype, bounds, rounding, s.in_w, c + to + s.padding_x, r + to + s.padding_x);
        continue;
      }
      center_row<A>(a + from, b + from, dtype, bounds, rounding, s.in_w, row_c, row_r);
      for (int64_t x = 0; x < s.in_w; ++x) {
        const int64_t column = x + s.padding_x, at = to + column % s.stride_x * s.phase_w + column / s.stride_x;
        c[at] = row_c[x];
        r[at] = row_r[x];
      }
    }
}

// m, s [R positions][WIDTH] (+)= sums over k taps of c[offset + p] w and r[offset + p] |w|; w: [k][WIDTH]
template <class A, int R>
inline void position_tile(const A* c, const A* r, const int64_t* offset, const A* w, int64_t k, A* m, A* s, bool add) {
  using V = Vec<A>;
  constexpr int W = V::W;
  V am[R][2], as[R][2];
  W2S_UNROLL for (int p = 0; p < R; ++p) W2S_UNROLL for (int j = 0; j < 2; ++j) am[p][j] = as[p][j] = V::set(0);
  for (int64_t i = 0; i < k; ++i, w += 2 * W) {
    const V w0 = V::load(w), w1 = V::load(w + W), a0 = w0.abs(), a1 = w1.abs();
    const A *pc = c + offset[i], *pr = r + offset[i];
    W2S_UNROLL for (int p = 0; p < R; ++p) {
      const V cv = V::set(pc[p]), rv = V::set(pr[p]);
      am[p][0] = V::fma(cv, w0, am[p][0]);
      am[p][1] = V::fma(cv, w1, am[p][1]);
      as[p][0] = V::fma(rv, a0, as[p][0]);
      as[p][1] = V::fma(rv, a1, as[p][1]);
    }
  }
  W2S_UNROLL for (int p = 0; p < R; ++p) W2S_UNROLL for (int j = 0; j < 2; ++j) {
    A *to = m + p * 2 * W + j * W, *other = s + p * 2 * W + j * W;
    (add ? V::load(to) + am[p][j] : am[p][j]).store(to);  // a chain of a block of taps, then one of blocks
    (add ? V::load(other) + as[p][j] : as[p][j]).store(other);
  }
}

// [positions][WIDTH] of a raw element type as `wide` rows of positions, `stride` elements apart
template <class T>
inline void turn(const T* from, int64_t positions, int64_t width, int64_t wide, T* to, int64_t stride) {
  for (int64_t o = 0; o < wide; ++o)
    for (int64_t i = 0; i < positions; ++i) to[o * stride + i] = from[i * width + o];
}

// Rows [y0, y1) of the outputs of one sample and group: finish(m, s, n, tile, x, y) turns n sums of channels
// [tile * WIDTH, ...) of positions next to each other into outputs of `dtype`, which go to x, y in planes.
template <class A, class Finish>
inline void conv_rows(const ConvShape& s, const A* c, const A* r, const int64_t* offset, const A* packed, int64_t y0, int64_t y1, Dtype dtype,
                      char* x, char* y, const Finish& finish) {
  constexpr int64_t MOST = TILE / WIDTH<A>, BLOCK = interval::CONV_BLOCK;
  const int64_t k = s.k(), bytes = dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2, area = s.positions();
  alignas(64) A m[TILE], q[TILE], fx[TILE], fy[TILE];
  for (int64_t row = y0; row < y1; ++row)
    for (int64_t t = 0; t * WIDTH<A> < s.group_out; ++t)
      for (int64_t x0 = 0; x0 < s.out_w; x0 += MOST) {
        const int64_t count = s.out_w - x0 < MOST ? s.out_w - x0 : MOST, from = row * s.stride_y * s.stride_x * s.phase_w + x0;
        const auto tile = [&](auto rows, int64_t at) __attribute__((always_inline)) {
          for (int64_t i = 0; i < k; i += BLOCK)
            position_tile<A, decltype(rows)::value>(c + from + at, r + from + at, offset + i, packed + (t * k + i) * WIDTH<A>,
                                                    k - i < BLOCK ? k - i : BLOCK, m + at * WIDTH<A>, q + at * WIDTH<A>, i > 0);
        };
        int64_t at = 0;
        for (; at + HIGH<A> <= count; at += HIGH<A>) tile(std::integral_constant<int, HIGH<A>>(), at);
        if (HIGH<A> > 4 && at + 4 <= count) {
          tile(std::integral_constant<int, 4>(), at);
          at += 4;
        }
        for (; at + 2 <= count; at += 2) tile(std::integral_constant<int, 2>(), at);
        for (; at < count; ++at) tile(std::integral_constant<int, 1>(), at);
        finish(m, q, count * WIDTH<A>, t, fx, fy);
        const int64_t wide = s.group_out - t * WIDTH<A> < WIDTH<A> ? s.group_out - t * WIDTH<A> : WIDTH<A>;
        const int64_t to = (t * WIDTH<A> * area + row * s.out_w + x0) * bytes;
        for (auto [buffer, out] : {std::pair{fx, x + to}, std::pair{fy, y + to}}) {
          if (bytes == 2) turn(reinterpret_cast<const uint16_t*>(buffer), count, WIDTH<A>, wide, reinterpret_cast<uint16_t*>(out), area);
          else if (bytes == 4) turn(reinterpret_cast<const float*>(buffer), count, WIDTH<A>, wide, reinterpret_cast<float*>(out), area);
          else turn(reinterpret_cast<const double*>(buffer), count, WIDTH<A>, wide, reinterpret_cast<double*>(out), area);
        }
      }
}

// bias: null, or of whole tiles of WIDTH channels
template <class A>
inline void conv_forward(const ConvShape& s, const A* c, const A* r, const int64_t* offset, const A* packed, const A* bias, int64_t y0,
                         int64_t y1, const interval::Call& call, int64_t terms, Dtype dtype, char* x, char* y) {
  const Rounding<A> rounding = rounding_of<A>(call.sound, terms, call.spread);
  A shift[TILE];
  conv_rows<A>(s, c, r, offset, packed, y0, y1, dtype, x, y, [&](const A* m, const A* q, int64_t n, int64_t t, A* fx, A* fy) {
    for (int64_t i = 0; bias && i < n; ++i) shift[i] = bias[t * WIDTH<A> + i % WIDTH<A>];
    finish_row<A>(m, q, bias ? shift : nullptr, int(n), {call.bounds_out, call.relu}, rounding, dtype, fx, fy);
  });
}

// the gradient of the input, as a convolution of the outputs' gradients
template <class A>
inline void conv_input(const ConvShape& s, const A* c, const A* r, const int64_t* offset, const A* packed, bool bounds, Dtype dtype, char* x,
                       char* y) {
  conv_rows<A>(s, c, r, offset, packed, 0, s.out_h, dtype, x, y, [&](const A* m, const A* q, int64_t n, int64_t, A* fx, A* fy) {
    input_gradient<A>(m, q, int(n), bounds, dtype, fx, fy);
  });
}

// w as [tile of WIDTH rows][column][WIDTH], zeros past the last row. Element (row, column): w[row * down + at(column)].
template <class A>
inline void pack_channels(const A* w, int64_t rows, int64_t columns, int64_t down, const int64_t* at, A* out) {
  for (int64_t t = 0; t < rows; t += WIDTH<A>)
    for (int64_t k = 0; k < columns; ++k, out += WIDTH<A>)
      for (int64_t p = 0; p < WIDTH<A>; ++p) out[p] = t + p < rows ? w[(t + p) * down + at[k]] : A(0);
}

// gm, gr [channels][ld] as zero-padded planes of the shape `s`, whose inputs they are
template <class A>
inline void pad_gradient(const ConvShape& s, const A* gm, const A* gr, int64_t ld, A* c, A* r) {
  std::memset(c, 0, size_t(s.group_in * s.plane()) * sizeof(A));
  std::memset(r, 0, size_t(s.group_in * s.plane()) * sizeof(A));
  for (int64_t i = 0; i < s.group_in; ++i)
    for (int64_t y = 0; y < s.in_h; ++y) {
      const int64_t to = i * s.plane() + (y + s.padding_y) * s.phase_w + s.padding_x;
      std::memcpy(c + to, gm + i * ld + y * s.in_w, size_t(s.in_w) * sizeof(A));
      std::memcpy(r + to, gr + i * ld + y * s.in_w, size_t(s.in_w) * sizeof(A));
    }
}

// m[p][j] (+)= sum_b g[b][p] x[b][j], s likewise from g[b][ROWS + p] and x[b][PANEL + j]; rows of PANEL
template <class A>
inline void cross_tile(const A* g, const A* x, int64_t count, A* m, A* s, bool add) {
  using V = Vec<A>;
  constexpr int R = ROWS<A>, C = COLS<A>;
  V am[R][C], as[R][C];
  cross_products<A>(g, x, count, am, as);
  W2S_UNROLL for (int p = 0; p < R; ++p) W2S_UNROLL for (int j = 0; j < C; ++j) {
    A *to = m + p * PANEL<A> + j * V::W, *other = s + p * PANEL<A> + j * V::W;
    (add ? V::load(to) + am[p][j] : am[p][j]).store(to);  // a chain of `count` terms, then one of blocks
    (add ? V::load(other) + as[p][j] : as[p][j]).store(other);
  }
}

// w [rows, columns] as tiles [rows / ROWS][column][ROWS w, ROWS |w|], zeros past the last row. `down`, `across`: strides.
template <class A>
inline void pack_weight(const A* w, int64_t rows, int64_t columns, int64_t down, int64_t across, A* out) {
  constexpr int R = ROWS<A>;
  for (int64_t t = 0; t < rows; t += R)
    for (int64_t k = 0; k < columns; ++k, out += 2 * R)
      for (int p = 0; p < R; ++p) {
        const A x = t + p < rows ? w[(t + p) * down + k * across] : A(0);
        out[p] = x;
        out[R + p] = std::abs(x);
      }
}

// Gradients of centre and radius of one sample's outputs, `size` positions a channel, padded planes [channel][ld]
template <class A>
inline void output_gradient(const char* ga, const char* gb, const char* oa, const char* ob, Dtype dtype, const interval::Call& call,
                            int64_t channels, int64_t size, int64_t ld, A* gm, A* gr, double* bias) {
  const int64_t bytes = bytes_of(dtype);
  for (int64_t o = 0; o < channels; ++o) {
    const int64_t from = o * size * bytes;
    for (int64_t i = 0; i < size; i += TILE)
      gradient_row<A>(ga + from + i * bytes, gb + from + i * bytes, oa + from + i * bytes, ob + from + i * bytes, dtype,
                      {call.bounds_out, call.relu}, int(size - i < TILE ? size - i : TILE), gm + o * ld + i, gr + o * ld + i);
    for (int64_t i = size; i < ld; ++i) gm[o * ld + i] = gr[o * ld + i] = 0;
    if (!bias) continue;
    Vec<A> sum = Vec<A>::set(0);
    for (int64_t i = 0; i < ld; i += Vec<A>::W) sum = sum + Vec<A>::load(gm + o * ld + i);
    bias[o] += double(sum.sum());
  }
}

// Gradient of one sample's padded planes of one group: gm W and gr |W| a panel of positions at a time, folded back
template <class A>
inline void fold_sample(const ConvShape& s, const A* gm, const A* gr, int64_t ld, const A* packed, A* c, A* r) {
  const int64_t taps = s.kernel_h * s.kernel_w, k = s.group_in * taps, size = s.out_h * s.out_w, tiles = (k + ROWS<A> - 1) / ROWS<A>;
  A* panel = workspace<A, 0>(s.group_out * 2 * PANEL<A> + 2 * ROWS<A> * PANEL<A>);
  A *m = panel + s.group_out * 2 * PANEL<A>, *q = m + ROWS<A> * PANEL<A>;
  std::memset(c, 0, size_t(s.group_in * s.plane()) * sizeof(A));
  std::memset(r, 0, size_t(s.group_in * s.plane()) * sizeof(A));
  for (int64_t first = 0; first < size; first += PANEL<A>) {
    const int64_t count = size - first < PANEL<A> ? size - first : PANEL<A>;
    copy_panel<A>(gm + first, ld, s.group_out, count, panel, 2 * PANEL<A>);
    copy_panel<A>(gr + first, ld, s.group_out, count, panel + PANEL<A>, 2 * PANEL<A>);
    for (int64_t t = 0; t < tiles; ++t) {
      cross_tile<A>(packed + t * s.group_out * 2 * ROWS<A>, panel, s.group_out, m, q, false);
      for (int64_t p = 0; p < ROWS<A> && t * ROWS<A> + p < k; ++p) {
        const int64_t row = t * ROWS<A> + p, base = row / taps * s.plane(), tap = row % taps;
        runs(s, first, count, [&](int64_t y, int64_t x, int64_t length, int64_t at) {
          const int64_t to = base + tap_at(s, tap / s.kernel_w, tap % s.kernel_w, y, x);
          A *pc = c + to, *pr = r + to;
          const A *fm = m + p * PANEL<A> + at, *fq = q + p * PANEL<A> + at;
          for (int64_t e = 0; e < length; ++e) pc[e] += fm[e];
          for (int64_t e = 0; e < length; ++e) pr[e] += fq[e];
        });
      }
    }
  }
}

// padded planes of gradients of one group back to rows of the input's gradient
template <class A>
inline void unpad_sample(const ConvShape& s, const A* c, const A* r, bool bounds, Dtype dtype, char* a, char* b) {
  const int64_t bytes = bytes_of(dtype);
  A* row_c = workspace<A, 2>(2 * (s.in_w + TILE));
  A* row_r = row_c + s.in_w + TILE;
  for (int64_t i = 0; i < s.group_in; ++i)
    for (int64_t y = 0; y < s.in_h; ++y) {
      const int64_t from = i * s.plane() + (y + s.padding_y) * s.stride_x * s.phase_w, to = (i * s.in_h + y) * s.in_w * bytes;
      for (int64_t x = 0; x < s.in_w; ++x) {
        const int64_t column = x + s.padding_x, at = from + column % s.stride_x * s.phase_w + column / s.stride_x;
        row_c[x] = c[at];
        row_r[x] = r[at];
      }
      input_gradients<A>(row_c, row_r, s.in_w, bounds, dtype, a + to, b + to);
    }
}

template <class A>
inline int64_t weight_width() { return WIDTH<A>; }

// gm, gr [channels][ld] as [tile of WIDTH channels][position][WIDTH gm, WIDTH gr], zeros past the last channel
template <class A>
inline void turn_gradient(const A* gm, const A* gr, int64_t ld, int64_t channels, int64_t size, A* out) {
  for (int64_t t = 0; t < channels; t += WIDTH<A>, out += size * 2 * WIDTH<A>) {
    const int64_t wide = channels - t < WIDTH<A> ? channels - t : WIDTH<A>;
    if (wide < WIDTH<A>) std::memset(out, 0, size_t(size * 2 * WIDTH<A>) * sizeof(A));
    for (int64_t first = 0; first < size; first += 32) {
      const int64_t last = size - first < 32 ? size : first + 32;
      for (int64_t o = 0; o < wide; ++o)
        for (int64_t i = first; i < last; ++i) {
          out[i * 2 * WIDTH<A> + o] = gm[(t + o) * ld + i];
          out[(i * 2 + 1) * WIDTH<A> + o] = gr[(t + o) * ld + i];
        }
    }
  }
}

// dm[p][o] += sum_i c[offset_p + i] gm[i][o], ds likewise, over positions [first, first + count)
template <class A, int R>
inline void tap_tile(const ConvShape& s, const A* c, const A* r, const int64_t* offset, int64_t first, int64_t count, const A* g, A* dm, A* ds) {
  using V = Vec<A>;
  constexpr int W = V::W;
  V am[R][2], as[R][2];
  W2S_UNROLL for (int p = 0; p < R; ++p) W2S_UNROLL for (int j = 0; j < 2; ++j) am[p][j] = as[p][j] = V::set(0);
  // c and r are parts of one buffer: one pointer a tap and two indices leave all in registers
  const int64_t down = s.stride_y * s.stride_x * s.phase_w, other_plane = r - c;
  int64_t x = first % s.out_w, row = first / s.out_w * down;
  const A* tap[R];
  W2S_UNROLL for (int p = 0; p < R; ++p) tap[p] = c + offset[p];
  const A* q = g;
  for (int64_t done = 0; done < count; x = 0, row += down) {
    const int64_t length = s.out_w - x < count - done ? s.out_w - x : count - done, from = row + x;
    for (int64_t i = from; i < from + length; ++i, q += 4 * W) {
      const V m0 = V::load(q), m1 = V::load(q + W), r0 = V::load(q + 2 * W), r1 = V::load(q + 3 * W);
      W2S_UNROLL for (int p = 0; p < R; ++p) {
        const V cv = V::set(tap[p][i]), rv = V::set(tap[p][i + other_plane]);
        am[p][0] = V::fma(cv, m0, am[p][0]);
        am[p][1] = V::fma(cv, m1, am[p][1]);
        as[p][0] = V::fma(rv, r0, as[p][0]);
        as[p][1] = V::fma(rv, r1, as[p][1]);
      }
    }
    done += length;
  }
  W2S_UNROLL for (int p = 0; p < R; ++p) W2S_UNROLL for (int j = 0; j < 2; ++j) {
    A *to = dm + p * 2 * W + j * W, *other = ds + p * 2 * W + j * W;
    (V::load(to) + am[p][j]).store(to);
    (V::load(other) + as[p][j]).store(other);
  }
}

// One sample's and group's part of the gradient of W, added to dm, ds [tile of WIDTH channels][k][WIDTH]
template <class A>
inline void weight_sample(const ConvShape& s, const int64_t* offset, const A* turned, const A* c, const A* r, A* dm, A* ds) {
  const int64_t k = s.k(), size = s.positions();
  for (int64_t o = 0; o < s.group_out; o += WIDTH<A>, turned += size * 2 * WIDTH<A>, dm += k * WIDTH<A>, ds += k * WIDTH<A>)
    for (int64_t first = 0; first < size; first += POSITIONS) {
      const int64_t count = size - first < POSITIONS ? size - first : POSITIONS;
      const A* g = turned + first * 2 * WIDTH<A>;
      int64_t at = 0;
      for (; at + HIGH<A> <= k; at += HIGH<A>) tap_tile<A, HIGH<A>>(s, c, r, offset + at, first, count, g, dm + at * WIDTH<A>, ds + at * WIDTH<A>);
      for (; at < k; ++at) tap_tile<A, 1>(s, c, r, offset + at, first, count, g, dm + at * WIDTH<A>, ds + at * WIDTH<A>);
    }
}

template <class A>
inline A* sample_memory(int64_t elements) { return workspace<A, 3>(elements); }

W2S_KERNELS(ConvKernels, tile_height<Real>, pack_weight<Real>, weight_width<Real>, pack_channels<Real>,
            sample_memory<Real>, pad_sample<Real>, conv_forward<Real>, output_gradient<Real>, turn_gradient<Real>,
            weight_sample<Real>, pad_gradient<Real>, conv_input<Real>, fold_sample<Real>, unpad_sample<Real>)

#include "cpu/target_end.h"
