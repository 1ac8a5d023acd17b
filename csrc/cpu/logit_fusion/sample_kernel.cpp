// fused_sample: one token a row from the fused, filtered distribution; see select_kernel.h for the filters.
//
// Two-level inverse distribution function: the sweep over the logits leaves (max, sum) of each tile of 1,024 columns; the
// uniform number picks the tile, and that one tile is formed again to find the column. z is kept (in a buffer a row) only
// if a filter must see it again. Floor: inputs read once, 2 + K FMA and one exponential an element, nothing written.
#include "cpu/logit_fusion/models.h"

#include "cpu/target_begin.h"

#include "cpu/logit_fusion/fusion_kernel.h"
#include "cpu/logit_fusion/select_kernel.h"
#include "cpu/logit_fusion/draw_kernel.h"

template <class A>
struct SampleRun {
  const Fusion& f;
  const Draws& draws;
  const SampleOutput& out;
  int64_t S, V;
  bool staged;
  std::vector<Cut<A>> cut;
  std::vector<Tiles<A>> tiles;

  SampleRun(const Fusion& fusion, const Draws& d, const SampleOutput& o)
      : f(fusion), draws(d), out(o), S(segments(f.V)), V(f.V), staged(d.filters.any(f.V)), cut(size_t(f.B)),
        tiles(size_t(f.B), Tiles<A>(f.V)) {}

  double heat(int64_t row) const {
    const double t = f.temperature[size_t(row)];
    return t == 0 ? 1.0 : t;
  }

  void sweep(int64_t row, int64_t segment, A* stage) {
    const int64_t begin = segment * SEGMENT, end = std::min(V, begin + SEGMENT);
    FusedRow<A> z;
    z.begin(f, row, heat(row), cut[size_t(row)]);
    A buffer[TILE];
    for (int64_t c = begin; c < end; c += TILE) {
      const int n = int(std::min<int64_t>(TILE, end - c));
      A* dst = stage ? stage + c : buffer;
      const TileInfo<A> info = z.tile(c, n, dst);
      tiles[size_t(row)].set(c / TILE, dst, n, info, c + TILE < end ? z.ahead(c + TILE) : Ahead{});
    }
  }

  void finish(int64_t row, const A* stage) {
    RowDraw<A> draw{f, row, heat(row), cut[size_t(row)], tiles[size_t(row)]};
    draw.finish(draws, f.temperature[size_t(row)] == 0, stage, out);
  }

  void run() {
    parallel_items(f.plausible ? f.B : 0, grain_of(V), [this](int64_t r) { cut[size_t(r)] = plausible_cut<A>(f, r); });
    if (!staged || f.B < 2 * threads()) {  // rows shared between threads
      const int64_t pitch = V + PAD;
      std::unique_ptr<A[]> stage(staged ? new A[size_t(f.B * pitch)] : nullptr);
      A* z = stage.get();
      parallel_items(f.B * S, segment_grain(V), [this, z, pitch](int64_t i) { sweep(i / S, i % S, z ? z + i / S * pitch : nullptr); });
      parallel_items(f.B, staged ? grain_of(V) : 16, [this, z, pitch](int64_t r) { finish(r, z ? z + r * pitch : nullptr); });
    } else {  // a row to a thread: its z stays in that thread's cache
      parallel_items(f.B, grain_of(V), [this](int64_t r) {
        thread_local std::vector<A> stage;
        if (int64_t(stage.size()) < V + PAD) stage.resize(size_t(V + PAD));
        for (int64_t s = 0; s < S; ++s) sweep(r, s, stage.data());
        finish(r, stage.data());
      });
    }
  }
};

template <class A>
inline void sample_rows(const Fusion& f, const Draws& draws, const SampleOutput& out) {
  SampleRun<A>(f, draws, out).run();
}

W2S_KERNELS(SampleKernels, sample_rows<Real>)

#include "cpu/target_end.h"
