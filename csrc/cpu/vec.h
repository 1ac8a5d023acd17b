// Vectors for the CPU kernels, and the choice of instruction set at run time.
//
// A kernel is templates over Vec<float> or Vec<double>, compiled once a copy (kernels.h). No -march flag is needed: each
// copy stands inside `#pragma GCC target`, so that code of the standard library in the same source stays code for any
// machine. W2S_FAST_CPU=portable|avx2|avx512 caps the choice (for tests).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

#if (defined(__x86_64__) || defined(_M_X64)) && defined(__GNUC__)
#define W2S_X86 1
#include <immintrin.h>
#else
#define W2S_X86 0
#endif

#define W2S_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define W2S_TARGET_BEGIN(isa) W2S_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define W2S_TARGET_END W2S_PRAGMA(clang attribute pop)
#else
#define W2S_TARGET_BEGIN(isa) W2S_PRAGMA(GCC push_options) W2S_PRAGMA(GCC target(isa))
#define W2S_TARGET_END W2S_PRAGMA(GCC pop_options)
#endif
#define W2S_AVX512 "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2,popcnt"
#define W2S_AVX2 "avx2,fma,f16c,bmi2,popcnt"
#define W2S_INLINE inline __attribute__((always_inline))

namespace w2s {

enum class Isa { portable, avx2, avx512 };

inline Isa detect_isa() {
#if W2S_X86
  const char* cap = std::getenv("W2S_FAST_CPU");
  const bool portable = cap && !std::strcmp(cap, "portable"), avx2 = cap && !std::strcmp(cap, "avx2");
  __builtin_cpu_init();
  const bool has2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool has512 = has2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has512 && !portable && !avx2) return Isa::avx512;
  if (has2 && !portable) return Isa::avx2;
#endif
  return Isa::portable;
}

inline Isa isa() {
  static const Isa found = detect_isa();
  return found;
}

// Element types of a tensor, and scalar widening.
enum class Dtype : int8_t { f32, bf16, f16, f64 };

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }
template <class A>
constexpr Dtype own_dtype = sizeof(A) == 8 ? Dtype::f64 : Dtype::f32;

