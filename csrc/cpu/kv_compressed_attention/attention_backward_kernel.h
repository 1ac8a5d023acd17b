// Included once a target (no include guard), after attention_forward_kernel.h. With P = exp(S - top) / total computed again:
//     dV = P^T dO,  dP = dO V^T,  dS = P (dP - rowsum(dO O)),  dQ = scale dS K,  dK = scale dS^T Q
//
// An item is a head and a share of its queries. S^T, dP^T and dQ^T are made as in the forward, queries in the lanes. dV
// and dK sum over queries: there the columns of the head lie in the lanes, KEYS_TILE keys by up to NV vectors in registers.
// Order: queries in runs of SPAN, whose packed forms stay in L3; key chunks of CHUNK, whose panels and sums stay in L2;
// query blocks; blocks of KEYS keys, whose P^T and dS^T stay in L1.

using attention::Gradients;

constexpr int64_t SPAN = 1024, CHUNK = 256;

template <class A>
constexpr int MAX_NV = Shape<A>::WIDE ? 5 : 3;

// acc[k][v] += sum_q p[k QB + q] rows[q ld + lanes v] over one block of queries; acc has row length ld
template <class A, int K, int NV>
W2S_INLINE void rows_tile(const A* __restrict p, const A* __restrict rows, int64_t ld, A* __restrict acc) {
  using V = Vec<A>;
  constexpr int QB = Shape<A>::QB;
  V a[K][NV];  // every loop unrolled: a loop left over K or NV keeps the sums in memory
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) a[k][v] = V::load(acc + k * ld + v * V::W);
  for (int q = 0; q < QB; ++q) {
    V x[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) x[v] = V::load(rows + q * ld + v * V::W);
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      const V b = V::set(p[k * QB + q]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) a[k][v] = V::fma(b, x[v], a[k][v]);
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) a[k][v].store(acc + k * ld + v * V::W);
}

// acc [n, ld] += p [n, QB] rows [QB, ld]; n is a multiple of R
template <class A>
inline void rows_product(const A* p, int64_t n, const A* rows, int64_t ld, A* acc) {
  constexpr int W = Vec<A>::W, QB = Shape<A>::QB, R = Shape<A>::R;
  const int64_t vectors = ld / W, parts = pieces(vectors, MAX_NV<A>);
  for (int64_t part = 0, v = 0; part < parts; ++part) {
    const int nv = int(pieces(vectors - v, parts - part));
    for (int64_t k = 0; k < n; k += nv > 3 ? 4 : R) {
      const A *a = p + k * QB, *x = rows + v * W;
      A* out = acc + k * ld + v * W;
      if (nv == 1) rows_tile<A, R, 1>(a, x, ld, out);
      else if (nv == 2) rows_tile<A, R, 2>(a, x, ld, out);
      else if (nv == 3) rows_tile<A, R, 3>(a, x, ld, out);
      else if constexpr (MAX_NV<A> > 3) {
        if (nv == 4) rows_tile<A, 4, 4>(a, x, ld, out);
        else rows_tile<A, 4, 5>(a, x, ld, out);
      }
    }
    v += nv;
  }
}

template <class A>
struct BackwardScratch {
  static constexpr int QB = Shape<A>::QB, R = Shape<A>::R;
  int64_t ld, Dr, Mr, blocks;
  Buffer<A> k_down, k_across, v_down, dk, dv;          // a head: panels; sums [Mr, ld]
  Buffer<A> q, g, q_rows, g_rows, dq, top, inverse, delta;      // a run of queries, block by block
  Buffer<A> p, ds, rows;
  BackwardScratch(const Problem& x)
      : ld(round_up(x.D, Shape<A>::W)), Dr(round_up(x.D, R)), Mr(round_up(x.M, R)),
        blocks(pieces(std::min<int64_t>(SPAN, x.N), QB)), k_down(Mr * x.D), k_across(x.M * Dr), v_down(Mr * x.D), dk(Mr * ld),
        dv(Mr * ld), q(blocks * QB * x.D), g(blocks * QB * x.D), q_rows(blocks * QB * ld), g_rows(blocks * QB * ld),
        dq(blocks * QB * Dr), top(blocks * QB), inverse(blocks * QB), delta(blocks * QB), p(KEYS * QB), ds(KEYS * QB), rows(QB * (round_up(x.D, PAD) + PAD)) {}
};

