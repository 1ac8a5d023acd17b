#include "cpu/convert.h"

#include "cpu/target_begin.h"

template <class A>
inline void widen_all(const void* src, Dtype dtype, int64_t n, A* dst) {
  A buffer[TILE];
  const int64_t bytes = bytes_of(dtype);
  for (int64_t i = 0; i < n; i += TILE) {
    const int m = int(n - i < TILE ? n - i : TILE);
    widen<A>(static_cast<const char*>(src) + i * bytes, dtype, m, A(0), buffer);
    std::memcpy(dst + i, buffer, size_t(m) * sizeof(A));
  }
}

template <class A>
inline void widen_scaled(const void* src, Dtype dtype, int64_t n, A scale, A* dst) {
  A buffer[TILE];
  const int64_t bytes = bytes_of(dtype);
  for (int64_t i = 0; i < n; i += TILE) {
    const int m = int(n - i < TILE ? n - i : TILE);
    widen<A>(static_cast<const char*>(src) + i * bytes, dtype, m, A(0), buffer);
    for (int j = 0; j < m; ++j) dst[i + j] = scale * buffer[j];
  }
}

template <class A>
inline void narrow_all(const A* src, int64_t n, Dtype dtype, void* dst) {
  const int64_t bytes = bytes_of(dtype);
  for (int64_t i = 0; i < n; i += TILE)
    narrow<A>(src + i, int(n - i < TILE ? n - i : TILE), dtype, static_cast<char*>(dst) + i * bytes);
}

template <class A>
inline void narrow_scaled(const A* src, int64_t n, A scale, Dtype dtype, void* dst) {
  A buffer[TILE];
  const int64_t bytes = bytes_of(dtype);
  for (int64_t i = 0; i < n; i += TILE) {
    const int m = int(n - i < TILE ? n - i : TILE);
    for (int j = 0; j < m; ++j) buffer[j] = scale * src[i + j];
    narrow<A>(buffer, m, dtype, static_cast<char*>(dst) + i * bytes);
  }
}

template <class A>
inline void add_columns(const void* z, Dtype dtype, int64_t rows, int64_t ld, int64_t n, A* sum) {
  A part[TILE], row[TILE];
  const int64_t bytes = bytes_of(dtype);
  for (int64_t v = 0; v < n; ++v) part[v] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    widen<A>(static_cast<const char*>(z) + r * ld * bytes, dtype, int(n), A(0), row);
    for (int64_t v = 0; v < n; ++v) part[v] += row[v];
  }
  for (int64_t v = 0; v < n; ++v) sum[v] += part[v];
}

W2S_KERNELS(ConvertKernels, widen_all<Real>, widen_scaled<Real>, narrow_all<Real>, narrow_scaled<Real>, add_columns<Real>)

#include "cpu/target_end.h"
