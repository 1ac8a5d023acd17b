// x_l = e^z x_{l-1} + b u_l, y_l = 2 Re sum_n c_n x_{l,n} + d u_l of one feature, in chunks of T positions: with the M
// complex states before each chunk as a row X of 2 M numbers,
//
//   y = U K + X C,  K_ji = 2 Re sum c b e^{z (i - j)} (+ d at i = j),  C_ni = 2 (Re, -Im) c e^{z (i + 1)}
//   X' = e^{z T} X + U B,  B_jn = (Re, Im) b e^{z (T - 1 - j)}
//
// Products of some dozen chunks by tables in L1, 4 M + T multiply-adds a position; the states between chunks and all tables
// in double, so that a phase of many turns has digits. Backward: the states again, then with G the gradient of y and, backwards,
// Z = e^{z T}* Z' + G C^T: du = G K^T + Z' B^T, and the tables' gradients U^T G, G^T X, U^T Z', from which those of z, b, c, d.
#include "cpu/gemm.h"
#include "cpu/state_space/s4d_conv.h"

#include "cpu/target_begin.h"

#include "cpu/state_space/powers_kernel.h"

constexpr int64_t CHUNK = 32, CHUNKS = 64;  // positions of a chunk, and chunks of a product

// Tables of one feature; ld numbers a row of states, 2 M rounded up.
template <class A>
struct Space {
  int64_t M, T, ld;
  Powers p;
  const double *b, *c;
  A *kernel, *in, *out;  // [T, T], [T, ld], [2 M, T]
};

template <class A>
inline Space<A> space(const SpaceCall& call, int64_t h) {
  const int64_t M = call.M, T = std::min(CHUNK, round_up(call.L, PAD)), ld = round_up(2 * M, PAD);
  double* power = scratch_of<double>(2, 2 * (T + 1) * M + T + 5 * M);
  A* tables = scratch_of<A>(3, T * T + T * ld + 2 * M * T + 2 * T + 2 * M);
  Space<A> s{M, T, ld, {power, power + (T + 1) * M, M}, call.b + h * M * 2, call.c + h * M * 2, tables, tables + T * T,
             tables + T * T + T * ld};
  const double* z = call.z + h * M * 2;
  double *re = s.p.re, *im = s.p.im, *tap = power + 2 * (T + 1) * M, *br = tap + T, *bi = br + M, *cr = bi + M, *ci = cr + M;
  double* part = ci + M;
  A *slide = s.out + 2 * M * T, *turned = slide + 2 * T;
  powers(z, M, T + 1, re, im);
  for (int64_t n = 0; n < M; ++n) br[n] = s.b[2 * n], bi[n] = s.b[2 * n + 1], cr[n] = s.c[2 * n], ci[n] = s.c[2 * n + 1];
  for (int64_t j = 0; j < T; ++j) {  // loops over the states alone, without a sum: they are vectors
    const double *pr = re + j * M, *pi = im + j * M, *qr = pr + M, *qi = pi + M;
    A *row = s.in + (T - 1 - j) * ld, *to = turned + M;
    for (int64_t n = 0; n < M; ++n) {
      const double xr = br[n] * pr[n] - bi[n] * pi[n], xi = br[n] * pi[n] + bi[n] * pr[n];
      row[n] = normal<A>(xr), row[M + n] = normal<A>(xi);
      part[n] = cr[n] * xr - ci[n] * xi;
    }
    for (int64_t n = 0; n < M; ++n) {
      turned[n] = normal<A>(2 * (cr[n] * qr[n] - ci[n] * qi[n])), to[n] = normal<A>(-2 * (cr[n] * qi[n] + ci[n] * qr[n]));
    }
    double sum = 0;
    for (int64_t n = 0; n < M; ++n) sum += part[n];
    for (int64_t n = 0; n < 2 * M; ++n) s.out[n * T + j] = turned[n];
    for (int64_t n = 2 * M; n < ld; ++n) row[n] = 0;
    tap[j] = 2 * sum + (j ? 0.0 : call.d[h]);
  }
  for (int64_t j = 0; j < T; ++j) slide[j] = 0, slide[T + j] = normal<A>(tap[j]);
  for (int64_t j = 0; j < T; ++j) std::memcpy(s.kernel + j * T, slide + T - j, size_t(T) * sizeof(A));
  return s;
}

