// 16 x 16 transposes of floats in registers, for the copy of a kernel that runs on AVX-512. Found by argument-dependent
// lookup; the other copies use the loop in attention_kernel.h.
#pragma once

#include "cpu/vec.h"

#if W2S_X86
W2S_TARGET_BEGIN(W2S_AVX512)
namespace w2s::avx512 {

// dst[c * ldd + r] = src[r * lds + c], r, c < 16
inline void transpose_block(Float, const float* src, int64_t lds, float* dst, int64_t ldd) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(src + i * lds);
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j) {
      const __m512d x = _mm512_castps_pd(b[4 * i + j]), y = _mm512_castps_pd(b[4 * i + 2 + j]);
      a[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
      a[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 4; ++j) {
      b[8 * i + j] = _mm512_shuffle_f32x4(a[8 * i + j], a[8 * i + 4 + j], 0x88);
      b[8 * i + 4 + j] = _mm512_shuffle_f32x4(a[8 * i + j], a[8 * i + 4 + j], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    a[j] = _mm512_shuffle_f32x4(b[j], b[8 + j], 0x88);
    a[8 + j] = _mm512_shuffle_f32x4(b[j], b[8 + j], 0xdd);
  }
  for (int i = 0; i < 16; ++i) _mm512_storeu_ps(dst + i * ldd, a[i]);
}

}  // namespace w2s::avx512
W2S_TARGET_END
#endif
