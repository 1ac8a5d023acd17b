// K_l = 2 Re sum_n c_n e^{x_n l} of one feature, with l = R q + r: rows c e^{x R q} [q, 2 M] times columns e^{x r} [2 M, R],
// a product of 4 M operations a position out of L1, without a trigonometric call a position. Backward, with U = g [q, R]
// times the columns and times r of them: sum_l g_l e^{x l} = sum_q e^{x R q} U_q, and with l before g the same of R q U_q and
// the second product. Powers in double, by multiplication.
//
// States fade: with Delta log-uniform over 0.001 to 0.1 three fifths of all products at L = 16384 were with numbers below 1e-9
// of the feature's largest weight. States are sorted by how slowly they fade, and a product takes those that are not so small
// (in float32 alone, FADED). To leave some at either end, columns and rows hold the imaginary parts backwards, then the real ones.
#include "cpu/gemm.h"
#include "cpu/state_space/vandermonde_log.h"

#include "cpu/target_begin.h"

#include "cpu/state_space/powers_kernel.h"

constexpr int64_t BLOCK = 64, ROWS = 64;  // positions of a row, and rows of a product
constexpr int64_t FORWARD_ROWS = 12;      // of a product of forward, after which states may have faded
constexpr double FADED = 1e-9;            // of the largest weight: below the rounding of a sum in float32

constexpr int64_t LANES = 8;  // powers that are made at once

// e^{x BLOCK q} of the current row q, [M] each.
struct Row {
  double *re, *im;
  const double *step_re, *step_im;
  int64_t M;
  void begin() const { std::fill(re, re + M, 1.0), std::fill(im, im + M, 0.0); }
  void next() const {
    for (int64_t n = 0; n < M; ++n) {
      const double a = re[n], b = im[n];
      re[n] = a * step_re[n] - b * step_im[n], im[n] = a * step_im[n] + b * step_re[n];
    }
  }
};

template <class A>
inline void forward(const VandermondeCall& call, int64_t h, A* out) {
  const int64_t M = call.M, width = 2 * M, whole = call.L / BLOCK;
  double* few = scratch_of<double>(2, (2 * (LANES + 1) + 9) * M);  // e^{x j} [LANES + 1, M]
  double *few_im = few + (LANES + 1) * M, *step = few_im + (LANES + 1) * M, *step_im = step + M, *cr = step_im + 3 * M, *ci = cr + M;
  double *own = ci + M, *square = own + width;
  const Row row{step_im + M, step_im + 2 * M, step, step_im, M};
  A* columns = scratch_of<A>(3, (width + 1) * BLOCK + ROWS * width);
  A *last = columns + width * BLOCK, *rows = last + BLOCK;
  int64_t* order = scratch_of<int64_t>(4, M);
  const double* x = call.x + h * width;
  for (int64_t n = 0; n < M; ++n) {  // by insertion: S4D's states come sorted or all alike
    int64_t at = n;
    for (; at > 0 && x[2 * order[at - 1]] < x[2 * n]; --at) order[at] = order[at - 1];
    order[at] = n;
  }
  for (int64_t n = 0; n < M; ++n) own[2 * n] = x[2 * order[n]], own[2 * n + 1] = x[2 * order[n] + 1];
  powers(own, M, LANES + 1, few, few_im);
  A *const column_re = columns + M * BLOCK, *const column_im = column_re - BLOCK;
  for (int64_t n = 0; n < M; ++n) {
    double re[BLOCK], im[BLOCK];
    for (int64_t r = 0; r < LANES; ++r) re[r] = few[r * M + n], im[r] = few_im[r * M + n];
    const double br = few[LANES * M + n], bi = few_im[LANES * M + n];
    for (int64_t r = LANES; r < BLOCK; ++r) {
      re[r] = re[r - LANES] * br - im[r - LANES] * bi, im[r] = re[r - LANES] * bi + im[r - LANES] * br;
    }
    for (int64_t r = 0; r < BLOCK; ++r) column_re[n * BLOCK + r] = normal<A>(re[r]), column_im[r - n * BLOCK] = normal<A>(im[r]);
    const double* tail = re + BLOCK - LANES;
    step[n] = tail[0] * br - im[BLOCK - LANES] * bi, step_im[n] = tail[0] * bi + im[BLOCK - LANES] * br;
  }
  for (int64_t channel = 0; channel < call.C; ++channel) {
    const double* c = call.c + (channel * call.H + h) * width;
    double largest = 0;
    for (int64_t n = 0; n < M; ++n) {
      cr[n] = 2 * c[2 * order[n]], ci[n] = 2 * c[2 * order[n] + 1];
      square[n] = cr[n] * cr[n] + ci[n] * ci[n];
      largest = std::max(largest, square[n]);
    }
    const double least = sizeof(A) == 4 && largest < 1e300 ? FADED * FADED * largest : 0;
    A* to = out + (channel * call.H + h) * call.L;
    row.begin();
    int64_t live = M;
    const auto make = [&](int64_t count) {
      const auto faded = [&](int64_t n) { return square[n] * (row.re[n] * row.re[n] + row.im[n] * row.im[n]) < least; };
      while (live && faded(live - 1)) --live;  // a state before one that lasts is taken too
      const Row kept{row.re, row.im, row.step_re, row.step_im, live};
      for (int64_t i = 0; i < count; ++i, kept.next()) {
        A *re = rows + i * width + M, *im = re - 1;
        for (int64_t n = 0; n < live; ++n) {
          re[n] = normal<A>(cr[n] * row.re[n] - ci[n] * row.im[n]);
          im[-n] = normal<A>(-cr[n] * row.im[n] - ci[n] * row.re[n]);
        }
      }
    };
    const auto multiply = [&](int64_t count, A* result) {
      product(Left<A>{rows + M - live, count, 2 * live, width, 1}, columns + (M - live) * BLOCK, BLOCK, BLOCK, result, BLOCK, false);
    };
    for (int64_t q = 0; q < whole; q += FORWARD_ROWS) {
      const int64_t count = std::min(FORWARD_ROWS, whole - q);
      make(count);
      multiply(count, to + q * BLOCK);
    }
    if (whole * BLOCK == call.L) continue;
    make(1);
    multiply(1, last);
    std::copy(last, last + (call.L - whole * BLOCK), to + whole * BLOCK);
  }
}

