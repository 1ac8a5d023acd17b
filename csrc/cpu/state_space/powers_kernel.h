// Included once a target (no include guard): powers of e^z of the states of a feature, in double, and products of small tables
// that stay in L1.

// c = a b (+ c) for rows ROWS and columns VECTORS
template <class A, int ROWS, int VECTORS>
W2S_INLINE void block(const A* a, int64_t down, int64_t across, int64_t depth, const A* b, int64_t ldb, A* c, int64_t ldc, bool add) {
  using V = Vec<A>;
  V sum[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) sum[r][v] = V::set(0);
  for (int64_t k = 0; k < depth; ++k) {
    V row[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) row[v] = V::load(b + k * ldb + v * V::W);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const V one = V::set(a[r * down + k * across]);
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = V::fma(one, row[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      A* to = c + r * ldc + v * V::W;
      (add ? sum[r][v] + V::load(to) : sum[r][v]).store(to);
    }
}

template <class A>
struct Left {  // a matrix by its strides
  const A* data;
  int64_t rows, depth, down, across;
};

template <class A, int VECTORS>
inline void panel(const Left<A>& a, const A* b, int64_t ldb, A* c, int64_t ldc, bool add) {
  int64_t r = 0;
  const auto run = [&]<int ROWS>() {
    for (; r + ROWS <= a.rows; r += ROWS)
      block<A, ROWS, VECTORS>(a.data + r * a.down, a.down, a.across, a.depth, b, ldb, c + r * ldc, ldc, add);
  };
  run.template operator()<6>(), run.template operator()<4>(), run.template operator()<2>(), run.template operator()<1>();
}

// c [a.rows, columns] = a b (+ c); columns are a multiple of the vector
template <class A>
inline void product(const Left<A>& a, const A* b, int64_t ldb, int64_t columns, A* c, int64_t ldc, bool add) {
  constexpr int64_t W = Vec<A>::W;
  constexpr int WIDE = W == 16 ? 4 : 2;
  int64_t j = 0;
  const auto run = [&]<int VECTORS>() {
    for (; j + VECTORS * W <= columns; j += VECTORS * W) panel<A, VECTORS>(a, b + j, ldb, c + j, ldc, add);
  };
  run.template operator()<WIDE>();
  if constexpr (WIDE == 4) run.template operator()<2>();
  run.template operator()<1>();
}

// cos and sin of x for |x| up to some millions, to 2^-50: Taylor sums of a quarter of the angle, doubled twice.
template <class V>
W2S_INLINE void turn(V x, V& cosine, V& sine) {
  constexpr double C[] = {-1.5619206968586226e-16, 4.779477332387385e-14, -1.1470745597729725e-11, 2.08767569878681e-09,
                          -2.755731922398589e-07,  2.48015873015873e-05,  -0.001388888888888889,   0.041666666666666664, -0.5};
  constexpr double S[] = {-8.22063524662433e-18,  2.8114572543455206e-15, -7.647163731819816e-13, 1.6059043836821613e-10, -2.505210838544172e-08,
                          2.7557319223985893e-06, -0.0001984126984126984, 0.008333333333333333,   -0.16666666666666666};
  const V n = (x * V::set(0.15915494309189535)).round();
  // 2 pi in three parts, two of them of 29 bits: their products with n are exact
  const V a = V::set(0.25) * (((x - n * V::set(6.283185303211212)) - n * V::set(3.968374309715195e-09)) - n * V::set(9.00696709662487e-18));
  const V s = a * a;
  V c = V::set(C[0]), q = V::set(S[0]);
  for (int i = 1; i < 9; ++i) c = V::fma(c, s, V::set(C[i])), q = V::fma(q, s, V::set(S[i]));
  c = V::fma(c, s, V::set(1)), q = V::fma(q * s, a, a);
  for (int twice = 0; twice < 2; ++twice) {
    const V next = c * c - q * q;
    q = V::set(2) * c * q, c = next;
  }
  cosine = c, sine = q;
}

// re and im [count, M]: e^{z j} of z [M, 2] for j from 0
inline void powers(const double* z, int64_t M, int64_t count, double* re, double* im) {
  using V = Vec<double>;
  for (int64_t n = 0; n < M; ++n) re[n] = 1, im[n] = 0;
  if (count < 2) return;
  double *once_re = re + M, *once_im = im + M, angle[V::W], cosine[V::W], sine[V::W];
  for (int64_t n0 = 0; n0 < M; n0 += V::W) {
    const int64_t lanes = std::min<int64_t>(V::W, M - n0);
    bool far = false;
    for (int64_t i = 0; i < V::W; ++i) angle[i] = z[2 * (n0 + std::min(i, lanes - 1)) + 1], far |= !(std::abs(angle[i]) < 1e6);
    V c, s;
    turn(V::load(angle), c, s);
    c.store(cosine), s.store(sine);
    for (int64_t i = 0; i < lanes; ++i) {
      if (far) cosine[i] = std::cos(angle[i]), sine[i] = std::sin(angle[i]);
      const double size = std::exp(z[2 * (n0 + i)]);
      once_re[n0 + i] = size * cosine[i], once_im[n0 + i] = size * sine[i];
    }
  }
  for (int64_t j = 2; j < count; ++j)
    for (int64_t n = 0; n < M; ++n) {
      const double a = re[(j - 1) * M + n], b = im[(j - 1) * M + n];
      re[j * M + n] = a * once_re[n] - b * once_im[n];
      im[j * M + n] = a * once_im[n] + b * once_re[n];
    }
}

struct Powers {  // e^{z j}, [T + 1, M] each
  double *re, *im;
  int64_t M;
};

// numbers below the smallest normal one would cost a hundred times their arithmetic. By bits: of a comparison of doubles GCC
// makes a jump, which keeps loops of this from being vectors
template <class A>
W2S_INLINE A normal(double x) {
  constexpr uint64_t least = __builtin_bit_cast(uint64_t, double(std::numeric_limits<A>::min()));
  const uint64_t bits = __builtin_bit_cast(uint64_t, x);
  const uint64_t keep = -uint64_t((bits & 0x7fffffffffffffff) >= least);
  return A(__builtin_bit_cast(double, bits & keep));
}
