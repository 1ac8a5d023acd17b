// One feature of the spectrum of A = diag(a) - p p*: with Cauchy sums at z = i y of w = dt a and of the weights
// pp = dt |p|^2, bp = dt b conj(p), and of each channel bc = dt b c, pc = dt p c,
//
//   k = (bc - bp pc / (1 + pp)) (1 + i y / 2), and at the last node of an even length sum_n Re bc_n
//
// Nodes are taken some hundred at a time: the sums of a tile stay in L1. Backward makes the sums again, then of the gradient
// g of k, with G = (1 - i y / 2) g and t = 1 / (1 + pp): G for bc, -conj(bp t) G for pc, -conj(pc t) G for bp and
// conj(bp pc t^2) G for pp. Tables, weights and their gradients in double.
#include "cpu/gemm.h"
#include "cpu/state_space/s4_spectrum.h"

#include "cpu/target_begin.h"

#include "cpu/state_space/cauchy_kernel.h"

constexpr int64_t NODES = 512;  // of a tile
enum Row { PP, BP, BC, PC };    // of the first channel's weights; those of others are BC and PC alone

struct Number {
  double re, im;
  Number operator*(Number o) const { return {re * o.re - im * o.im, re * o.im + im * o.re}; }
  Number operator+(Number o) const { return {re + o.re, im + o.im}; }
  Number operator*(double x) const { return {re * x, im * x}; }
  Number conj() const { return {re, -im}; }
  void add_to(double* to) const { to[0] += re, to[1] += im; }
};
W2S_INLINE Number at(const double* pairs, int64_t n) { return {pairs[2 * n], pairs[2 * n + 1]}; }

template <class A>
struct Feature {
  const SpectrumCall& call;
  int64_t h, M, padded;
  const double *a, *b, *p;
  double dt;
  A *y, *y_left, *poles;  // nodes, and a table of poles and weights a channel

  // the table of a channel: of four rows for the first, of two for others
  A* table(int64_t channel) const { return poles + (channel ? STEP<4> + (channel - 1) * STEP<2> : 0) * M; }
  const double* c(int64_t channel) const { return call.c + (channel * call.H + h) * M * 2; }
  Nodes<A> nodes(int64_t from) const { return {y + from, y_left + from}; }

  Feature(const SpectrumCall& call, int64_t h)
      : call(call), h(h), M(call.M), padded(round_up(call.nodes(), PAD)), a(call.a + h * M * 2), b(call.b + h * M * 2), p(call.p + h * M * 2),
        dt(call.dt[h]) {
    y = scratch_of<A>(2, 2 * padded + (STEP<4> + (call.C - 1) * STEP<2>) * M);
    y_left = y + padded, poles = y_left + padded;
    for (int64_t l = 0; l < padded; ++l) two_parts(call.y[std::min(l, call.nodes() - 1)], y + l, y_left + l);
    for (int64_t channel = 0; channel < call.C; ++channel)
      for (int64_t n = 0; n < M; ++n) {
        A* pole = table(channel) + n * (channel ? STEP<2> : STEP<4>);
        put_pole(pole, dt * a[2 * n], dt * a[2 * n + 1]);
        const Number weight = at(c(channel), n) * dt, bc = at(b, n) * weight, pc = at(p, n) * weight;
        if (channel) {
          put_weight(pole, 0, bc.re, bc.im), put_weight(pole, 1, pc.re, pc.im);
          continue;
        }
        const Number pp = at(p, n) * at(p, n).conj() * dt, bp = at(b, n) * at(p, n).conj() * dt;
        put_weight(pole, PP, pp.re, 0), put_weight(pole, BP, bp.re, bp.im);
        put_weight(pole, BC, bc.re, bc.im), put_weight(pole, PC, pc.re, pc.im);
      }
  }

  // rows PP, BP, then BC and PC of a channel, at `count` nodes
  void sums(int64_t channel, int64_t from, int64_t count, A* re, A* im) const {
    if (!channel) cauchy_sums<A, 4, true>(nodes(from), count, table(0), M, re, im, NODES);
    else cauchy_sums<A, 2>(nodes(from), count, table(channel), M, re + BC * NODES, im + BC * NODES, NODES);
  }

  A* row(A* out, int64_t channel) const { return out + (channel * call.H + h) * call.columns() * 2; }
};

template <class A>
inline void forward(const SpectrumCall& call, int64_t h, A* out) {
  const Feature<A> f(call, h);
  A* re = scratch_of<A>(3, 10 * NODES);
  A *im = re + 4 * NODES, *kr = im + 4 * NODES, *ki = kr + NODES;
  for (int64_t from = 0; from < call.nodes(); from += NODES) {
    const int64_t count = std::min(NODES, call.nodes() - from);
    for (int64_t channel = 0; channel < call.C; ++channel) {
      f.sums(channel, from, round_up(count, PAD), re, im);
      for (int64_t i = 0; i < count; ++i) {
        const A ur = 1 + re[i], ui = im[i], size = 1 / (ur * ur + ui * ui);
        const A *x = re + i, *z = im + i;
        const A mr = x[BP * NODES] * x[PC * NODES] - z[BP * NODES] * z[PC * NODES], mi = x[BP * NODES] * z[PC * NODES] + z[BP * NODES] * x[PC * NODES];
        const A r = x[BC * NODES] - (mr * ur + mi * ui) * size, s = z[BC * NODES] - (mi * ur - mr * ui) * size, half = f.y[from + i] / 2;
        kr[i] = r - half * s, ki[i] = s + half * r;
      }
      A* to = f.row(out, channel) + 2 * from;
      for (int64_t i = 0; i < count; ++i) to[2 * i] = kr[i], to[2 * i + 1] = ki[i];
    }
  }
  if (call.length % 2) return;
  for (int64_t channel = 0; channel < call.C; ++channel) {
    double last = 0;
    for (int64_t n = 0; n < f.M; ++n) last += (at(f.b, n) * at(f.c(channel), n)).re;
    A* to = f.row(out, channel) + 2 * call.nodes();
    to[0] = A(last * f.dt), to[1] = 0;
  }
}

