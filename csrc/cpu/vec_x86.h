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
  static W2S_INLINE Float load_first(const float* p, int n) { return {_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p)}; }
  W2S_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  W2S_INLINE Float operator+(Float o) const { return {_mm512_add_ps(v, o.v)}; }
  W2S_INLINE Float operator-(Float o) const { return {_mm512_sub_ps(v, o.v)}; }
  W2S_INLINE Float operator*(Float o) const { return {_mm512_mul_ps(v, o.v)}; }
  W2S_INLINE Float operator/(Float o) const { return {_mm512_div_ps(v, o.v)}; }
  static W2S_INLINE Float fma(Float a, Float b, Float c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static W2S_INLINE Float max(Float a, Float b) { return {_mm512_max_ps(a.v, b.v)}; }
  static W2S_INLINE Float min(Float a, Float b) { return {_mm512_min_ps(a.v, b.v)}; }
  W2S_INLINE Float root() const { return {_mm512_sqrt_ps(v)}; }
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
  static constexpr bool EXPANDS = true;
  static W2S_INLINE Float expand(Float a, uint32_t lanes) {  // the first entries of a, each to the next of the lanes; elsewhere 0
    asm("" : "+v"(a.v));  // an expand from memory is microcoded on some CPUs: half the speed of a load and one in registers
    return {_mm512_maskz_expand_ps(__mmask16(lanes), a.v)};
  }
  static W2S_INLINE Float load_lanes(const float* p, uint32_t lanes) { return {_mm512_maskz_loadu_ps(__mmask16(lanes), p)}; }
  template <class I>
  static W2S_INLINE Float gather(const float* p, const I* index) {
    __m512i i;
    if constexpr (sizeof(I) == 1) i = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index)));
    else if constexpr (sizeof(I) == 2) i = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)));
    else i = _mm512_loadu_si512(index);
    return {_mm512_i32gather_ps(i, p, 4)};
  }
  template <class I>
  static W2S_INLINE Float gather_first(const float* p, const I* index, int n) {  // lanes past n: 0
    const __mmask16 m = __mmask16((1u << n) - 1);
    __m512i i;
    if constexpr (sizeof(I) == 1) i = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(m, index));
    else if constexpr (sizeof(I) == 2) i = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, index));
    else i = _mm512_maskz_loadu_epi32(m, index);
    return {_mm512_mask_i32gather_ps(_mm512_setzero_ps(), m, i, p, 4)};
  }
  static W2S_INLINE Float row_sums(const float* rows) {  // lane i: the sum of rows[16 i .. 16 i + 16)
    __m512 pair[8], four[4];
    for (int i = 0; i < 8; ++i) {  // rows i and i + 8, in pairs of lanes
      const __m512 a = _mm512_loadu_ps(rows + 16 * i), b = _mm512_loadu_ps(rows + 16 * (i + 8));
      pair[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    for (int i = 0; i < 4; ++i)  // rows i, i + 4, i + 8, i + 12: one 128-bit lane each
      four[i] = _mm512_add_ps(_mm512_shuffle_f32x4(pair[i], pair[i + 4], 0x88), _mm512_shuffle_f32x4(pair[i], pair[i + 4], 0xdd));
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(four[0], four[1]), _mm512_unpackhi_ps(four[0], four[1]));
    const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(four[2], four[3]), _mm512_unpackhi_ps(four[2], four[3]));
    const __m512 sum = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    // lanes hold rows 0-3, 8-11, 4-7, 12-15
    return {_mm512_shuffle_f32x4(sum, sum, 0xd8)};
  }
  static W2S_INLINE void transpose(Float (&r)[16]) {  // rows become columns: within 128-bit lanes, then the lanes
    __m512 t[16];
    for (int i = 0; i < 16; i += 4) {
      const __m512 a = _mm512_unpacklo_ps(r[i].v, r[i + 1].v), b = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
      const __m512 c = _mm512_unpacklo_ps(r[i + 2].v, r[i + 3].v), d = _mm512_unpackhi_ps(r[i + 2].v, r[i + 3].v);
      t[i] = _mm512_shuffle_ps(a, c, 0x44);
      t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
      t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
      t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      const __m512 a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
      const __m512 c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88), d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
      r[i].v = _mm512_shuffle_f32x4(a, c, 0x88);
      r[i + 4].v = _mm512_shuffle_f32x4(b, d, 0x88);
      r[i + 8].v = _mm512_shuffle_f32x4(a, c, 0xdd);
      r[i + 12].v = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
  }
  static W2S_INLINE Float load_bf16(const uint16_t* p) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
  }
  static W2S_INLINE Float load_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  W2S_INLINE void store_bf16(uint16_t* p) const {  // to nearest even, NaN stays NaN
    const __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i near = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i whole = _mm512_mask_blend_epi32(nan(*this).m, near, _mm512_or_si512(bits, _mm512_set1_epi32(0x400000)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(whole, 16)));
  }
  W2S_INLINE void store_f16(uint16_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
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
  static W2S_INLINE Float load_first(const float* p, int n) {
    float lane[8] = {};
    for (int i = 0; i < n; ++i) lane[i] = p[i];
    return load(lane);
  }
  W2S_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  W2S_INLINE Float operator+(Float o) const { return {_mm256_add_ps(v, o.v)}; }
  W2S_INLINE Float operator-(Float o) const { return {_mm256_sub_ps(v, o.v)}; }
  W2S_INLINE Float operator*(Float o) const { return {_mm256_mul_ps(v, o.v)}; }
  W2S_INLINE Float operator/(Float o) const { return {_mm256_div_ps(v, o.v)}; }
  static W2S_INLINE Float fma(Float a, Float b, Float c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static W2S_INLINE Float max(Float a, Float b) { return {_mm256_max_ps(a.v, b.v)}; }
  static W2S_INLINE Float min(Float a, Float b) { return {_mm256_min_ps(a.v, b.v)}; }
  W2S_INLINE Float root() const { return {_mm256_sqrt_ps(v)}; }
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
  static constexpr bool EXPANDS = false;
  template <class I>
  static W2S_INLINE Float gather(const float* p, const I* index) {
    __m256i i;
    if constexpr (sizeof(I) == 1) i = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(index)));
    else if constexpr (sizeof(I) == 2) i = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index)));
    else i = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
    return {_mm256_i32gather_ps(p, i, 4)};
  }
  template <class I>
  static W2S_INLINE Float gather_first(const float* p, const I* index, int n) {  // lanes past n: 0
    float lane[8] = {};
    for (int i = 0; i < n; ++i) lane[i] = p[index[i]];
    return load(lane);
  }
  static W2S_INLINE Float row_sums(const float* rows) {  // lane i: the sum of rows[8 i .. 8 i + 8)
    __m256 pair[4];
    for (int i = 0; i < 4; ++i) {
      const __m256 a = _mm256_loadu_ps(rows + 8 * i), b = _mm256_loadu_ps(rows + 8 * (i + 4));
      pair[i] = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    }
    const __m256 a = _mm256_add_ps(_mm256_unpacklo_ps(pair[0], pair[1]), _mm256_unpackhi_ps(pair[0], pair[1]));
    const __m256 b = _mm256_add_ps(_mm256_unpacklo_ps(pair[2], pair[3]), _mm256_unpackhi_ps(pair[2], pair[3]));
    return {_mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee))};
  }
  static W2S_INLINE void transpose(Float (&r)[8]) {  // rows become columns: within 128-bit lanes, then the lanes
    __m256 t[8];
    for (int i = 0; i < 8; i += 4) {
      const __m256 a = _mm256_unpacklo_ps(r[i].v, r[i + 1].v), b = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
      const __m256 c = _mm256_unpacklo_ps(r[i + 2].v, r[i + 3].v), d = _mm256_unpackhi_ps(r[i + 2].v, r[i + 3].v);
      t[i] = _mm256_shuffle_ps(a, c, 0x44);
      t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
      t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
      t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      r[i].v = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
      r[i + 4].v = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
    }
  }
  static W2S_INLINE Float load_bf16(const uint16_t* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))};
  }
  static W2S_INLINE Float load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  W2S_INLINE void store_bf16(uint16_t* p) const {
    float lane[W];
    store(lane);
    for (int i = 0; i < W; ++i) p[i] = float_to_bf16(lane[i]);
  }
  W2S_INLINE void store_f16(uint16_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

}  // namespace w2s::avx2
W2S_TARGET_END
