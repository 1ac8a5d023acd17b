// Included by kernel headers, once a target (no include guard). Matrices brought to the layout that inner loops read, and
// back: vectors of W along one axis, widened to A, squares of W x W turned in registers.

template <class A>
W2S_INLINE A scalar_as(const void* data, Dtype dtype, int64_t i) {
  if (dtype == Dtype::f32) return A(static_cast<const float*>(data)[i]);
  if (dtype == Dtype::f64) return A(static_cast<const double*>(data)[i]);
  const uint16_t x = static_cast<const uint16_t*>(data)[i];
  return A(dtype == Dtype::bf16 ? bf16_to_float(x) : half_to_float(x));
}

// Whether load_as has this dtype (float64 into float32 goes element by element, and so does all else into float64).
template <class A>
W2S_INLINE bool loads(Dtype dtype) { return sizeof(A) == 4 ? dtype != Dtype::f64 : dtype == Dtype::f64; }

template <class A>
W2S_INLINE Vec<A> load_as(const void* data, Dtype dtype, int64_t i) {
  if constexpr (sizeof(A) == 4) {
    if (dtype == Dtype::bf16) return Vec<A>::load_bf16(static_cast<const uint16_t*>(data) + i);
    if (dtype == Dtype::f16) return Vec<A>::load_f16(static_cast<const uint16_t*>(data) + i);
    return Vec<A>::load(static_cast<const A*>(data) + i);
  } else {
    return Vec<A>::load(static_cast<const A*>(data) + i);
  }
}

// load_as for any dtype, element by element where there is no vector load for it.
template <class A>
W2S_INLINE Vec<A> load_any(const void* data, Dtype dtype, int64_t i) {
  if (loads<A>(dtype)) return load_as<A>(data, dtype, i);
  A lane[Vec<A>::W];
  for (int j = 0; j < Vec<A>::W; ++j) lane[j] = scalar_as<A>(data, dtype, i + j);
  return Vec<A>::load(lane);
}

// The first n < W numbers from i; the other lanes are 0.
template <class A>
W2S_INLINE Vec<A> first_as(const void* data, Dtype dtype, int64_t i, int n) {
  if (dtype == own_dtype<A>) return Vec<A>::load_first(static_cast<const A*>(data) + i, n);
  A lane[Vec<A>::W] = {};
  for (int j = 0; j < n; ++j) lane[j] = scalar_as<A>(data, dtype, i + j);
  return Vec<A>::load(lane);
}

// Many rows are walked side by side, which hardware does not prefetch: lines are asked for AHEAD vectors before.
constexpr int AHEAD = 4;
W2S_INLINE void ahead(const void* src, Dtype dtype, int64_t i) {
  __builtin_prefetch(static_cast<const char*>(src) + i * bytes_of(dtype));
}

// dst[k * width + j] = src[k * sk + j * sj], k < depth, j < columns; zero for columns <= j < width.
// Writes up to one vector past the end of dst.
template <class A>
inline void pack(const void* src, Dtype dtype, int64_t sk, int64_t sj, int64_t depth, int64_t columns, int64_t width, A* dst) {
  using V = Vec<A>;
  constexpr int64_t W = V::W;
  int64_t k = 0;
  if (loads<A>(dtype) && sj == 1) {
    for (; k < depth; ++k) {
      int64_t j = 0;
      for (; j + W <= columns; j += W) load_as<A>(src, dtype, k * sk + j).store(dst + k * width + j);
      for (; j < columns; ++j) dst[k * width + j] = scalar_as<A>(src, dtype, k * sk + j);
      for (; j < width; ++j) dst[k * width + j] = 0;
    }
    return;
  }
  if (loads<A>(dtype) && sk == 1) {
    // W x W squares through registers; the last group of columns writes past it, into what comes later: so it goes first
    for (; k + W <= depth; k += W)
      for (int64_t j = (width - 1) / W * W; j >= 0; j -= W) {
        V square[W];
        for (int i = 0; i < W; ++i) {
          square[i] = j + i < columns ? load_as<A>(src, dtype, k + (j + i) * sj) : V::set(0);
          ahead(src, dtype, k + AHEAD * W + (j + i) * sj);
        }
        V::transpose(square);
        for (int i = 0; i < W; ++i) square[i].store(dst + (k + i) * width + j);
      }
  }
  for (; k < depth; ++k)
    for (int64_t j = 0; j < width; ++j) dst[k * width + j] = j < columns ? scalar_as<A>(src, dtype, k * sk + j * sj) : A(0);
}

// c[j * ld + i] (+)= rows[i * width + j], i < count, j < columns: rows of `width` (a multiple of W) become columns.
template <class A>
inline void unpack(const A* rows, int64_t count, int64_t columns, int64_t width, A* c, int64_t ld, bool add) {
  using V = Vec<A>;
  constexpr int64_t W = V::W;
  for (int64_t j = 0; j < columns; j += W) {
    const int64_t here = columns - j < W ? columns - j : W;
    int64_t i = 0;
    for (; i + W <= count; i += W) {
      V square[W];
      for (int k = 0; k < W; ++k) square[k] = V::load(rows + (i + k) * width + j);
      V::transpose(square);
      for (int64_t k = 0; k < here; ++k) {
        A* p = c + (j + k) * ld + i;
        __builtin_prefetch(p + AHEAD * W, 1);
        (add ? V::load(p) + square[k] : square[k]).store(p);
      }
    }
    for (; i < count; ++i)
      for (int64_t k = 0; k < here; ++k) {
        A& p = c[(j + k) * ld + i];
        p = add ? p + rows[i * width + j + k] : rows[i * width + j + k];
      }
  }
}

// dst[i] = src[order[i]] widened (order null: in place)
template <class A>
inline void widen_values(const void* src, Dtype dtype, const int32_t* order, int64_t begin, int64_t end, A* dst) {
  for (int64_t i = begin; i < end; ++i) dst[i] = scalar_as<A>(src, dtype, order ? order[i] : i);
}
