// Gradients of all models. dz_tv = p_tv (b_t + c_t log p_tv) + q_tv, with q of `SoftTarget`; a tile of it feeds two
// products: dh_i += dz W_i and dW_i = dz^T (w_i h_i).
//
// A loss whose coefficients are known beforehand (mean, sum) needs lse before the first gradient tile. Rather than compute
// the logits twice, the first sweep leaves them in the memory of dW: tile for tile the [tile, D_i] elements of a gradient
// that is not written yet hold [tile, <= D_i] logits. The second sweep takes a tile out, then writes the gradient there. Where
// bfloat16 is multiplied as it is, what is kept is the distance from the largest of CHUNK logits in float16, an error of at
// most 2^-12 of it: less than the rounding of dz. Rows beyond lie in memory of the call's own, at most as much again as dW is
// and at most SPARE; what has no room there either is computed again.
#pragma once

#include "cpu/linear_loss/soft_target.h"

namespace w2s {
namespace linear {

constexpr int64_t OUTER = 8;        // tokens whose dW is a sum of outer products, faster than a product that packs
constexpr int64_t STRIP = 1 << 20;  // elements of dW that are made in the accumulating type before they are narrowed

struct Need {  // which gradients; of the lists a bit a model
  int64_t hiddens, heads, biases;
  bool weights;
  static constexpr int arguments = 4;
};

constexpr int64_t SPARE = 64 << 20;   // bytes of logits beside dW
constexpr int64_t WORTH_SPARE = 128;  // rows, fewer of which are computed again in no more time than fresh memory takes

constexpr int NOWHERE = -1, BESIDE = -2;  // in place of a model: logits that are computed again; in memory of their own

struct Segment {  // rows [r0, r0 + rows), and the model whose dW keeps their logits
  int64_t r0, rows;
  int stash;
};

template <class A>
inline int64_t widest(const std::vector<std::vector<Segment>>& groups) {
  int64_t rows = 16;
  for (const auto& g : groups) rows = std::max(rows, round_up(g.back().r0 + g.back().rows - g.front().r0, 16));
  return rows;
}

// Whether what is kept of logits is float16.
template <class A>
inline bool keeps_halves(const Engine<A>& e) { return e.dots && !e.cap; }

template <class A>
struct Gradients {
  Engine<A>& e;
  Need need;
  Tensors dhiddens, dheads, dbiases;
  Tensor dweights;
  std::vector<A> b, c, lse;           // [Mp]; c may be empty
  SoftTarget<A> q;
  std::vector<double> dw;             // [Mp, n]: sum_v dz (b_i, or the capped logit)
  std::vector<std::vector<A>> dbias;  // [V]
  A *raw = nullptr, *z = nullptr, *slope = nullptr;  // raw: sum_v dz_tv W_i,v, [M, width]
  bool halves = false;                // logits are kept as differences from `tops`, [chunks, Mp], in float16
  std::vector<A> tops;
  A* spare = nullptr;                 // the logits of the segment that lies beside dW, [V, rows up to a multiple of 16]
  const A* kept = nullptr;            // the logits of all rows [V, Mp], where forward left them
  uint16_t* dz16 = nullptr;           // with dots: a tile of dz in bfloat16
  const uint16_t* scaled16 = nullptr; // with coefficients that are not 1: the rows times them, [M, width]
  std::vector<A*> wide, capped;       // dW in A where dW is narrower: `height` of its rows at a time
  int64_t height = 0;
  std::vector<A> partial, zeros;

  Gradients(Engine<A>& engine, const LinearArguments& linear, Need wanted) : e(engine), need(wanted) {
    for (int i = 0; i < e.n; ++i) {
      dhiddens.push_back(empty_of(e.hiddens[size_t(i)], need.hiddens >> i & 1));
      dheads.push_back(empty_of(linear.heads[size_t(i)], need.heads >> i & 1));
    }
    for (int i = 0; i < int(linear.biases.size()); ++i) {
      dbiases.push_back(empty_of(linear.biases[size_t(i)], need.biases >> i & 1));
      dbias.emplace_back(size_t(need.biases >> i & 1 ? e.V : 0));
    }
    dweights = need.weights ? e.output({e.T, e.n}) : e.output({0});
    for (auto* v : {&b, &lse}) v->assign(size_t(e.Mp), A(0));
    e.widens = !e.dots;
    dw.assign(size_t(e.Mp * e.n), 0.0);
  }