W2S_INLINE float bf16_to_float(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

W2S_INLINE uint16_t float_to_bf16(float x) {  // round to nearest even, NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40u);
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float half_to_float(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000u) << 16, magnitude = x & 0x7fffu;
  if (magnitude < 0x0400u) {  // zero and subnormals
    const float y = float(magnitude) * 5.9604644775390625e-8f;
    return sign ? -y : y;
  }
  const uint32_t bits = sign | (magnitude >= 0x7c00u ? 0x7f800000u | (magnitude & 0x3ffu) << 13 : (magnitude << 13) + 0x38000000u);
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

inline uint16_t float_to_half(float x) {  // round to nearest even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  const uint32_t a = bits & 0x7fffffffu;
  if (a > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (a >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
  if (a < 0x38800000u) {  // subnormal result: the float adder rounds it
    float y;
    std::memcpy(&y, &a, 4);
    y += 0.5f;
    uint32_t r;
    std::memcpy(&r, &y, 4);
    return uint16_t(sign | (r - 0x3f000000u));
  }
  return uint16_t(sign | ((a + 0xc8000fffu + ((a >> 13) & 1u)) >> 13));
}

// ---------------------------------------------------------------- vectors any compiler with GCC's extension can lower
template <class T, int N>
struct VectorExtension {
  using Scalar = T;
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T Raw __attribute__((vector_size(N * sizeof(T))));
  typedef Int IntRaw __attribute__((vector_size(N * sizeof(T))));
  static constexpr int W = N;
  static constexpr bool scale_underflows = false;
  struct Mask {
    IntRaw m;
    W2S_INLINE Mask operator|(Mask o) const { return {m | o.m}; }
    W2S_INLINE Mask operator&(Mask o) const { return {m & o.m}; }
    W2S_INLINE uint32_t bits() const {
      uint32_t b = 0;
      for (int i = 0; i < N; ++i) b |= uint32_t(m[i] != 0) << i;
      return b;
    }
    W2S_INLINE bool any() const {
      Int b = 0;
      for (int i = 0; i < N; ++i) b |= m[i];
      return b != 0;
    }
    static W2S_INLINE Mask none() { return {IntRaw{}}; }
  };
  Raw v;
  static W2S_INLINE VectorExtension set(T x) { return {Raw{} + x}; }
  static W2S_INLINE VectorExtension load(const T* p) {
    VectorExtension r;
    std::memcpy(&r.v, p, sizeof(Raw));
    return r;
  }
  static W2S_INLINE VectorExtension load_first(const T* p, int n) {  // lanes past n: 0
    VectorExtension r = set(0);
    for (int i = 0; i < n; ++i) r.v[i] = p[i];
    return r;
  }
  W2S_INLINE void store(T* p) const { std::memcpy(p, &v, sizeof(Raw)); }
  W2S_INLINE VectorExtension operator+(VectorExtension o) const { return {v + o.v}; }
  W2S_INLINE VectorExtension operator-(VectorExtension o) const { return {v - o.v}; }
  W2S_INLINE VectorExtension operator*(VectorExtension o) const { return {v * o.v}; }
  W2S_INLINE VectorExtension operator/(VectorExtension o) const { return {v / o.v}; }
  // a * b + c, rounded once where the machine can
  static W2S_INLINE VectorExtension fma(VectorExtension a, VectorExtension b, VectorExtension c) { return {a.v * b.v + c.v}; }
  // a > b ? a : b: a NaN in `a` is dropped, one in `b` stays
  static W2S_INLINE VectorExtension max(VectorExtension a, VectorExtension b) { return {a.v > b.v ? a.v : b.v}; }
  static W2S_INLINE VectorExtension min(VectorExtension a, VectorExtension b) { return {a.v < b.v ? a.v : b.v}; }
  W2S_INLINE VectorExtension root() const {
    VectorExtension r;
    for (int i = 0; i < N; ++i) r.v[i] = std::sqrt(v[i]);
    return r;
  }
  W2S_INLINE VectorExtension abs() const { return {v < 0 ? -v : v}; }
  static W2S_INLINE Mask gt(VectorExtension a, VectorExtension b) { return {a.v > b.v}; }
  static W2S_INLINE Mask ge(VectorExtension a, VectorExtension b) { return {a.v >= b.v}; }
  static W2S_INLINE Mask eq(VectorExtension a, VectorExtension b) { return {a.v == b.v}; }
  static W2S_INLINE Mask nle(VectorExtension a, VectorExtension b) { return {~(a.v <= b.v)}; }  // also true for NaN
  static W2S_INLINE Mask nan(VectorExtension a) { return {a.v != a.v}; }
  static W2S_INLINE VectorExtension select(Mask m, VectorExtension a, VectorExtension b) { return {m.m ? a.v : b.v}; }
  W2S_INLINE VectorExtension round() const {  // to nearest, |x| < 2^(mantissa - 2)
    const T magic = sizeof(T) == 4 ? T(12582912.0f) : T(6755399441055744.0);
    Raw shifted = v + magic;
    __asm__("" : "+m"(shifted));  // keeps the two additions apart
    return {shifted - magic};
  }
  static W2S_INLINE VectorExtension scale(VectorExtension a, VectorExtension n) {  // a 2^n, n integral in the exponent's range
    constexpr int bias = sizeof(T) == 4 ? 127 : 1023, shift = sizeof(T) == 4 ? 23 : 52;
    const IntRaw e = (__builtin_convertvector(n.v, IntRaw) + bias) << shift;
    Raw f;
    std::memcpy(&f, &e, sizeof(f));
    return {a.v * f};
  }
  W2S_INLINE T sum() const {
    T s[N];
    store(s);
    for (int h = N / 2; h; h /= 2)
      for (int i = 0; i < h; ++i) s[i] += s[i + h];
    return s[0];
  }
  static W2S_INLINE void sum4(VectorExtension a, VectorExtension b, VectorExtension c, VectorExtension d, T* out) {
    out[0] = a.sum();
    out[1] = b.sum();
    out[2] = c.sum();
    out[3] = d.sum();
  }
  W2S_INLINE T top() const {
    T s = v[0];
    for (int i = 1; i < N; ++i) s = v[i] > s ? v[i] : s;
    return s;
  }
  // lanes of m, packed; returns how many
  static W2S_INLINE int compress(T* values, int32_t* index, VectorExtension a, int32_t first, Mask m) {
    int n = 0;
    for (int i = 0; i < N; ++i) {
      values[n] = a.v[i];
      index[n] = first + i;
      n += m.m[i] != 0;
    }
    return n;
  }
  static constexpr bool EXPANDS = false;  // expand and load_lanes are there
  template <class I>
  static W2S_INLINE VectorExtension gather(const T* p, const I* index) {
    VectorExtension r;
    for (int i = 0; i < N; ++i) r.v[i] = p[index[i]];
    return r;
  }
  template <class I>
  static W2S_INLINE VectorExtension gather_first(const T* p, const I* index, int n) {  // lanes past n: 0
    VectorExtension r = set(0);
    for (int i = 0; i < n; ++i) r.v[i] = p[index[i]];
    return r;
  }
  static W2S_INLINE VectorExtension row_sums(const T* rows) {  // lane i: the sum of rows[i N .. i N + N)
    VectorExtension r;
    for (int i = 0; i < N; ++i) r.v[i] = load(rows + i * N).sum();
    return r;
  }
  static W2S_INLINE void transpose(VectorExtension (&r)[N]) {  // rows become columns
    for (int i = 0; i < N; ++i)
      for (int j = 0; j < i; ++j) {
        const T x = r[i].v[j];
        r[i].v[j] = r[j].v[i];
        r[j].v[i] = x;
      }
  }
  static W2S_INLINE VectorExtension load_bf16(const uint16_t* p) {
    VectorExtension r;
    for (int i = 0; i < N; ++i) r.v[i] = T(bf16_to_float(p[i]));
    return r;
  }
  static W2S_INLINE VectorExtension load_f16(const uint16_t* p) {
    VectorExtension r;
    for (int i = 0; i < N; ++i) r.v[i] = T(half_to_float(p[i]));
    return r;
  }
  W2S_INLINE void store_bf16(uint16_t* p) const {
    for (int i = 0; i < N; ++i) p[i] = float_to_bf16(float(v[i]));
  }
  W2S_INLINE void store_f16(uint16_t* p) const {
    for (int i = 0; i < N; ++i) p[i] = float_to_half(float(v[i]));
  }
};

}  // namespace w2s

#if W2S_X86
#include "vec_x86.h"
#endif
