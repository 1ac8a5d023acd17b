// Included once a target (no include guard): sums c = sum_n v_n / (z - w_n) + conj(v_n) / (z - conj(w_n)) of some rows of
// weights, which share the reciprocals, and their adjoint. With z - w = d + i e and z - conj(w) = d + i f,
//
//   1 / (z - w) = p - i q,  p = d a, q = e a, a = 1 / (d^2 + e^2), and so with f: P - i Q
//   Re c += v_r (p + P) + v_i (q - Q),  Im c += v_i (p - P) - v_r (q + Q)
//
// The fractions stay two: one over a common denominator loses digits. Of each pair of poles w is the upper one, so that f
// cancels nothing; e is a difference of numbers in two parts, so that a node next to a pole has its digits. Sums are in
// the accumulating type. Nodes lie in lanes, one vector at a time: with weights taken from memory as they are multiplied, 30
// instructions a vector and pole of four rows, and what a Zen 4 core issues is what it waits for.

// Nodes z = i y up to a multiple of PAD, in two parts: the second is what is left of the first.
template <class A>
struct Nodes {
  const A *y, *y_left;
};

// A table's numbers of a pole: d = -w_r, its square, |w_i|, what is left of it, and the sign of w_i; behind them of each row's
// weight d v_r, v_i, d v_i, -v_r.
enum Pole { SIDE, SQUARE, IM, IM_LEFT, SIGN, POLE };
template <int ROWS>
constexpr int64_t STEP = POLE + 4 * ROWS;

template <class A>
W2S_INLINE void two_parts(double x, A* first, A* left) {
  *first = A(x), *left = A(x - double(*first));
}

template <class A>
W2S_INLINE void put_pole(A* pole, double re, double im) {
  two_parts(std::abs(im), pole + IM, pole + IM_LEFT);
  pole[SIDE] = A(-re), pole[SQUARE] = A(re * re), pole[SIGN] = im < 0 ? A(-1) : A(1);
}

template <class A>
W2S_INLINE void put_weight(A* pole, int row, double re, double im) {
  A* to = pole + POLE + 4 * row;
  const double up = double(pole[SIGN]) * im, d = double(pole[SIDE]);
  to[0] = A(d * re), to[1] = A(up), to[2] = A(d * up), to[3] = A(-re);
}

// Of V::W nodes at i and a pole.
template <class V>
struct Fractions {
  V a, b, q, Q;
  template <class A>
  W2S_INLINE Fractions(const Nodes<A>& z, int64_t i, const A* pole) {
    const V y = V::load(z.y + i), e = (y - V::set(pole[IM])) + (V::load(z.y_left + i) - V::set(pole[IM_LEFT])), f = y + V::set(pole[IM]);
    const V square = V::set(pole[SQUARE]);
    a = V::set(1) / V::fma(e, e, square), b = V::set(1) / V::fma(f, f, square);
    q = e * a, Q = f * b;
  }
};

// re and im [ROWS, ld] at nodes [0, count), a multiple of PAD; the first row's weights are real where REAL says so
template <class A, int ROWS, bool REAL = false>
inline void cauchy_sums(const Nodes<A>& z, int64_t count, const A* poles, int64_t M, A* re, A* im, int64_t ld) {
  using V = Vec<A>;
  for (int64_t i = 0; i < count; i += V::W) {
    V real[ROWS], imag[ROWS];
    for (int r = 0; r < ROWS; ++r) real[r] = imag[r] = V::set(0);
    for (const A *pole = poles, *end = poles + M * STEP<ROWS>; pole < end; pole += STEP<ROWS>) {
      const Fractions<V> f(z, i, pole);
      const V sum_p = f.a + f.b, less_p = f.a - f.b, sum_q = f.q + f.Q, less_q = f.q - f.Q;
      for (int r = 0; r < ROWS; ++r) {
        const A* weight = pole + POLE + 4 * r;
        real[r] = V::fma(sum_p, V::set(weight[0]), real[r]), imag[r] = V::fma(sum_q, V::set(weight[3]), imag[r]);
        if (REAL && r == 0) continue;
        real[r] = V::fma(less_q, V::set(weight[1]), real[r]), imag[r] = V::fma(less_p, V::set(weight[2]), imag[r]);
      }
    }
    for (int r = 0; r < ROWS; ++r) real[r].store(re + r * ld + i), imag[r].store(im + r * ld + i);
  }
}

// With g the gradients of the rows, dv_n = sum_l g conj(1 / (z - w)) + conj(g) / (z - conj(w)), and
// dw_n = sum_rows conj(v_n) sum_l g conj(1 / (z - w))^2 + conj(g) / (z - conj(w))^2: += to dv [M, ROWS, 2] and dw [M, 2].
// Behind the last node g is 0.
template <class A, int ROWS, bool REAL = false>
inline void cauchy_adjoint(const Nodes<A>& z, int64_t count, const A* poles, int64_t M, const A* re, const A* im, int64_t ld, double* dv,
                           double* dw) {
  using V = Vec<A>;
  const V zero = V::set(0);
  for (int64_t n = 0; n < M; ++n) {
    const A* pole = poles + n * STEP<ROWS>;
    const V d = V::set(pole[SIDE]);
    V sum[ROWS][4];  // of dv, and of the squares
    for (int r = 0; r < ROWS; ++r)
      for (int k = 0; k < 4; ++k) sum[r][k] = zero;
    for (int64_t i = 0; i < count; i += V::W) {
      const Fractions<V> f(z, i, pole);
      const V p = d * f.a, P = d * f.b, sum_p = p + P, less_p = p - P, minus_q = zero - (f.q + f.Q), less_q = f.q - f.Q;
      // of (p + i q)^2 and (P - i Q)^2
      const V k = (p - f.q) * (p + f.q), K = (P - f.Q) * (P + f.Q), j = (p + p) * f.q, J = (P + P) * f.Q;
      const V square_p = k + K, apart_p = k - K, minus_j = zero - (j + J), apart_q = j - J;
      for (int r = 0; r < ROWS; ++r) {
        const V gr = V::load(re + r * ld + i), gi = V::load(im + r * ld + i);
        sum[r][0] = V::fma(gi, minus_q, V::fma(gr, sum_p, sum[r][0]));
        sum[r][2] = V::fma(gi, minus_j, V::fma(gr, square_p, sum[r][2]));
        if (!(REAL && r == 0)) sum[r][1] = V::fma(gi, less_p, V::fma(gr, less_q, sum[r][1]));
        sum[r][3] = V::fma(gi, apart_p, V::fma(gr, apart_q, sum[r][3]));
      }
    }
    const double sign = double(pole[SIGN]);
    for (int r = 0; r < ROWS; ++r) {
      A four[4];
      V::sum4(sum[r][0], sum[r][1], sum[r][2], sum[r][3], four);
      const double vr = -double(pole[POLE + 4 * r + 3]), vi = double(pole[POLE + 4 * r + 1]), tr = double(four[2]), ti = double(four[3]);
      dv[(n * ROWS + r) * 2] += double(four[0]), dv[(n * ROWS + r) * 2 + 1] += sign * double(four[1]);
      dw[2 * n] += vr * tr + vi * ti, dw[2 * n + 1] += sign * (vr * ti - vi * tr);
    }
  }
}
