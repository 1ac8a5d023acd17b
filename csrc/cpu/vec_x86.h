// Vec<float> in intrinsics: AVX-512 (16 lanes) and AVX2 + FMA (8 lanes). Same members as VectorExtension in vec.h.
#pragma once

W2S_TARGET_BEGIN(W2S_AVX512)
namespace w2s::avx512 {

struct Float {
  using Scalar = float;
  static constexpr int W = 16;
  static constexpr bool scale_underflows = true;  // scale() rounds to 0 past the exponent's range
  struct Mask {
    __mmask16 m;
    W2S_INLINE Mask operator|(Mask o) const { return {__mmask16(m | o.m)}; }
    W2S_INLINE Mask operator&(Mask o) const { return {__mmask16(m & o.m)}; }
    W2S_INLINE uint32_t bits() const { return m; }
    W2S_INLINE bool any() const { return m != 0; }
    static W2S_INLINE Mask none() { return {0}; }
  };
  __m512 v;
  static W2S_INLINE Float set(float x) { return {_mm512_set1_ps(x)}; }
  static W2S_INLINE Float load(const float* p) { return {_mm512_loadu_ps(p)}; }
  W2S_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  W2S_INLINE Float operator+(Float o) const { return {_mm512_add_ps(v, o.v)}; }
  W2S_INLINE Float operator-(Float o) const { return {_mm512_sub_ps(v, o.v)}; }
  W2S_INLINE Float operator*(Float o) const { return {_mm512_mul_ps(v, o.v)}; }
  W2S_INLINE Float operator/(Float o) const { return {_mm512_div_ps(v, o.v)}; }
  static W2S_INLINE Float fma(Float a, Float b, Float c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static W2S_INLINE Float max(Float a, Float b) { return {_mm512_max_ps(a.v, b.v)}; }
  static W2S_INLINE Float min(Float a, Float b) { return {_mm512_min_ps(a.v, b.v)}; }
  W2S_INLINE Float abs() const { return {_mm512_abs_ps(v)}; }
  static W2S_INLINE Mask gt(Float a, Float b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
  static W2S_INLINE Mask ge(Float a, Float b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
  static W2S_INLINE Mask eq(Float a, Float b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
  static W2S_INLINE Mask nle(Float a, Float b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ)}; }
  static W2S_INLINE Mask nan(Float a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
  static W2S_INLINE Float select(Mask m, Float a, Float b) { return {_mm512_mask_blend_ps(m.m, b.v, a.v)}; }
  W2S_INLINE Float round() const { return {_mm512_roundscale_ps(v, 8)}; }
  static W2S_INLINE Float scale(Float a, Float n) { return {_mm512_scalef_ps(a.v, n.v)}; }
  W2S_INLINE float sum() const { return _mm512_reduce_add_ps(v); }
  // sums of four vectors to out[0..3]: a third of the shuffles of four sum()
  static W2S_INLINE void sum4(Float a, Float b, Float c, Float d, float* out) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
    const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }
  W2S_INLINE float top() const { return _mm512_reduce_max_ps(v); }
  static W2S_INLINE int compress(float* values, int32_t* index, Float a, int32_t first, Mask m) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    // a compress in registers and a full store: the compressing store is microcoded on some CPUs
    _mm512_storeu_ps(values, _mm512_maskz_compress_ps(m.m, a.v));
    _mm512_storeu_si512(index, _mm512_maskz_compress_epi32(m.m, _mm512_add_epi32(lane, _mm512_set1_epi32(first))));
    return __builtin_popcount(m.m);
  }
  static W2S_INLINE Float load_bf16(const uint16_t* p) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
  }
  static W2S_INLINE Float load_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
};

}  // namespace w2s::avx512
W2S_TARGET_END

W2S_TARGET_BEGIN(W2S_AVX2)
namespace w2s::avx2 {

struct Float {
  using Scalar = float;
  static constexpr int W = 8;
  static constexpr bool scale_underflows = false;
  struct Mask {
    __m256 m;
    W2S_INLINE Mask operator|(Mask o) const { return {_mm256_or_ps(m, o.m)}; }
    W2S_INLINE Mask operator&(Mask o) const { return {_mm256_and_ps(m, o.m)}; }
    W2S_INLINE uint32_t bits() const { return uint32_t(_mm256_movemask_ps(m)); }
    W2S_INLINE bool any() const { return _mm256_movemask_ps(m) != 0; }
    static W2S_INLINE Mask none() { return {_mm256_setzero_ps()}; }
  };
  __m256 v;
  static W2S_INLINE Float set(float x) { return {_mm256_set1_ps(x)}; }
  static W2S_INLINE Float load(const float* p) { return {_mm256_loadu_ps(p)}; }
  W2S_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  W2S_INLINE Float operator+(Float o) const { return {_mm256_add_ps(v, o.v)}; }
  W2S_INLINE Float operator-(Float o) const { return {_mm256_sub_ps(v, o.v)}; }
  W2S_INLINE Float operator*(Float o) const { return {_mm256_mul_ps(v, o.v)}; }
  W2S_INLINE Float operator/(Float o) const { return {_mm256_div_ps(v, o.v)}; }
  static W2S_INLINE Float fma(Float a, Float b, Float c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static W2S_INLINE Float max(Float a, Float b) { return {_mm256_max_ps(a.v, b.v)}; }
  static W2S_INLINE Float min(Float a, Float b) { return {_mm256_min_ps(a.v, b.v)}; }
  W2S_INLINE Float abs() const { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), v)}; }
  static W2S_INLINE Mask gt(Float a, Float b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
  static W2S_INLINE Mask ge(Float a, Float b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)}; }
  static W2S_INLINE Mask eq(Float a, Float b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
  static W2S_INLINE Mask nle(Float a, Float b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_NLE_UQ)}; }
  static W2S_INLINE Mask nan(Float a) { return {_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)}; }
  static W2S_INLINE Float select(Mask m, Float a, Float b) { return {_mm256_blendv_ps(b.v, a.v, m.m)}; }
  W2S_INLINE Float round() const { return {_mm256_round_ps(v, 8)}; }
  static W2S_INLINE Float scale(Float a, Float n) {
    const __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
    return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(e))};
  }
  static W2S_INLINE void sum4(Float a, Float b, Float c, Float d, float* out) {
    const __m256 ab = _mm256_hadd_ps(a.v, b.v), cd = _mm256_hadd_ps(c.v, d.v), all = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
  }
  W2S_INLINE float sum() const {
    const __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 b = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
  }
  W2S_INLINE float top() const {
    const __m128 a = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 b = _mm_max_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
  }
  static W2S_INLINE int compress(float* values, int32_t* index, Float a, int32_t first, Mask m) {
    float lane[W];
    a.store(lane);
    int n = 0;
    for (uint32_t b = m.bits(); b; b &= b - 1, ++n) {
      const int i = __builtin_ctz(b);
      values[n] = lane[i];
      index[n] = first + i;
    }
    return n;
  }
  static W2S_INLINE Float load_bf16(const uint16_t* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))};
  }
  static W2S_INLINE Float load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
};

}  // namespace w2s::avx2
W2S_TARGET_END
