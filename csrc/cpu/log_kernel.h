// Included once a target (no include guard): logarithms of rows.

// log x for x >= 0: 0 gives -infinity. s = (m - 1) / (m + 1) of the mantissa in [sqrt(1/2), sqrt 2), then the series of
// 2 atanh s, whose first left-out term is below 2^-28.
W2S_INLINE Vec<float> vlog(Vec<float> x) {
  using F = decltype(x.v);
  typedef int32_t I __attribute__((vector_size(sizeof(F))));
  const F zero = {}, y = x.v;
  const I small = y < zero + 1.17549435e-38f;
  const F scaled = small ? y * 8388608.0f : y;
  const I shifted = (I)scaled - 0x3f3504f3, e = (shifted >> 23) - (small ? I{} + 23 : I{});
  const F m = (F)((shifted & 0x007fffff) + 0x3f3504f3);
  const F s = (m - 1.0f) / (m + 1.0f), z = s * s;
  const F tail = z * (0.333333333f + z * (0.2f + z * (0.142857143f + z * 0.111111111f)));
  const F exponent = __builtin_convertvector(e, F);
  const F log = exponent * 0.693359375f + (2 * s + (2 * s * tail - exponent * 2.12194440e-4f));
  const F none = y == zero ? zero - std::numeric_limits<float>::infinity() : zero + std::numeric_limits<float>::quiet_NaN();
  return {y > zero ? log : none};
}

// log in place; n a multiple of a vector
inline void log_row(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += Vec<float>::W) vlog(Vec<float>::load(x + i)).store(x + i);
}
inline void log_row(double* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = std::log(x[i]);
}