// Positions [begin, begin + count) of a row of u as A, with zeros up to a whole chunk.
template <class A>
inline void read(const Flat& u, int64_t row, int64_t L, int64_t begin, int64_t count, int64_t whole, A* to) {
  const char* from = static_cast<const char*>(u.data) + (row * L + begin) * bytes_of(u.dtype);
  if (u.dtype == own_dtype<A>) std::memcpy(to, from, size_t(count) * sizeof(A));
  else
    for (int64_t i = 0; i < count; i += TILE)
      widen(from + i * bytes_of(u.dtype), u.dtype, int(std::min<int64_t>(TILE, count - i)), A(0), to + i);
  for (int64_t i = count; i < whole; ++i) to[i] = 0;
}

template <class A>
inline void write(const A* from, int64_t count, const Flat& y, int64_t row, int64_t L, int64_t begin) {
  char* to = static_cast<char*>(y.data) + (row * L + begin) * bytes_of(y.dtype);
  if (y.dtype == own_dtype<A>) std::memcpy(to, from, size_t(count) * sizeof(A));
  else
    for (int64_t i = 0; i < count; i += TILE)
      narrow(from + i, int(std::min<int64_t>(TILE, count - i)), y.dtype, to + i * bytes_of(y.dtype));
}

// The states of one feature and sample, [2, M].
struct State {
  double *re, *im;
  int64_t M;
  void set(const double* from) const {
    for (int64_t n = 0; n < M; ++n) re[n] = from ? from[2 * n] : 0, im[n] = from ? from[2 * n + 1] : 0;
  }
};

// rows of U B become the states before each of `chunks`; x goes on to the state behind the last
template <class A>
inline void states(const Space<A>& s, int64_t chunks, const State& x, A* rows) {
  const double *ar = s.p.re + s.T * s.M, *ai = s.p.im + s.T * s.M;
  for (int64_t k = 0; k < chunks; ++k) {
    A *re = rows + k * s.ld, *im = re + s.M;
    for (int64_t n = 0; n < s.M; ++n) {
      const double xr = x.re[n], xi = x.im[n];
      x.re[n] = ar[n] * xr - ai[n] * xi + double(re[n]);
      x.im[n] = ar[n] * xi + ai[n] * xr + double(im[n]);
      re[n] = A(xr), im[n] = A(xi);
    }
  }
}

// Chunks are taken some at a time; the last of a row, which may be short, never passes its state on as the others do.
struct Cut {
  int64_t L, T;
  int64_t chunks() const { return pieces(L, T); }
  int64_t last() const { return L - (chunks() - 1) * T; }
  int64_t parts() const { return pieces(chunks(), CHUNKS); }
  int64_t first(int64_t part) const { return part * CHUNKS; }
  int64_t count(int64_t part) const { return std::min(CHUNKS, chunks() - first(part)); }
  int64_t begin(int64_t part) const { return first(part) * T; }
  int64_t length(int64_t part) const { return std::min(count(part) * T, L - begin(part)); }
};