  bool needs_raw(int i) const { return (need.hiddens >> i & 1) || (need.weights && !e.cap); }
  bool needs_head(int i) const { return need.heads >> i & 1; }

  // One group of rows makes a narrower dW a strip after another, which stays in cache; several add to a whole tile.
  void plan(const std::vector<std::vector<Segment>>& of) {
    const int64_t columns = widest<A>(of), groups = int64_t(of.size());
    for (const auto& group : of)
      for (const Segment& part : group)
        if (part.stash == BESIDE) spare = e.memory(e.V * round_up(part.rows, 16) / (keeps_halves(e) ? 2 : 1));
    halves = keeps_halves(e) && of.size() == 1 && of[0].front().stash != NOWHERE;
    if (halves) tops.assign(size_t(pieces(e.V, CHUNK) * e.Mp), A(0));
    int64_t shared = 0, widest_head = 1;
    for (int i = 0; i < e.n; ++i) {
      if (needs_head(i) && e.narrower(i)) shared += e.D[size_t(i)];
      widest_head = std::max(widest_head, e.D[size_t(i)]);
    }
    e.plan(columns * (e.cap ? e.n + 2 : 1), groups > 1 ? shared : 0);
    height = groups > 1 ? e.tile : std::clamp(STRIP / widest_head / CHUNK * CHUNK, CHUNK, e.tile);
    z = e.memory(e.tile * columns);
    if (e.dots) dz16 = reinterpret_cast<uint16_t*>(e.memory(e.tile * columns / 2));
    if (e.apart && need.heads) {
      uint16_t* to = reinterpret_cast<uint16_t*>(e.memory((e.M * e.width + 1) / 2));
      parallel_items(e.M, 16, [&](int64_t m) { kernels<ConvertKernels, A>().narrow(e.h + m * e.width, e.width, Dtype::bf16, to + m * e.width); });
      scaled16 = to;
    }
    if (e.cap) slope = e.memory(e.tile * columns);
    for (int i = 0; i < e.n; ++i) {
      if (e.cap) capped.push_back(e.memory(e.tile * columns));
      wide.push_back(needs_head(i) && e.narrower(i) ? e.memory(height * e.D[size_t(i)]) : nullptr);
    }
    bool any = false;
    for (int i = 0; i < e.n; ++i) any |= needs_raw(i);
    if (any) raw = e.memory(e.M * e.width);
    partial.resize(size_t(pieces(e.tile, CHUNK) * columns));
    zeros.assign(size_t(columns), A(0));
  }

  // of the current tile: logits, or with `halves` what chunk_keep leaves of them
  template <class T = A>
  T* stash(const Segment& s) const {
    if (s.stash == BESIDE) return reinterpret_cast<T*>(spare) + e.v0 * round_up(s.rows, 16);
    const Tensor& of = dheads[size_t(s.stash)];
    return reinterpret_cast<T*>(static_cast<char*>(of.data_ptr()) + e.v0 * e.D[size_t(s.stash)] * bytes_of(dtype_of(of)));
  }

  A* tops_of(int64_t v, int64_t r0) { return &tops[size_t((e.v0 + v) / CHUNK * e.Mp + r0)]; }

  // the current tile's logits of a segment, where `found` are the maxima of its chunks
  void put(const Segment& s, const A* in, int64_t ld, const std::vector<A>& found) {
    uint16_t* to = stash<uint16_t>(s);
    e.chunks([&](int64_t c, int64_t v, int64_t k) {
      std::copy_n(&found[size_t(c * ld)], s.rows, tops_of(v, s.r0));
      kernels<TileKernels, A>().keep(in + v * ld, k, ld, &found[size_t(c * ld)], to + v * ld);
    });
  }

