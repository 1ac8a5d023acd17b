// interval_linear: (c, r) -> (c W^T + b, r |W|^T), ReLU and bounds in the epilogue, and its gradient.
//
// Floor: 4 B N K FLOPs forward, 8 B N K backward, W read once in each product. W lies [N, K] and is never packed for the
// forward product (both operands run along K) nor for the gradient of the box below 9 rows; |W| exists in registers only.
// A batch of up to 4 rows streams: one read of W for all three gradients. A weight stored [K, N] (a transposed view) and
// such a batch skip the columns that are exactly 0 in every row (dead units). Up to 32 rows: strips of W, see some().
//
// Larger batches in fast rounding are bound by arithmetic, not by reading W; where the library multiplies faster than our
// tiles (gemm.h), each dual product is two of its, in blocks with |W| made for each (dual_products.h).
#include "cpu/gemm.h"
#include "cpu/interval_bounds/dual_products.h"

namespace w2s::interval {
namespace {

constexpr int64_t FEW = 4;        // rows of a batch that streams
constexpr int64_t SOME = 32;      // rows of a batch whose gradients share one read of W
constexpr int64_t STRIP = 16;     // panels of W of one item then, at most: their centres and radii stay in L2
constexpr int64_t PARTS = 16;     // partial sums of a streaming gradient: fixed, so that results do not depend on threads

void forward_by_products(const Box<float>& box, const Stored& w, const float* bias, const Call& call, Tensor& x, Tensor& y) {
  const bool direct = !call.bounds_out && !call.relu && !bias && x.scalar_type() == ScalarType::Float;
  const auto in_place = [&](Tensor& t) { return direct ? static_cast<float*>(t.data_ptr()) : nullptr; };
  const Rows first(x), second(y);
  dual_products(box.c, box.r, box.ld, box.batch, w, in_place(x), in_place(y),
                [&](int64_t p, int64_t j, int64_t columns, const float* m, const float* s) {
                  kernels<LinearKernels, float>().finish(m, s, bias ? bias + j : nullptr, columns, call, first.dtype, first.at(p, j), second.at(p, j));
                });
}

template <class A>
void forward(const Tensor& a, const Tensor& b, const Tensor& weight, const std::optional<Tensor>& bias, const Call& call, Tensor& x, Tensor& y) {
  const int64_t batch = a.size(0), n = weight.size(0), k = weight.size(1);
  CallMemory memory{a, {}};
  const A* shift = widened_bias<A>(bias, n, memory);
  if constexpr (sizeof(A) == 4)
    if (!call.sound && batch > FEW && library_takes(batch, n, k, !transposed(weight)))
      return forward_by_products(plain_box(a, b, call.bounds_in, memory), stored(weight, memory), shift, call, x, y);
  const bool skip = transposed(weight) && batch <= FEW && dtype_of(weight.scalar_type()) == own_dtype<A>;
  const int64_t terms = skip ? k + 8 : kernels<LinearKernels, A>().chain(k);
  const Box<A> box = centered<A>(a, b, call.bounds_in, call.sound, terms, memory, call.spread);
  const Rows first(x), second(y);
  if (skip) {
    const A* w = static_cast<const A*>(weight.data_ptr());
    std::vector<int32_t> alive;
    for (int64_t i = 0; i < k; ++i)
      for (int64_t p = 0; p < batch; ++p)
        if (box.c[p * box.ld + i] != 0 || box.r[p * box.ld + i] != 0) {  // also true for NaN
          alive.push_back(int32_t(i));
          break;
        }
    parallel_items(pieces(n, ALIVE_WIDTH), 1, [&](int64_t i) {
      kernels<LinearKernels, A>().forward_alive(box.c, box.r, box.ld, batch, w, weight.stride(1), n, i * ALIVE_WIDTH, alive.data(), int64_t(alive.size()),
                                     shift, call, terms, first.dtype, first.at(0, 0), first.stride, second.at(0, 0));
    });
    return;
  }
  const RowMatrix<A> w = widened<A>(weight, memory);
  // a chunk of W stays in L2 while every tile of rows passes over it
  const int64_t fit = std::clamp<int64_t>(393216 / int64_t(sizeof(A)) / std::max<int64_t>(1, cut_of(k, batch, sizeof(A))), 12, 252);
  const int64_t chunks = std::max<int64_t>(1, round_up(pieces(n, fit), n >= 48 ? 4 : 1));
  const int64_t wide = round_up(pieces(n, chunks), 12), count = pieces(n, wide), block = 256;
  parallel_items(count * pieces(batch, block), 1, [&](int64_t i) {
    const int64_t j = i % count * wide, p = i / count * block;
    kernels<LinearKernels, A>().forward_block(box.c + p * box.ld, box.r + p * box.ld, box.ld, std::min(block, batch - p), w.data + j * w.stride,
                                   w.stride, std::min(wide, n - j), k, shift ? shift + j : nullptr, call, terms, first.dtype,
                                   first.at(p, j), first.stride, second.at(p, j));
  });
}

std::tuple<Tensor, Tensor> interval_linear(Rowwise a, Rowwise b, Strided weight, std::optional<Tensor> bias, bool bounds_in, bool bounds_out,
                                           bool relu, std::string, bool sound, double spread) {
  Tensor x = fresh(a, {a.size(0), weight.size(0)}), y = fresh(a, {a.size(0), weight.size(0)});
  const Call call{bounds_in, bounds_out, relu, sound, spread};
  if (a.size(0) && weight.size(0)) {
    if (a.scalar_type() == ScalarType::Double) forward<double>(a, b, weight, bias, call, x, y);
    else forward<float>(a, b, weight, bias, call, x, y);
  }
  return {x, y};
}

template <class A>
struct Backward {
  const Tensor &a, &b, &weight;
  const Call& call;
  Tensor &da, &db, &dw, &dbias;
  bool need_x, need_w, need_b;
  int64_t batch = a.size(0), n = weight.size(0), k = weight.size(1), ldg = round_up(n, 16) + 16;
  CallMemory memory{a, {}};
  A *gm = nullptr, *gr = nullptr;