template <class A>
inline void forward(const SpaceCall& call, int64_t h, const Flat& y, const Flat& after) {
  const Space<A> s = space<A>(call, h);
  const Cut cut{call.L, s.T};
  const int64_t most = std::min(CHUNKS, cut.chunks()), M = s.M, T = s.T;
  A* u = scratch_of<A>(4, most * (2 * T + s.ld));
  A *out = u + most * T, *x = out + most * T;
  double* kept = scratch_of<double>(5, 2 * M);
  const State now{kept, kept + M, M};
  for (int64_t b = 0; b < call.B; ++b) {
    const int64_t row = b * call.H + h;
    now.set(call.state ? call.state + row * 2 * M : nullptr);
    for (int64_t part = 0; part < cut.parts(); ++part) {
      const int64_t count = cut.count(part), length = cut.length(part);
      const bool end = part + 1 == cut.parts();
      read(call.u, row, call.L, cut.begin(part), length, count * T, u);
      const Left<A> inputs{u, count, T, T, 1}, before{x, count, 2 * M, s.ld, 1};
      product(inputs, s.in, s.ld, s.ld, x, s.ld, false);
      states(s, end ? count - 1 : count, now, x);
      if (end)
        for (int64_t n = 0; n < M; ++n) x[(count - 1) * s.ld + n] = A(now.re[n]), x[(count - 1) * s.ld + M + n] = A(now.im[n]);
      product(inputs, s.kernel, T, T, out, T, false);
      product(before, s.out, T, T, out, T, true);
      write(out, length, y, row, call.L, cut.begin(part));
      if (!end || !after) continue;
      const A* tail = u + (count - 1) * T;
      const int64_t r = cut.last();
      for (int64_t n = 0; n < M; ++n) {
        double xr = s.p.re[r * M + n] * now.re[n] - s.p.im[r * M + n] * now.im[n];
        double xi = s.p.re[r * M + n] * now.im[n] + s.p.im[r * M + n] * now.re[n];
        double sr = 0, si = 0;
        for (int64_t j = 0; j < r; ++j)
          sr += double(tail[j]) * s.p.re[(r - 1 - j) * M + n], si += double(tail[j]) * s.p.im[(r - 1 - j) * M + n];
        xr += s.b[2 * n] * sr - s.b[2 * n + 1] * si, xi += s.b[2 * n] * si + s.b[2 * n + 1] * sr;
        after.put((row * M + n) * 2, xr), after.put((row * M + n) * 2 + 1, xi);
      }
    }
  }
}

// What backward needs of the tables turned round, [T, T], [T, ld], [2 M, T].
template <class A>
struct Turned {
  A *kernel, *out, *in;
};

template <class A>
inline Turned<A> turned(const Space<A>& s, A* to) {
  const int64_t M = s.M, T = s.T;
  const Turned<A> t{to, to + T * T, to + T * T + T * s.ld};
  for (int64_t j = 0; j < T; ++j) {
    for (int64_t i = 0; i < T; ++i) t.kernel[i * T + j] = s.kernel[j * T + i];
    for (int64_t n = 0; n < s.ld; ++n) t.out[j * s.ld + n] = n < 2 * M ? s.out[n * T + j] : A(0);
    for (int64_t n = 0; n < 2 * M; ++n) t.in[n * T + j] = s.in[j * s.ld + n];
  }
  return t;
}

// Sums in double of what products gave in A.
template <class A>
inline void add_to(double* sum, const A* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) sum[i] += double(from[i]);
}

// Gradients of one feature: of the tables [T, T], [T, ld], [T, ld], and of z, b, c directly, [M] each.
struct Sums {
  double *kernel, *in, *out, *zr, *zi, *br, *bi;
};

// Through `after`: the state behind the last r positions, of the state x before them; h and lambda [2, M], du += .
template <class A>
inline void through_after(const Space<A>& s, int64_t r, const double* h, const A* u, const A* x, const State& lambda, A* du, const Sums& g) {
  const int64_t M = s.M;
  for (int64_t j = 0; j < r; ++j) {
    double sum = 0;
    const double *pr = s.p.re + (r - 1 - j) * M, *pi = s.p.im + (r - 1 - j) * M;
    for (int64_t n = 0; n < M; ++n) {
      const double hr = h[2 * n], hi = h[2 * n + 1], br = s.b[2 * n], bi = s.b[2 * n + 1], v = double(u[j]);
      sum += hr * (br * pr[n] - bi * pi[n]) + hi * (br * pi[n] + bi * pr[n]);
      const double qr = v * (hr * pr[n] + hi * pi[n]), qi = v * (hi * pr[n] - hr * pi[n]);  // v h conj(p)
      g.br[n] += qr, g.bi[n] += qi;
      g.zr[n] += double(r - 1 - j) * (qr * br + qi * bi), g.zi[n] += double(r - 1 - j) * (qi * br - qr * bi);
    }
    du[j] += A(sum);
  }
  for (int64_t n = 0; n < M; ++n) {
    const double hr = h[2 * n], hi = h[2 * n + 1], pr = s.p.re[r * M + n], pi = s.p.im[r * M + n];
    const double qr = hr * pr + hi * pi, qi = hi * pr - hr * pi, xr = double(x[n]), xi = double(x[M + n]);
    lambda.re[n] += qr, lambda.im[n] += qi;
    g.zr[n] += double(r) * (qr * xr + qi * xi), g.zi[n] += double(r) * (qi * xr - qr * xi);
  }
}