  // Whether dz goes to bfloat16 straight from what was kept: a target a row, and nobody else who reads it.
  bool straight(const std::vector<Segment>& segments) const {
    const bool many = segments.back().r0 + segments.back().rows - segments.front().r0 > OUTER;
    return many && halves && segments.back().stash != NOWHERE && q.K == 1 && q.d.empty() && q.r.empty() && c.empty() && !need.weights &&
           !need.biases;
  }
  void form_straight(const std::vector<Segment>& segments, int64_t ld) {
    for (const Segment& s : segments) {
      const int64_t own = round_up(s.rows, 16);
      uint16_t* out = dz16 + (s.r0 - segments.front().r0);
      const uint16_t* in = stash<uint16_t>(s);
      e.chunks([&](int64_t, int64_t v, int64_t k) {
        kernels<TileKernels, A>().grad_kept(in + v * own, own, out + v * ld, ld, k, own, tops_of(v, s.r0), &lse[size_t(s.r0)],
                                            &b[size_t(s.r0)]);
      });
      q.inside(e, s.r0, s.rows, [&](int64_t i, int64_t v, int64_t t) {
        const double top = double(tops_of(v, s.r0)[t]), whole = double(lse[size_t(s.r0 + t)]);
        const double z = double(half_to_float(in[v * own + t])) + (std::isinf(top) && top < 0 ? 0 : top);
        const double p = std::exp(z - (std::isinf(whole) && whole < 0 ? 0 : whole));
        out[v * ld + t] = float_to_bf16(float(double(b[size_t(s.r0 + t)]) * p + double(q.a[size_t(i)])));
      });
    }
  }

  // z of the current tile becomes dz
  void form(const std::vector<Segment>& segments, int64_t ld) {
    const int64_t first = segments.front().r0;
    for (const Segment& s : segments) {
      A* out = z + (s.r0 - first);
      const int64_t own_ld = round_up(s.rows, 16);
      if (kept) {
        softmax_part(s.r0, kept + e.v0 * e.Mp + s.r0, e.Mp, out, ld, own_ld);
      } else if (s.stash == NOWHERE) {
        e.logits(s.r0, s.rows, out, ld, capped.data());
        softmax_part(s.r0, out, ld, out, ld, own_ld);
      } else if (halves) {
        const uint16_t* in = stash<uint16_t>(s);
        e.chunks([&](int64_t, int64_t v, int64_t k) {
          kernels<TileKernels, A>().back(in + v * own_ld, own_ld, out + v * ld, ld, k, own_ld, tops_of(v, s.r0));
        });
        softmax_part(s.r0, out, ld, out, ld, own_ld);
      } else {
        softmax_part(s.r0, stash(s), own_ld, out, ld, own_ld);
      }
      q.add(e, s.r0, s.rows, out, ld);
    }
  }

  void softmax_part(int64_t r0, const A* in, int64_t ldi, A* out, int64_t ldo, int64_t columns) const {
    const bool more = !c.empty() || !q.r.empty();
    const A* log_coef = c.empty() ? zeros.data() : &c[size_t(r0)];
    const A* all = q.r.empty() ? zeros.data() : &q.r[size_t(r0)];
    e.chunks([&](int64_t, int64_t v, int64_t k) {
      if (more)
        kernels<TileKernels, A>().grad_more(in + v * ldi, ldi, out + v * ldo, ldo, k, columns, &lse[size_t(r0)], &b[size_t(r0)], log_coef, all,
                                         q.classes.empty() ? nullptr : &q.classes[size_t(e.v0 + v)]);
      else
        kernels<TileKernels, A>().grad(in + v * ldi, ldi, out + v * ldo, ldo, k, columns, &lse[size_t(r0)], &b[size_t(r0)]);
    });
  }

