// Included by kernel headers, once a target (no include guard). What chunks.h needs done to rows.

// dst = src as A
template <class A>
inline void copy_as(const void* src, Dtype dtype, int64_t n, A* dst) {
  A buffer[TILE];
  const int64_t bytes = dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
  for (int64_t i = 0; i < n; i += TILE) {
    const int m = int(n - i < TILE ? n - i : TILE);
    widen<A>(static_cast<const char*>(src) + i * bytes, dtype, m, A(0), buffer);
    for (int j = 0; j < m; ++j) dst[i + j] = buffer[j];
  }
}

template <class A>
inline void copy_to(const A* src, int64_t n, Dtype dtype, void* dst) {
  narrow<A>(src, int(n), dtype, dst);
}

// sum_v += over the rows of z, for n <= TILE columns
template <class A>
inline void add_columns(const void* z, Dtype dtype, int64_t rows, int64_t ld, int64_t n, A* sum) {
  A part[TILE], row[TILE];
  const int64_t bytes = dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
  for (int64_t v = 0; v < n; ++v) part[v] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    widen<A>(static_cast<const char*>(z) + r * ld * bytes, dtype, int(n), A(0), row);
    for (int64_t v = 0; v < n; ++v) part[v] += row[v];
  }
  for (int64_t v = 0; v < n; ++v) sum[v] += part[v];
}
