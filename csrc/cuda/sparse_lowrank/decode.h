// y = x S^T + s (x A^T) B^T + bias for up to NP rows of x: the program of one thread of a grid whose blocks all run at
// once. Written for a Team: the device's threads (decode.cu), a few host threads in the tests.
//
//   team.thread / threads, lane / lanes, warp / warps    within a block, a warp, a block
//   team.block / blocks                                  of the grid
//   team.sync()                                          orders shared memory within a block
//   team.arrive(), team.wait()                           a barrier of the grid in two halves; work may stand between
//   team.sum(v)                                          over the lanes of a warp, the same bits in each
//   Team::weights16(p), Team::fresh(p)                   16 bytes that no one writes; a float another block wrote
//   Team::widen(t), Team::narrow<T>(f)
//
// Every block holds all of x in shared memory and owns a range of rows of B and S. Weights are read once, 16 bytes a
// lane, neighbours next to each other. Between the halves of the barrier that h = x A^T needs, a block computes the
// part that does not need h: the sparse one.
#pragma once
#include <cstdint>
#include <cstring>

// Compiled for the device by nvcc and for the host by a plain C++ compiler, never for both at once.
#ifdef __CUDACC__
#define W2S_TEAM __device__ __forceinline__
#define W2S_BOTH __host__ __device__ __forceinline__
#else
#define W2S_TEAM inline
#define W2S_BOTH inline
#endif

namespace w2s::sparse_lowrank {

struct Arguments {
  const void *x, *A, *B, *values, *cols, *bias, *scale;  // bias and scale may be null
  const int* row_ptr;                                    // csr; null for balanced
  float* h;                                              // [parts][n][rank]
  void* y;                                               // [n][rows]
  int64_t x_stride, a_stride, b_stride, nnz;
  int n, rows, columns, rank, parts;
  int block, per_block, last, col_blocks;  // balanced: columns of a block, values of a row in it and in the last one
  float scale_value;
  bool scale_is_float;  // otherwise of the weights' type
};

W2S_BOTH int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// [length][NP] of T in shared memory, read V entries (a lane's 16 bytes of weights) at a time. Units of 16 bytes are
// permuted so that eight neighbouring lanes, each with its V entries, touch different banks.
template <class T, int NP, int V>
struct Panel {
  static constexpr int kPer = 16 / sizeof(T), kUnits = V * NP / kPer;
  static_assert(kUnits >= 1);
  static constexpr int kMask = kUnits < 8 ? kUnits - 1 : 7;
  static constexpr int kShift = kUnits <= 8 ? 3 : kUnits == 16 ? 4 : 5;
  T* data;

  W2S_BOTH static int64_t bytes(int64_t length) { return round_up(length * NP * int64_t{sizeof(T)}, 128 * kUnits); }

  W2S_TEAM static int place(int i) {  // of value i = entry NP + row
    const int unit = i / kPer;
    return (unit ^ (unit >> kShift & kMask)) * kPer + i % kPer;
  }
  W2S_TEAM void put(int entry, int row, T value) const { data[place(entry * NP + row)] = value; }

  // acc[n] += sum_j w[j] entry_{first + j}[n]; first is a multiple of V
  template <class Team>
  W2S_TEAM void add_chunk(int first, const float (&w)[V], float (&acc)[NP]) const {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      T v[kPer];
      memcpy(v, __builtin_assume_aligned(data + place(first * NP + u * kPer), 16), 16);
#pragma unroll
      for (int t = 0; t < kPer; ++t) acc[(u * kPer + t) % NP] += w[(u * kPer + t) / NP] * Team::widen(v[t]);
    }
  }

  // acc[n] += w entry[n]
  template <class Team>
  W2S_TEAM void add_entry(int entry, float w, float (&acc)[NP]) const {
    constexpr int kRun = NP < kPer ? NP : kPer;
#pragma unroll
    for (int n = 0; n < NP; n += kRun) {
      T v[kRun];
      memcpy(v, __builtin_assume_aligned(data + place(entry * NP + n), kRun * sizeof(T)), kRun * sizeof(T));
#pragma unroll
      for (int t = 0; t < kRun; ++t) acc[n + t] += w * Team::widen(v[t]);
    }
  }
};

// Where the parts of a block's shared memory begin. The groups of a balanced support's sums are gone when h comes.
template <class T, int NP>
struct Layout {
  static constexpr int kWide = 16 / sizeof(T);
  using Input = Panel<T, NP, kWide>;
  using Middle = Panel<float, NP, kWide>;
  int64_t middle, sparse, total;

  W2S_BOTH Layout(int columns, int rank, int own_rows, int threads, bool balanced) {
    middle = Input::bytes(columns);
    const int64_t h = Middle::bytes(rank), groups = balanced ? int64_t{4} * NP * threads : 0;
    sparse = middle + round_up(h > groups ? h : groups, 16);
    total = sparse + int64_t{4} * NP * own_rows;
  }
};