  // the products of a tile of dz, for rows [r0, r0 + rows)
  void spend(int64_t r0, int64_t rows, int64_t ld, bool first_block, bool last_block, bool formed) {
    Operand dz{};
    for (int i = 0; i < e.n; ++i) {
      A* g = z;
      if (e.cap) {
        g = slope;
        e.chunks([&](int64_t, int64_t v, int64_t k) {
          kernels<TileKernels, A>().slope(slope + v * ld, z + v * ld, capped[size_t(i)] + v * ld, k, ld, e.cap);
        });
      }
      if (formed) dz = {dz16, Dtype::bf16, e.nv, rows, ld, 1};
      else if (i == 0 || e.cap) dz = e.dots ? narrowed(g, rows, ld) : Matrix<A>{g, e.nv, rows, ld, 1}.operand();
      if (needs_raw(i)) {
        const Target<A> to{raw + r0 * e.width + e.offset[size_t(i)], e.width, 1};
        multiply(dz.t(), e.dots ? e.head16(i) : e.head_operand(i), to, e.v0 > 0);
      }
      if (needs_head(i)) {
        if (first_block && last_block && rows <= OUTER) head_outer(i, r0, rows, g, ld);
        else head_product(i, r0, rows, dz, first_block, last_block);
      }
      const A* c = coef(i) + r0;
      if (need.biases >> i & 1)
        e.chunks([&](int64_t, int64_t v, int64_t k) {
          kernels<TileKernels, A>().rows(g + v * ld, k, ld, rows, c, &dbias[size_t(i)][size_t(e.v0 + v)]);
        });
      if (need.weights && (e.cap || !e.bias.empty())) weight_part(i, r0, rows, ld);
    }
  }

  const A* coef(int i) const { return e.coef[size_t(i)].data(); }

  // dz of the current tile in bfloat16, as a plain implementation's products take it
  Operand narrowed(const A* g, int64_t rows, int64_t ld) const {
    e.chunks([&](int64_t, int64_t v, int64_t k) { kernels<ConvertKernels, A>().narrow(g + v * ld, k * ld, Dtype::bf16, dz16 + v * ld); });
    return {dz16, Dtype::bf16, e.nv, rows, ld, 1};
  }

  // the rows as the heads' gradients take them: with their coefficients
  Operand rows_of(int i, int64_t r0, int64_t rows) const {
    if (scaled16) return e.narrow_rows(scaled16, i, r0, rows);
    return e.dots && scaled.empty() ? e.hidden16(i, r0, rows) : e.H(i, r0, rows).operand();
  }

  // dW of all rows there are, written once: no product is worth packing for
  void head_outer(int i, int64_t r0, int64_t rows, const A* g, int64_t ld) {
    const int64_t d = e.D[size_t(i)], pitch = round_up(d, 64);
    const Operand h = rows_of(i, r0, rows);
    std::vector<A> wide_rows(size_t(rows * pitch + 64));
    for (int64_t t = 0; t < rows; ++t)
      kernels<ConvertKernels, A>().widen(static_cast<const char*>(h.data) + t * h.down * bytes_of(h.dtype), h.dtype, d, &wide_rows[size_t(t * pitch)]);
    const Rows to(dheads[size_t(i)]);
    char* out = static_cast<char*>(dheads[size_t(i)].data_ptr()) + e.v0 * d * to.bytes;
    e.chunks([&](int64_t, int64_t v, int64_t k) {
      kernels<TileKernels, A>().outer(g + v * ld, k, ld, rows, wide_rows.data(), pitch, d, to.dtype, out + v * d * to.bytes);
    });
  }

  void head_product(int i, int64_t r0, int64_t rows, const Operand& dz, bool first_block, bool last_block) {
    const int64_t d = e.D[size_t(i)];
    Tensor& out = dheads[size_t(i)];
    const Operand h = rows_of(i, r0, rows);
    if (first_block && last_block && e.dots && dtype_of(out) == Dtype::bf16) {
      uint16_t* to = static_cast<uint16_t*>(out.data_ptr()) + e.v0 * d;
      if (gemm_library_bf16(dz, h, to) || gemm_bf16_rounded(dz, h, {to, d, 1})) return;
    }
    if (!wide[size_t(i)]) return multiply(dz, h, Target<A>{static_cast<A*>(out.data_ptr()) + e.v0 * d, d, 1}, !first_block);
    const Rows narrow_rows(out);
    for (int64_t v0 = 0; v0 < e.nv; v0 += height) {
      const int64_t count = std::min(height, e.nv - v0);
      multiply(dz.part(v0, count), h, Target<A>{wide[size_t(i)], d, 1}, !first_block);
      if (!last_block) continue;
      char* to = static_cast<char*>(out.data_ptr()) + (e.v0 + v0) * d * narrow_rows.bytes;
      parallel_items(count, 64, [&](int64_t v) {
        kernels<ConvertKernels, A>().narrow(wide[size_t(i)] + v * d, d, narrow_rows.dtype, to + v * d * narrow_rows.bytes);
      });
    }
  }