template <class A>
inline void backward(const VandermondeCall& call, int64_t h, const A* grad, double* dc, double* dx) {
  const int64_t M = call.M, ld = round_up(4 * M, PAD), all = pieces(call.L, BLOCK);
  A* columns = scratch_of<A>(3, BLOCK * ld + BLOCK + ROWS * ld);
  A *last = columns + BLOCK * ld, *sums = last + BLOCK;
  double *re = scratch_of<double>(2, (2 * (BLOCK + 1) + 6) * M), *im = re + (BLOCK + 1) * M, *total = im + (BLOCK + 3) * M;
  const Row now{im + (BLOCK + 1) * M, im + (BLOCK + 2) * M, re + BLOCK * M, im + BLOCK * M, M};
  powers(call.x + h * M * 2, M, BLOCK + 1, re, im);
  for (int64_t r = 0; r < BLOCK; ++r) {
    A* to = columns + r * ld;
    for (int64_t n = 0; n < M; ++n) {
      const double pr = re[r * M + n], pi = im[r * M + n], at = double(r);
      to[n] = normal<A>(pr), to[M + n] = normal<A>(pi), to[2 * M + n] = normal<A>(at * pr), to[3 * M + n] = normal<A>(at * pi);
    }
    std::fill(to + 4 * M, to + ld, A(0));
  }
  dx += h * M * 2;
  for (int64_t channel = 0; channel < call.C; ++channel) {
    const int64_t row = channel * call.H + h;
    const double* c = call.c + row * M * 2;
    std::fill(total, total + 4 * M, 0.0);
    now.begin();
    for (int64_t q = 0; q < all; q += ROWS) {
      const int64_t count = std::min(ROWS, all - q), whole = std::min(count, call.L / BLOCK - q);
      const A* from = grad + row * call.L + q * BLOCK;
      product(Left<A>{from, whole, BLOCK, BLOCK, 1}, columns, ld, ld, sums, ld, false);
      if (whole < count) {
        std::fill(std::copy(from + whole * BLOCK, from + (call.L - q * BLOCK), last), last + BLOCK, A(0));
        product(Left<A>{last, 1, BLOCK, BLOCK, 1}, columns, ld, ld, sums + whole * ld, ld, false);
      }
      for (int64_t i = 0; i < count; ++i, now.next())
        for (int64_t n = 0; n < M; ++n) {
          const A* u = sums + i * ld + n;
          const double er = now.re[n], ei = now.im[n], ur = double(u[0]), ui = double(u[M]), at = double((q + i) * BLOCK);
          const double vr = double(u[2 * M]) + at * ur, vi = double(u[3 * M]) + at * ui;
          total[n] += er * ur - ei * ui, total[M + n] += er * ui + ei * ur;
          total[2 * M + n] += er * vr - ei * vi, total[3 * M + n] += er * vi + ei * vr;
        }
    }
    for (int64_t n = 0; n < M; ++n) {
      const double cr = c[2 * n], ci = c[2 * n + 1], vr = total[2 * M + n], vi = total[3 * M + n];
      dc[(row * M + n) * 2] = 2 * total[n], dc[(row * M + n) * 2 + 1] = -2 * total[M + n];
      dx[2 * n] += 2 * (cr * vr - ci * vi), dx[2 * n + 1] -= 2 * (cr * vi + ci * vr);
    }
  }
}

W2S_KERNELS(VandermondeKernels, forward<Real>, backward<Real>)

#include "cpu/target_end.h"