  // where dW is summed: in itself if it is of A, which W is then too
  A* weight_sums() { return dtype_of(dw.scalar_type()) == own_dtype<A> ? static_cast<A*>(dw.data_ptr()) : memory.get<A>(n * k); }
  void store(const A* sums) {
    if (sums != dw.data_ptr()) narrow_rows<A>(sums, dw);
  }

  void gradients(const Tensor& ga, const Tensor& gb, const Tensor& oa, const Tensor& ob) {  // and the bias's
    gm = memory.get<A>(batch * ldg), gr = memory.get<A>(batch * ldg);
    const Rows g1(ga), g2(gb), o1(oa), o2(ob);
    const Rows out(dbias);
    constexpr int64_t WIDE = 128;
    parallel_items(pieces(n, WIDE), grain_of(batch * WIDE), [&](int64_t i) {
      const int64_t j = i * WIDE;
      const int wide = int(std::min(WIDE, n - j));
      A sum[WIDE] = {};
      for (int64_t p = 0; p < batch; ++p)
        kernels<LinearKernels, A>().gradient(g1.at(p, j), g2.at(p, j), o1.at(p, j), o2.at(p, j), g1.dtype, call, wide, gm + p * ldg + j,
                                     gr + p * ldg + j, need_b ? sum : nullptr);
      if (need_b) kernels<ConvertKernels, A>().narrow(sum, wide, out.dtype, static_cast<char*>(dbias.data_ptr()) + j * out.bytes);
    });
  }

  // the gradients are those of centre and radius as they lie in memory
  bool given(const Tensor& ga, const Tensor& gb) const {
    return !call.bounds_out && !call.relu && !need_b && ga.scalar_type() == ScalarType::Float && ga.stride(1) == 1 && gb.stride(1) == 1 &&
           ga.stride(0) == gb.stride(0) && ga.stride(0) >= n;
  }