  void weight_part(int i, int64_t r0, int64_t rows, int64_t ld) {
    const A* s = e.cap ? capped[size_t(i)] : nullptr;
    const A* bias = e.cap ? nullptr : e.bias[size_t(i)].data() + e.v0;
    e.chunks([&](int64_t c, int64_t v, int64_t k) {
      kernels<TileKernels, A>().dot(z + v * ld, s ? s + v * ld : nullptr, bias ? bias + v : nullptr, k, ld, &partial[size_t(c * ld)]);
    });
    for (int64_t c = 0; c < pieces(e.nv, CHUNK); ++c)
      for (int64_t t = 0; t < rows; ++t) dw[size_t((r0 + t) * e.n + i)] += double(partial[size_t(c * ld + t)]);
  }

  // with a softcap H is not scaled, so the scale goes into the rows before dW is formed
  void scale_for_heads() {
    if (!e.cap || !need.heads) return;
    for (int64_t m = 0; m < e.M; ++m)
      for (int i = 0; i < e.n; ++i)
        for (int64_t d = 0; d < e.D[size_t(i)]; ++d) scaled[size_t(m * e.width + e.offset[size_t(i)] + d)] *= coef(i)[m];
  }
  std::vector<A> scaled;

  void finish() {
    std::vector<Rows> hidden;
    for (const Tensor& t : e.hiddens) hidden.emplace_back(t);
    for (int i = 0; i < e.n; ++i) {
      zero_unused(i);
      if (i < int(dbiases.size()) && (need.biases >> i & 1))
        kernels<ConvertKernels, A>().narrow(dbias[size_t(i)].data(), e.V, dtype_of(dbiases[size_t(i)]), dbiases[size_t(i)].data_ptr());
    }
    A* weight = need.weights ? static_cast<A*>(dweights.data_ptr()) : nullptr;
    parallel_items(e.M, 8, [&](int64_t m) {
      const int64_t t = e.index[size_t(m)];
      std::vector<A> x(size_t(e.width));
      for (int i = 0; i < e.n; ++i) {
        const int64_t d = e.D[size_t(i)];
        const A* row = raw ? raw + m * e.width + e.offset[size_t(i)] : nullptr;
        if (need.hiddens >> i & 1) {
          const Dtype type = hidden[size_t(i)].dtype;
          kernels<ConvertKernels, A>().narrow_scaled(row, d, coef(i)[m], type, static_cast<char*>(dhiddens[size_t(i)].data_ptr()) + t * d * bytes_of(type));
        }
        if (!weight) continue;
        double total = dw[size_t(m * e.n + i)];
        if (!e.cap) {
          kernels<ConvertKernels, A>().widen(hidden[size_t(i)].at(t, 0), hidden[size_t(i)].dtype, d, x.data());
          for (int64_t j = 0; j < d; ++j) total += double(x[size_t(j)]) * double(row[j]);
        }
        weight[t * e.n + i] = A(total / e.temperature);
      }
    });
  }