// From the gradients of the tables to those of z, b, c, d; all of them are powers of e^z times weights.
template <class A>
inline void chain(const Space<A>& s, const Sums& g, const SpaceGradients& made, int64_t h) {
  const int64_t M = s.M, T = s.T;
  double* tap = scratch_of<double>(7, T);
  for (int64_t j = 0; j < T; ++j) {
    tap[j] = 0;
    for (int64_t i = 0; i + j < T; ++i) tap[j] += g.kernel[i * T + i + j];
  }
  made.dd[h] = tap[0];
  double *dz = made.dz + h * M * 2, *db = made.db + h * M * 2, *dc = made.dc + h * M * 2;
  for (int64_t n = 0; n < M; ++n) {
    // sums over j of gradient times conj(power), and of j times that
    double k0r = 0, k0i = 0, k1r = 0, k1i = 0, o0r = 0, o0i = 0, o1r = 0, o1i = 0, i0r = 0, i0i = 0, i1r = 0, i1i = 0;
    for (int64_t j = 0; j < T; ++j) {
      const double pr = s.p.re[j * M + n], pi = s.p.im[j * M + n], at = double(j);
      const double kr = 2 * tap[j] * pr, ki = -2 * tap[j] * pi;
      k0r += kr, k0i += ki, k1r += at * kr, k1i += at * ki;
      const double qr = s.p.re[(j + 1) * M + n], qi = s.p.im[(j + 1) * M + n];
      const double gr = 2 * g.out[j * s.ld + n], gi = -2 * g.out[j * s.ld + M + n];
      const double vr = gr * qr + gi * qi, vi = gi * qr - gr * qi;
      o0r += vr, o0i += vi, o1r += (at + 1) * vr, o1i += (at + 1) * vi;
      const double er = g.in[(T - 1 - j) * s.ld + n], ei = g.in[(T - 1 - j) * s.ld + M + n];
      const double wr = er * pr + ei * pi, wi = ei * pr - er * pi;
      i0r += wr, i0i += wi, i1r += at * wr, i1i += at * wi;
    }
    const double br = s.b[2 * n], bi = s.b[2 * n + 1], cr = s.c[2 * n], ci = s.c[2 * n + 1];
    const double wr = cr * br - ci * bi, wi = cr * bi + ci * br;
    dc[2 * n] = o0r + k0r * br + k0i * bi, dc[2 * n + 1] = o0i + k0i * br - k0r * bi;
    db[2 * n] = g.br[n] + i0r + k0r * cr + k0i * ci, db[2 * n + 1] = g.bi[n] + i0i + k0i * cr - k0r * ci;
    dz[2 * n] = g.zr[n] + (k1r * wr + k1i * wi) + (o1r * cr + o1i * ci) + (i1r * br + i1i * bi);
    dz[2 * n + 1] = g.zi[n] + (k1i * wr - k1r * wi) + (o1i * cr - o1r * ci) + (i1i * br - i1r * bi);
  }
}