  void few(const RowMatrix<A>& w) {
    const Box<A> box = centered<A>(a, b, call.bounds_in, false, 0, memory);
    A* out = need_w ? weight_sums() : nullptr;
    const int64_t size = batch * box.ld, share = pieces(n, PARTS);
    A* part = need_x ? memory.get<A>(2 * PARTS * size) : nullptr;
    parallel_items(PARTS, 1, [&](int64_t i) {
      A* xm = part ? part + 2 * i * size : nullptr;
      if (xm) std::fill(xm, xm + 2 * size, A(0));
      const int64_t j = i * share, rows = std::min(share, n - j);
      if (rows > 0)
        kernels<LinearKernels, A>().stream(w.data + j * w.stride, w.stride, rows, k, batch, gm + j, gr + j, ldg, box.c, box.r, box.ld, xm,
                                xm ? xm + size : nullptr, out ? out + j * k : nullptr, k);
    });
    if (need_w) store(out);
    if (!need_x) return;
    for (int64_t i = 1; i < PARTS; ++i)
      for (int64_t e = 0; e < 2 * size; ++e) part[e] += part[2 * i * size + e];
    const Rows first(da), second(db);
    for (int64_t p = 0; p < batch; ++p)
      kernels<LinearKernels, A>().input_gradients(part + p * box.ld, part + size + p * box.ld, k, call.bounds_in, first.dtype, first.at(p, 0), second.at(p, 0));
  }

  const A* packed_gradient() {
    const int64_t tall = kernels<LinearKernels, A>().tile_height(), tiles = pieces(n, tall);
    A* packed = memory.get<A>(tiles * batch * 2 * tall);
    parallel_items(tiles, grain_of(2 * batch * tall), [&](int64_t t) {
      kernels<LinearKernels, A>().pack_gradient(gm + t * tall, gr + t * tall, ldg, batch, packed + t * batch * 2 * tall);
    });
    return packed;
  }

  void some(const RowMatrix<A>& w) {
    const Box<A> box = centered<A>(a, b, call.bounds_in, false, 0, memory);
    A* out = need_w ? weight_sums() : nullptr;
    const A* packed = need_w ? packed_gradient() : nullptr;
    const int64_t panel = kernels<LinearKernels, A>().panel_width(), panels = pieces(k, panel);
    const int64_t wide = std::min(pieces(panels, threads()), STRIP) * panel;
    const Rows first(da), second(db);
    parallel_items(pieces(k, wide), 1, [&](int64_t i) {
      const int64_t j = i * wide;
      kernels<LinearKernels, A>().gradient_strip(gm, gr, ldg, packed, batch, box.c + j, box.r + j, box.ld, w.data + j, w.stride, n,
                                                 std::min(wide, k - j), call.bounds_in, first.dtype, need_x ? first.at(0, j) : nullptr,
                                                 first.stride, need_x ? second.at(0, j) : nullptr, out ? out + j : nullptr, k);
    });
    if (need_w) store(out);
  }

  void many(const RowMatrix<A>& w) {
    const int64_t panel = kernels<LinearKernels, A>().panel_width(), panels = pieces(k, panel), halves = 2;
    if (need_x) {
      const Rows outa(da), outb(db);
      const int64_t share = round_up(pieces(batch, halves), 4);
      parallel_items(panels * halves, 1, [&](int64_t i) {
        const int64_t j = i / halves * panel, p = i % halves * share, rows = std::min(share, batch - p);
        if (rows > 0)
          kernels<LinearKernels, A>().input_panel(gm + p * ldg, gr + p * ldg, ldg, rows, w.data + j, w.stride, n, std::min(panel, k - j), call.bounds_in,
                                       outa.dtype, outa.at(p, j), outa.stride, outb.at(p, j));
      });
    }
    if (!need_w) return;
    const int64_t tall = kernels<LinearKernels, A>().tile_height();
    const Box<A> box = centered<A>(a, b, call.bounds_in, false, 0, memory);
    const A* packed = packed_gradient();
    A* out = weight_sums();
    const int64_t share = round_up(pieces(n, halves), tall);
    parallel_items(panels * halves, 1, [&](int64_t i) {
      const int64_t j = i / halves * panel, q = i % halves * share, rows = std::min(share, n - q);
      if (rows > 0)
        kernels<LinearKernels, A>().weight_panel(packed + q / tall * batch * 2 * tall, batch, box.c + j, box.r + j, box.ld, w.data + q * w.stride + j,
                                      w.stride, out + q * k + j, k, rows, std::min(panel, k - j));
    });
    store(out);
  }