// From the gradients of weights and poles to those of a feature's parameters.
template <class A>
inline void chain(const Feature<A>& f, const double* first, const double* others, const double* dw, const double* last, const SpectrumGradients& made) {
  const int64_t M = f.M, own = f.h * M * 2;
  double step = 0;
  for (int64_t n = 0; n < M; ++n) {
    const Number a = at(f.a, n), b = at(f.b, n), p = at(f.p, n), pole = at(dw, n), bp = at(first, 4 * n + BP);
    const double pp = at(first, 4 * n + PP).re;
    Number db = p * bp, dp = b * bp.conj() + p * (2 * pp);
    step += pp * (p * p.conj()).re + (a.conj() * pole + (b * p.conj()).conj() * bp).re;
    for (int64_t channel = 0; channel < f.call.C; ++channel) {
      const double* of = channel ? others + (channel - 1) * 4 * M : first;
      const int64_t place = channel ? 2 * n : 4 * n + BC;
      const Number c = at(f.c(channel), n), bc = at(of, place) + Number{last[channel], 0}, pc = at(of, place + 1);
      const Number dc = b.conj() * bc + p.conj() * pc;
      db = db + c.conj() * bc, dp = dp + c.conj() * pc;
      step += (c.conj() * dc).re;
      (dc * f.dt).add_to(made.c + (channel * f.call.H + f.h) * M * 2 + 2 * n);
    }
    (pole * f.dt).add_to(made.a + own + 2 * n), (db * f.dt).add_to(made.b + own + 2 * n), (dp * f.dt).add_to(made.p + own + 2 * n);
  }
  made.dt[f.h] = step;
}

template <class A>
inline void backward(const SpectrumCall& call, int64_t h, const SpectrumGradients& made) {
  const Feature<A> f(call, h);
  const int64_t M = f.M, C = call.C;
  A* re = scratch_of<A>(3, 16 * NODES);
  A *im = re + 4 * NODES, *gr = im + 4 * NODES, *gi = gr + 4 * NODES;
  double* first = scratch_of<double>(5, M * (8 + 4 * (C - 1) + 2) + C);
  double *others = first + 8 * M, *dw = others + (C - 1) * 4 * M, *last = dw + 2 * M;
  std::fill(first, last + C, 0.0);
  for (int64_t from = 0; from < call.nodes(); from += NODES) {
    const int64_t count = std::min(NODES, call.nodes() - from), whole = round_up(count, PAD);
    std::fill(gr, gr + 8 * NODES, A(0));
    for (int64_t channel = C; channel-- > 0;) {  // the first last: the gradients of PP and BP are then whole
      if (channel == C - 1 || !channel) f.sums(0, from, whole, re, im);
      if (channel) f.sums(channel, from, whole, re, im);
      const A* grad = f.row(static_cast<A*>(const_cast<void*>(made.grad)), channel) + 2 * from;
      for (int64_t i = 0; i < count; ++i) {
        const A half = f.y[from + i] / 2, br = grad[2 * i], bi = grad[2 * i + 1];
        const A Gr = br + half * bi, Gi = bi - half * br;
        const A ur = 1 + re[i], ui = im[i], size = 1 / (ur * ur + ui * ui), tr = ur * size, ti = -ui * size;
        const A *x = re + i, *z = im + i;
        const A xr = x[BP * NODES] * tr - z[BP * NODES] * ti, xi = x[BP * NODES] * ti + z[BP * NODES] * tr;  // bp t
        const A wr = x[PC * NODES] * tr - z[PC * NODES] * ti, wi = x[PC * NODES] * ti + z[PC * NODES] * tr;  // pc t
        const A sr = -(xr * Gr + xi * Gi), si = -(xr * Gi - xi * Gr);
        gr[BC * NODES + i] = Gr, gi[BC * NODES + i] = Gi, gr[PC * NODES + i] = sr, gi[PC * NODES + i] = si;
        gr[BP * NODES + i] -= wr * Gr + wi * Gi, gi[BP * NODES + i] -= wr * Gi - wi * Gr;
        gr[i] -= wr * sr + wi * si, gi[i] -= wr * si - wi * sr;
      }
      const Nodes<A> z = f.nodes(from);
      if (channel)
        cauchy_adjoint<A, 2>(z, whole, f.table(channel), M, gr + BC * NODES, gi + BC * NODES, NODES, others + (channel - 1) * 4 * M, dw);
      else cauchy_adjoint<A, 4, true>(z, whole, f.table(0), M, gr, gi, NODES, first, dw);
    }
  }
  if (call.length % 2 == 0)
    for (int64_t channel = 0; channel < C; ++channel)
      last[channel] = double(f.row(static_cast<A*>(const_cast<void*>(made.grad)), channel)[2 * call.nodes()]);
  chain(f, first, others, dw, last, made);
}

W2S_KERNELS(SpectrumKernels, forward<Real>, backward<Real>)

#include "cpu/target_end.h"