template <class Team, class T, int NP>
struct Decode {
  static constexpr int V = 16 / sizeof(T), kUnroll = NP == 1 ? 4 : 2;  // 16-byte loads in flight a lane
  using Place = Layout<T, NP>;
  Team& team;
  const Arguments& a;
  typename Place::Input x;
  typename Place::Middle h;
  float *groups, *sparse;  // [groups of threads][rows][NP], [own rows][NP]
  int first_row, own;

  W2S_TEAM static int row_of(const Arguments& a, int block, int blocks) {
    return static_cast<int>(static_cast<int64_t>(a.rows) * block / blocks);
  }

  W2S_TEAM Decode(Team& t, const Arguments& arguments, unsigned char* memory, const Place& at)
      : team(t),
        a(arguments),
        x{reinterpret_cast<T*>(memory)},
        h{reinterpret_cast<float*>(memory + at.middle)},
        groups(reinterpret_cast<float*>(memory + at.middle)),
        sparse(reinterpret_cast<float*>(memory + at.sparse)),
        first_row(row_of(a, t.block, t.blocks)),
        own(row_of(a, t.block + 1, t.blocks) - first_row) {}

  W2S_TEAM static void clear(float (&acc)[NP]) {
#pragma unroll
    for (int n = 0; n < NP; ++n) acc[n] = 0;
  }

  W2S_TEAM void load_x() {
    const int length = static_cast<int>(round_up(a.columns, V));
    const T* from = static_cast<const T*>(a.x);
    for (int n = 0; n < NP; ++n)
      for (int c = team.thread; c < length; c += team.threads)
        x.put(c, n, n < a.n && c < a.columns ? from[n * a.x_stride + c] : Team::template narrow<T>(0.0f));
    team.sync();
  }