  void by_products() {
    if (need_x) {
      const bool direct = !call.bounds_in && da.scalar_type() == ScalarType::Float;
      const auto in_place = [&](Tensor& t) { return direct ? static_cast<float*>(t.data_ptr()) : nullptr; };
      const Rows first(da), second(db);
      dual_products(gm, gr, ldg, batch, stored(weight, memory).t(), in_place(da), in_place(db),
                    [&](int64_t p, int64_t i, int64_t columns, const float* m, const float* s) {
                      kernels<LinearKernels, float>().input_gradients(m, s, columns, call.bounds_in, first.dtype, first.at(p, i), second.at(p, i));
                    });
    }
    if (!need_w) return;
    A* out = weight_sums();
    weight_products(gm, gr, ldg, batch, plain_box(a, b, call.bounds_in, memory), widened<float>(weight, memory), out);
    store(out);
  }

  void run(const Tensor& ga, const Tensor& gb, const Tensor& oa, const Tensor& ob) {
    bool products = false;
    if constexpr (sizeof(A) == 4) products = batch > FEW && library_takes(batch, k, n, transposed(weight));
    if (products && given(ga, gb)) {
      gm = static_cast<A*>(ga.data_ptr()), gr = static_cast<A*>(gb.data_ptr()), ldg = ga.stride(0);
    } else {
      gradients(ga, gb, oa, ob);
    }
    if (!need_x && !need_w) return;
    if constexpr (sizeof(A) == 4)
      if (products) return by_products();
    const RowMatrix<A> w = widened<A>(weight, memory);
    if (batch <= FEW) return few(w);
    batch <= SOME ? some(w) : many(w);
  }
};

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Gradients interval_linear_backward(Tensor ga, Tensor gb, Rowwise a, Rowwise b, Strided weight, Tensor oa, Tensor ob, bool bounds_in,
                                   bool bounds_out, bool relu, std::string, bool need_x, bool need_w, bool need_b) {
  const int64_t batch = a.size(0), n = weight.size(0), k = weight.size(1);
  expect(a, "first", {batch, k}), expect_like(b, "second", a), expect(weight, "weight", {n, k}, a.scalar_type());
  for (const auto& [t, name] : {std::pair(ga, "grad_first"), {gb, "grad_second"}, {oa, "out_first"}, {ob, "out_second"}})
    expect(t, name, {batch, n}, a.scalar_type());
  const auto made = [&](bool wanted, std::vector<int64_t> shape) {
    return fresh(a, wanted ? shape : std::vector<int64_t>{0});
  };
  Tensor da = made(need_x, {batch, k}), db = made(need_x, {batch, k}), dw = made(need_w, {n, k}), dbias = made(need_b, {n});
  if (batch == 0 || n == 0) {
    for (Tensor* t : {&da, &db, &dw, &dbias}) torch::stable::zero_(*t);
    return {da, db, dw, dbias};
  }
  const Call call{bounds_in, bounds_out, relu, false};
  if (a.scalar_type() == ScalarType::Double) Backward<double>{a, b, weight, call, da, db, dw, dbias, need_x, need_w, need_b}.run(ga, gb, oa, ob);
  else Backward<float>{a, b, weight, call, da, db, dw, dbias, need_x, need_w, need_b}.run(ga, gb, oa, ob);
  return {da, db, dw, dbias};
}

}  // namespace
}  // namespace w2s::interval

W2S_IMPLEMENTATIONS(m) {
  m.add<&w2s::interval::interval_linear>("interval_linear");
  m.add<&w2s::interval::interval_linear_backward>("interval_linear_backward");
}
