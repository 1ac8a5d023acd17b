// Included once a target (no include guard): tiles of rows as the compute type, in place where they already are it.

// n elements of a row from column c on: the row itself if it holds A, else widened into `buffer` (TILE elements)
template <class A>
W2S_INLINE const A* read_tile(const Rows& rows, int64_t row, int64_t c, int n, A* buffer) {
  if (rows.dtype == own_dtype<A>) return static_cast<const A*>(rows.at(row, c));
  widen(rows.at(row, c), rows.dtype, n, A(0), buffer);
  return buffer;
}

// calls work(c, n) for the tiles of one segment of a row of D elements
template <class F>
W2S_INLINE void segment_tiles(int64_t D, int64_t segment, const F& work) {
  const int64_t begin = segment * SEGMENT, end = std::min(D, begin + SEGMENT);
  for (int64_t c = begin; c < end; c += TILE) work(c, int(std::min<int64_t>(TILE, end - c)));
}

// work(row, c, n) for the tiles of all rows [R, D], a segment an item
template <class F>
inline void each_tile(int64_t R, int64_t D, const F& work) {
  const int64_t S = segments(D);
  parallel_items(R * S, segment_grain(D), [&](int64_t item) {
    segment_tiles(D, item % S, [&](int64_t c, int n) { work(item / S, c, n); });
  });
}

// sums[row] = sum of work(row, c, n) over the tiles of a row, in double; a row an item, so that a sum has one order
template <class F>
inline void row_sums(int64_t R, int64_t D, double* sums, const F& work) {
  parallel_items(R, grain_of(D), [&](int64_t row) {
    double sum = 0;
    for (int64_t c = 0; c < D; c += TILE) sum += double(work(row, c, int(std::min<int64_t>(TILE, D - c))));
    sums[row] = sum;
  });
}

// runs write(dst, n) for a tile of the output: in place, or into `buffer` and rounded from there
template <class A, class F>
W2S_INLINE void write_tile(const Rows& out, int64_t row, int64_t c, int n, A* buffer, const F& write) {
  const bool direct = out.dtype == own_dtype<A>;
  A* dst = direct ? static_cast<A*>(out.at(row, c)) : buffer;
  write(dst);
  if (!direct) narrow(dst, n, out.dtype, out.at(row, c));
}