template <class A>
inline void backward(const SpaceCall& call, int64_t h, const SpaceGradients& made) {
  const Space<A> s = space<A>(call, h);
  const Cut cut{call.L, s.T};
  const int64_t all = cut.chunks(), most = std::min(CHUNKS, all), M = s.M, T = s.T, ld = s.ld;
  const int64_t tables = T * T + 2 * T * ld;
  A* memory = scratch_of<A>(4, tables + T * T + T * ld + 2 * M * T + most * (3 * T + ld) + all * ld);
  A *found = memory, *u = memory + tables + T * T + T * ld + 2 * M * T, *grad = u + most * T, *du = grad + most * T;
  A *lambdas = du + most * T, *before = lambdas + most * ld;
  const Turned<A> t = turned(s, memory + tables);
  double* sums = scratch_of<double>(5, tables + 6 * M);
  std::fill(sums, sums + tables + 4 * M, 0.0);
  double* direct = sums + tables;
  const Sums g{sums, sums + T * T, sums + T * T + T * ld, direct, direct + M, direct + 2 * M, direct + 3 * M};
  const State now{direct + 4 * M, direct + 5 * M, M};
  const double *ar = s.p.re + T * M, *ai = s.p.im + T * M;

  for (int64_t b = 0; b < call.B; ++b) {
    const int64_t row = b * call.H + h;
    now.set(call.state ? call.state + row * 2 * M : nullptr);
    for (int64_t part = 0; part < cut.parts(); ++part) {
      const int64_t count = cut.count(part);
      A* x = before + cut.first(part) * ld;
      read(call.u, row, call.L, cut.begin(part), cut.length(part), count * T, u);
      product(Left<A>{u, count, T, T, 1}, s.in, ld, ld, x, ld, false);
      states(s, count, now, x);
    }
    now.set(nullptr);
    for (int64_t part = cut.parts(); part-- > 0;) {
      const int64_t count = cut.count(part), length = cut.length(part);
      const bool end = part + 1 == cut.parts();
      const A* x = before + cut.first(part) * ld;
      if (cut.parts() > 1) read(call.u, row, call.L, cut.begin(part), length, count * T, u);
      read(made.grad, row, call.L, cut.begin(part), length, count * T, grad);
      product(Left<A>{grad, count, T, T, 1}, t.kernel, T, T, du, T, false);
      product(Left<A>{grad, count, T, T, 1}, t.out, ld, ld, lambdas, ld, false);
      if (end && made.after)
        through_after(s, cut.last(), made.after + row * 2 * M, u + (count - 1) * T, x + (count - 1) * ld, now, du + (count - 1) * T, g);
      for (int64_t k = count; k-- > 0;) {
        A *re = lambdas + k * ld, *im = re + M;
        const A *xr = x + k * ld, *xi = xr + M;
        const bool last = end && k + 1 == count;  // its state goes to `after` alone
        for (int64_t n = 0; n < M; ++n) {
          const double lr = last ? 0 : now.re[n], li = last ? 0 : now.im[n];
          const double qr = lr * ar[n] + li * ai[n], qi = li * ar[n] - lr * ai[n];
          g.zr[n] += double(T) * (qr * double(xr[n]) + qi * double(xi[n]));
          g.zi[n] += double(T) * (qi * double(xr[n]) - qr * double(xi[n]));
          now.re[n] = (last ? now.re[n] : qr) + double(re[n]), now.im[n] = (last ? now.im[n] : qi) + double(im[n]);
          re[n] = A(lr), im[n] = A(li);
        }
      }
      product(Left<A>{lambdas, count, 2 * M, ld, 1}, t.in, T, T, du, T, true);
      write(du, length, made.du, row, call.L, cut.begin(part));
      product(Left<A>{u, T, count, 1, T}, grad, T, T, found, T, false);
      product(Left<A>{u, T, count, 1, T}, lambdas, ld, ld, found + T * T, ld, false);
      product(Left<A>{grad, T, count, 1, T}, x, ld, ld, found + T * T + T * ld, ld, false);
      add_to(sums, found, tables);
    }
    if (made.state)
      for (int64_t n = 0; n < M; ++n) made.state[(row * M + n) * 2] = now.re[n], made.state[(row * M + n) * 2 + 1] = now.im[n];
  }
  chain(s, g, made, h);
}

W2S_KERNELS(SpaceKernels, forward<Real>, backward<Real>)

#include "cpu/target_end.h"