  // V weights from position e of a row; 0 outside [begin, end)
  W2S_TEAM static void weights(const T* row, int e, int begin, int end, float (&w)[V]) {
    T raw[V];
    if (e >= begin && e + V <= end) {
      const auto packed = Team::weights16(row + e);
      memcpy(raw, &packed, 16);
#pragma unroll
      for (int j = 0; j < V; ++j) w[j] = Team::widen(raw[j]);
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) w[j] = e + j >= begin && e + j < end ? Team::widen(row[e + j]) : 0.0f;
    }
  }

  // acc += row[begin, end) . panel, this lane's share; begin is a multiple of V. Rows of an odd length are not aligned:
  // their chunks straddle the panel's, entry by entry.
  template <class P>
  W2S_TEAM void dot(const T* row, int begin, int end, const P& panel, float (&acc)[NP]) {
    const int skew = static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % V);
    if (skew == 0) {
      const int whole = begin + (end - begin) / V * V;
#pragma unroll kUnroll
      for (int e = begin + V * team.lane; e < whole; e += V * team.lanes) {  // no branch between the loads
        const auto packed = Team::weights16(row + e);
        T raw[V];
        float w[V];
        memcpy(raw, &packed, 16);
#pragma unroll
        for (int j = 0; j < V; ++j) w[j] = Team::widen(raw[j]);
        panel.template add_chunk<Team>(e, w, acc);
      }
      if (whole < end && team.lane == 0) {
        float w[V];
        weights(row, whole, begin, end, w);
        panel.template add_chunk<Team>(whole, w, acc);
      }
      return;
    }
    for (int e = begin - skew + V * team.lane; e < end; e += V * team.lanes) {
      float w[V];
      weights(row, e, begin, end, w);
#pragma unroll
      for (int j = 0; j < V; ++j)
        if (e + j >= begin && e + j < end) panel.template add_entry<Team>(e + j, w[j], acc);
    }
  }

  // h = x A^T in `parts` sums over slices of the columns, so that all warps have a row to read
  W2S_TEAM void project() {
    const int slice = static_cast<int>(round_up((a.columns + a.parts - 1) / a.parts, V));
    const int64_t tasks = static_cast<int64_t>(a.rank) * a.parts, step = static_cast<int64_t>(team.blocks) * team.warps;
    for (int64_t i = static_cast<int64_t>(team.block) * team.warps + team.warp; i < tasks; i += step) {
      const int r = static_cast<int>(i / a.parts), part = static_cast<int>(i % a.parts);
      const int begin = part * slice, end = begin + slice < a.columns ? begin + slice : a.columns;
      float acc[NP];
      clear(acc);
      dot(static_cast<const T*>(a.A) + r * a.a_stride, begin, end, x, acc);
#pragma unroll
      for (int n = 0; n < NP; ++n) {
        const float sum = team.sum(acc[n]);
        if (team.lane == 0 && n < a.n) a.h[(static_cast<int64_t>(part) * a.n + n) * a.rank + r] = sum;
      }
    }
  }

  W2S_TEAM void sparse_csr() {
    const T* values = static_cast<const T*>(a.values);
    const uint16_t* cols = static_cast<const uint16_t*>(a.cols);
    for (int i = team.warp; i < own; i += team.warps) {
      const int begin = a.row_ptr[first_row + i], end = a.row_ptr[first_row + i + 1];
      float acc[NP];
      clear(acc);
      for (int64_t k = begin / V * V + V * team.lane; k < end; k += V * team.lanes) {
        T v[V];
        uint16_t c[V];
        if (k + V <= a.nnz) {  // aligned; what belongs to the neighbouring rows is left out below
          const auto packed = Team::weights16(values + k);
          memcpy(v, &packed, 16);
          memcpy(c, __builtin_assume_aligned(cols + k, 2 * V), 2 * V);
        } else {
#pragma unroll
          for (int j = 0; j < V; ++j)
            if (k + j < end) v[j] = values[k + j], c[j] = cols[k + j];
        }
#pragma unroll
        for (int j = 0; j < V; ++j)
          if (k + j >= begin && k + j < end) x.template add_entry<Team>(c[j], Team::widen(v[j]), acc);
      }
#pragma unroll
      for (int n = 0; n < NP; ++n) {
        const float sum = team.sum(acc[n]);
        if (team.lane == 0) sparse[i * NP + n] = sum;
      }
    }
  }

  // A thread a row: rows are neighbours in memory within a block of columns. Groups of threads share out these blocks.
  W2S_TEAM void sparse_balanced() {
    const T* values = static_cast<const T*>(a.values);
    const uint8_t* cols = static_cast<const uint8_t*>(a.cols);
    const int64_t lanes = round_up(own, team.lanes);
    const int span = static_cast<int>(lanes < team.threads ? lanes : team.threads);
    const int count = span ? team.threads / span : 0;
    for (int batch = 0; batch < own; batch += span) {
      const int group = team.thread / span, i = batch + team.thread % span;
      if (group < count && i < own) {
        float acc[NP];
        clear(acc);
        for (int b = group; b < a.col_blocks; b += count) {
          const int per = b + 1 < a.col_blocks ? a.per_block : a.last;
          const int64_t at = static_cast<int64_t>(b) * a.rows * a.per_block + static_cast<int64_t>(first_row + i) * per;
#pragma unroll 4
          for (int q = 0; q < per; ++q)
            x.template add_entry<Team>(b * a.block + cols[at + q], Team::widen(values[at + q]), acc);
        }
#pragma unroll
        for (int n = 0; n < NP; ++n) groups[(group * span + team.thread % span) * NP + n] = acc[n];
      }
      team.sync();
      for (int j = team.thread; j < span * NP && batch + j / NP < own; j += team.threads) {
        float sum = 0;
        for (int g = 0; g < count; ++g) sum += groups[g * span * NP + j];
        sparse[batch * NP + j] = sum;
      }
      team.sync();
    }
  }

  W2S_TEAM float scale() const {
    if (a.scale == nullptr) return a.scale_value;
    return a.scale_is_float ? *static_cast<const float*>(a.scale) : Team::widen(*static_cast<const T*>(a.scale));
  }

  W2S_TEAM void load_h() {
    const int length = static_cast<int>(round_up(a.rank, V));
    const float s = scale();
    for (int n = 0; n < NP; ++n)
      for (int r = team.thread; r < length; r += team.threads) {
        float sum = 0;
        if (n < a.n && r < a.rank)
          for (int part = 0; part < a.parts; ++part)
            sum += Team::fresh(a.h + (static_cast<int64_t>(part) * a.n + n) * a.rank + r);
        h.put(r, n, s * sum);
      }
    team.sync();
  }

  W2S_TEAM void expand() {
    const T* bias = static_cast<const T*>(a.bias);
    for (int i = team.warp; i < own; i += team.warps) {
      const int64_t o = first_row + i;
      float acc[NP];
      clear(acc);
      dot(static_cast<const T*>(a.B) + o * a.b_stride, 0, a.rank, h, acc);
      const float add = bias == nullptr ? 0.0f : Team::widen(bias[o]);
#pragma unroll
      for (int n = 0; n < NP; ++n) {
        const float sum = team.sum(acc[n]);
        if (team.lane == 0 && n < a.n)
          static_cast<T*>(a.y)[n * static_cast<int64_t>(a.rows) + o] =
              Team::template narrow<T>(sum + sparse[i * NP + n] + add);
      }
    }
  }

  W2S_TEAM void run() {
    load_x();
    project();
    team.arrive();
    if (a.row_ptr != nullptr)
      sparse_csr();
    else
      sparse_balanced();
    team.wait();
    load_h();
    expand();
  }
};

}  // namespace w2s::sparse_lowrank