template <class A>
inline void load_queries(const Problem& p, const Gradients& g, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t block, BackwardScratch<A>& s) {
  constexpr int QB = Shape<A>::QB;
  const int64_t D = p.D, ld = s.ld, wide = round_up(D, PAD) + PAD;
  A *rows_ = s.rows.data, *q_rows = s.q_rows.data + block * QB * ld, *g_rows = s.g_rows.data + block * QB * ld;
  A *top = s.top.data + block * QB, *inverse = s.inverse.data + block * QB, *delta = s.delta.data + block * QB;
  const A* given = static_cast<const A*>(p.softmax) + (b * p.H + h) * p.N + first;
  load_rows<A>(p.out, b, h, first, rows, QB, D, A(1), rows_, wide);
  std::memset(g_rows, 0, size_t(QB * ld) * sizeof(A));
  A row[256];
  for (int64_t r = 0; r < QB; ++r) {
    top[r] = r < rows ? given[r] : A(0);
    inverse[r] = r < rows ? A(1) / given[p.B * p.H * p.N + r] : A(0);
    A sum = 0;
    if (r < rows) {
      widen<A>(g.grad.at(b, first + r, h), g.grad.dtype, int(D), A(0), row);
      std::memcpy(g_rows + r * ld, row, size_t(D) * sizeof(A));
      for (int64_t d = 0; d < D; ++d) sum += row[d] * rows_[r * wide + d];
    }
    delta[r] = sum;
  }
  load_rows<A>(p.q, b, h, first, rows, QB, D, A(1), rows_, wide);
  for (int64_t r = 0; r < QB; ++r) std::memcpy(q_rows + r * ld, rows_ + r * wide, size_t(ld) * sizeof(A));
  const A factor = A(p.scale);
  for (int64_t i = 0; i < QB * wide; ++i) rows_[i] *= factor;
  transpose<A>(rows_, wide, QB, D, s.q.data + block * QB * D, QB);
  transpose<A>(g_rows, ld, QB, D, s.g.data + block * QB * D, QB);
  std::memset(s.dq.data + block * QB * s.Dr, 0, size_t(QB * s.Dr) * sizeof(A));
}

// P^T and dS^T of n keys from `first` and one block of queries
template <class A>
inline void score_gradients(const Problem& p, int64_t first, int64_t n, int64_t block, BackwardScratch<A>& s) {
  using V = Vec<A>;
  constexpr int QB = Shape<A>::QB, R = Shape<A>::R;
  const A *q = s.q.data + block * QB * p.D, *g = s.g.data + block * QB * p.D;
  for (int64_t k = 0; k < n; k += R) {
    dot_tile<A>(s.k_down.data + (first + k) * p.D, q, p.D, s.p.data + k * QB);
    dot_tile<A>(s.v_down.data + (first + k) * p.D, g, p.D, s.ds.data + k * QB);
  }
  for (int j = 0; j < 3; ++j) {
    const int64_t at = block * QB + j * V::W;
    const V top = V::load(s.top.data + at), inverse = V::load(s.inverse.data + at), delta = V::load(s.delta.data + at);
    for (int64_t k = 0; k < n; ++k) {
      A *x = s.p.data + k * QB + j * V::W, *y = s.ds.data + k * QB + j * V::W;
      const V e = power(V::load(x) - top) * inverse;
      e.store(x);
      (e * (V::load(y) - delta)).store(y);
    }
  }
}

template <class A>
inline void backward_run(const Problem& p, const Gradients& g, int64_t blocks, BackwardScratch<A>& s) {
  constexpr int QB = Shape<A>::QB, R = Shape<A>::R;
  for (int64_t chunk = 0; chunk < p.M; chunk += CHUNK)
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t k = chunk; k < std::min(chunk + CHUNK, p.M); k += KEYS) {
        const int64_t n = std::min<int64_t>(KEYS, p.M - k);
        score_gradients<A>(p, k, n, block, s);
        if (g.need_kv) {
          const int64_t whole = round_up(n, R);  // rows past M hold the scores of zero keys; their sums are not read
          rows_product<A>(s.p.data, whole, s.g_rows.data + block * QB * s.ld, s.ld, s.dv.data + k * s.ld);
          rows_product<A>(s.ds.data, whole, s.q_rows.data + block * QB * s.ld, s.ld, s.dk.data + k * s.ld);
        }
        if (g.need_q)
          for (int64_t d = 0; d < p.D; d += R)
            product_tile<A, true>(s.k_across.data + d * p.M + k * R, s.ds.data, n, s.dq.data + (block * s.Dr + d) * QB);
      }
}