  // rows that do not count, vocabulary rows past the end, and everything if no row counts
  void zero_unused(int i) {
    if ((need.hiddens >> i & 1) && e.M < e.T) torch::stable::zero_(dhiddens[size_t(i)]);
    if (needs_head(i)) zero_from(dheads[size_t(i)], e.M ? e.V : 0, e.D[size_t(i)]);
    if (i < int(dbiases.size()) && (need.biases >> i & 1)) zero_from(dbiases[size_t(i)], e.V, 1);
    if (i == 0 && need.weights) torch::stable::zero_(dweights);
  }
  static void zero_from(Tensor& t, int64_t row, int64_t columns) {
    const int64_t bytes = bytes_of(dtype_of(t)) * columns;
    std::memset(static_cast<char*>(t.data_ptr()) + row * bytes, 0, size_t((t.size(0) - row) * bytes));
  }

  void sweep(const std::vector<std::vector<Segment>>& groups) {
    A* plain = e.h;
    if (e.cap && need.heads) {
      scaled.assign(e.h, e.h + e.M * e.width);
      scale_for_heads();
    }
    for (int64_t v = 0; v < e.V && e.M > 0; v += e.tile) {
      e.load(v);
      for (size_t k = 0; k < groups.size(); ++k) {
        const Segment &head = groups[k].front(), &tail = groups[k].back();
        const int64_t rows = tail.r0 + tail.rows - head.r0, ld = round_up(rows, 16);
        const bool formed = straight(groups[k]);
        if (formed) form_straight(groups[k], ld);
        else form(groups[k], ld);
        if (!scaled.empty()) e.h = scaled.data();
        spend(head.r0, rows, ld, k == 0, k + 1 == groups.size(), formed);
        e.h = plain;
      }
    }
    finish();
  }
};

template <class A>
inline std::vector<std::vector<Segment>> blocks(const Engine<A>& e) {
  std::vector<std::vector<Segment>> groups;
  for (int64_t r0 = 0; r0 < e.M; r0 += e.block()) groups.push_back({{r0, std::min(e.block(), e.M - r0), NOWHERE}});
  return groups;
}

// One group of all rows, as many as fit in dW or beside it; or blocks, where most would not fit.
template <class A>
inline std::vector<std::vector<Segment>> stashed(const Engine<A>& e, Need need) {
  std::vector<Segment> group;
  const int64_t bytes = keeps_halves(e) ? 2 : int64_t(sizeof(A));
  int64_t r0 = 0;
  for (int i = 0; i < e.n && r0 < e.M && !e.cap; ++i) {
    const int64_t floats = e.D[size_t(i)] * bytes_of(e.head[size_t(i)].dtype) / bytes;
    const int64_t rows = std::min(floats / 16 * 16, e.M - r0);
    if (!(need.heads >> i & 1) || rows == 0) continue;
    group.push_back({r0, rows, i});
    r0 += rows;
  }
  const int64_t row = e.V * bytes, beside = std::min({SPARE / row / 16 * 16, r0, e.M - r0});
  if (beside >= WORTH_SPARE) {
    group.push_back({r0, beside, BESIDE});
    r0 += beside;
  }
  if (2 * r0 < e.M || e.M == 0) return blocks(e);
  if (r0 < e.M) group.push_back({r0, e.M - r0, NOWHERE});
  return {group};
}

// The first sweep: `look(r0, rows, z, ld)` adds every tile of logits to `s`, which stay where the second finds them, or in `keep`.
template <class A, class F>
inline void first_sweep(Engine<A>& e, Gradients<A>& g, const std::vector<std::vector<Segment>>& groups, A* keep, const Statistics<A>& s,
                        const F& look) {
  for (int64_t v = 0; v < e.V && e.M > 0; v += e.tile) {
    e.load(v);
    for (const auto& group : groups)
      for (const Segment& part : group) {
        const int64_t ld = round_up(part.rows, 16);
        A* z = keep ? keep + v * e.Mp : part.stash == NOWHERE || g.halves ? g.z : g.stash(part);
        e.logits(part.r0, part.rows, z, ld, g.capped.data());
        look(part.r0, part.rows, z, ld);
        if (!keep && g.halves && part.stash != NOWHERE) g.put(part, z, ld, s.tops);
      }
  }
}

// once for all losses: instances.cpp
extern template struct Gradients<float>;
extern template struct Gradients<double>;

}  // namespace linear
}  // namespace w2s