template <class A>
inline void scale_all(A* x, int64_t n, A factor) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

// Queries [begin, end) of one head: dq is written, dk and dv are summed up in s.
template <class A>
inline void backward_item(const Problem& p, const Gradients& g, int64_t b, int64_t h, int64_t begin, int64_t end, BackwardScratch<A>& s) {
  constexpr int QB = Shape<A>::QB;
  const int64_t span = s.blocks * QB, wide = round_up(p.D, PAD) + PAD;
  for (A* sums : {s.dk.data, s.dv.data}) std::memset(sums, 0, size_t(s.Mr * s.ld) * sizeof(A));
  for (int64_t first = begin; first < end; first += span) {
    const int64_t count = std::min(span, end - first), blocks = pieces(count, QB);
    for (int64_t i = 0; i < blocks; ++i)
      load_queries<A>(p, g, b, h, first + i * QB, std::min<int64_t>(QB, count - i * QB), i, s);
    backward_run<A>(p, g, blocks, s);
    for (int64_t i = 0; i < blocks && g.need_q; ++i) {
      A* dq = s.dq.data + i * QB * s.Dr;
      scale_all(dq, p.D * QB, A(p.scale));
      store_columns<A>(dq, QB, g.dq, b, h, first + i * QB, std::min<int64_t>(QB, count - i * QB), p.D, s.rows.data, wide);
    }
  }
}

template <class A>
inline void store_sums(const A* x, int64_t ld, const Heads& out, int64_t b, int64_t h, int64_t M, int64_t D) {
  for (int64_t m = 0; m < M; ++m) narrow<A>(x + m * ld, int(D), out.dtype, out.at(b, m, h));
}

// Shares a head: enough items for many threads where keys are few, and then the sums of a head are added in order.
template <class A>
inline int64_t shares(const Problem& p) {
  const int64_t wanted = pieces(32, p.B * p.H), most = std::min(2 * p.N / p.M, pieces(p.N, 4 * Shape<A>::QB));
  return std::max<int64_t>(1, std::min(wanted, most));
}

template <class A>
inline void run_backward(const Problem& p, const Gradients& g) {
  constexpr int QB = Shape<A>::QB;
  if (p.B == 0) return;
  const int64_t parts = shares<A>(p), step = round_up(pieces(p.N, parts), QB), ld = round_up(p.D, Shape<A>::W);
  const int64_t size = round_up(p.M, Shape<A>::R) * ld;
  Buffer<A> partial(parts > 1 ? p.B * p.H * parts * 2 * size : 0);
  parallel_ranges(p.B * p.H * parts, 1, [&](int64_t begin, int64_t end) {
    BackwardScratch<A> s(p);
    int64_t packed = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t bh = i / parts, part = i % parts, b = bh / p.H, h = bh % p.H;
      if (bh != packed) {
        pack_panels<A>(p.k, b, h, p.M, p.D, s.k_down.data, s.k_across.data);
        pack_panels<A>(p.v, b, h, p.M, p.D, s.v_down.data, nullptr);
        packed = bh;
      }
      backward_item<A>(p, g, b, h, part * step, std::min(p.N, (part + 1) * step), s);
      if (!g.need_kv) continue;
      scale_all(s.dk.data, size, A(p.scale));
      if (parts > 1) {
        std::memcpy(partial.data + i * 2 * size, s.dk.data, size_t(size) * sizeof(A));
        std::memcpy(partial.data + (i * 2 + 1) * size, s.dv.data, size_t(size) * sizeof(A));
      } else {
        store_sums<A>(s.dk.data, ld, g.dk, b, h, p.M, p.D);
        store_sums<A>(s.dv.data, ld, g.dv, b, h, p.M, p.D);
      }
    }
  });
  if (parts == 1 || !g.need_kv) return;
  parallel_items(p.B * p.H * 2, 1, [&](int64_t i) {
    const int64_t bh = i / 2;
    A* sum = partial.data + (bh * parts * 2 + i % 2) * size;
    for (int64_t part = 1; part < parts; ++part) {
      const A* next = sum + part * 2 * size;
      for (int64_t j = 0; j < size; ++j) sum[j] += next[j];
    }
    store_sums<A>(sum, ld, i % 2 ? g.dv : g.dk, bh / p.H, bh % p.H, p.M, p.D);
  });
}
