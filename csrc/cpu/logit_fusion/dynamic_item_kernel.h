// A row's shift d = z_k - z_0 in tiles, with the rules for infinities. Included once a target (no include guard).
#include "cpu/logit_fusion/fusion_kernel.h"

template <class A>
struct DynamicItem {
  const Dynamic& d;
  int64_t row;
  A base_buffer[TILE], e_buffer[TILE], a_buffer[TILE];
  A x[TILE], w[TILE], t[TILE], shift[TILE];

  DynamicItem(const Dynamic& dynamic, int64_t r) : d(dynamic), row(r) {}

  const A* base(int64_t c, int n) { return fetch(d.base, row, c, n, base_buffer, -infinity<A>); }
  const A* expert(int k, int64_t c, int n) { return fetch(d.expert[size_t(k)], row, c, n, e_buffer, -infinity<A>); }
  const A* anti(int k, int64_t c, int n) { return fetch(*d.anti_of(k), row, c, n, a_buffer, -infinity<A>); }

  // z_k - z_0 of a tile; a column that both mask does not move, one that only one of them masks moves by far[0] (down)
  // or far[1] (up). Returns whether there was one of the latter kind where the base has mass, up: anywhere.
  struct Odd {
    bool one_sided = false, up = false;
  };
  Odd difference(const A* zl, const A* e, const A* a, int n, const double* far, A* out) const {
    using V = Vec<A>;
    const V largest = V::set(std::numeric_limits<A>::max());
    auto bad = V::Mask::none();
    for (int i = 0; i < padded(n); i += V::W) {
      const V x = V::load(e + i) - V::load(a + i);
      bad = bad | V::nle(x.abs(), largest);
      x.store(out + i);
    }
    Odd odd;
    if (bad.any())
      for (int i = 0; i < padded(n); ++i) {
        if (e[i] == a[i] || e[i] != e[i] || a[i] != a[i]) out[i] = e[i] == a[i] ? A(0) : out[i];
        else if (std::isinf(out[i])) {
          odd.one_sided |= zl[i] != -infinity<A>;
          odd.up |= a[i] == -infinity<A>;
          out[i] = A(far ? far[out[i] > 0] : 0);
        }
        if (zl[i] == -infinity<A>) out[i] = 0;
      }
    return odd;
  }

  // Direction times difference, summed over the experts of a problem (k < 0: the ray).
  Odd shifts(const A* zl, int64_t c, int n, int k, const double* u, const double (*far)[2], A* out) {
    using V = Vec<A>;
    Odd odd;
    const int begin = k < 0 ? 0 : k, end = k < 0 ? d.K : k + 1;
    for (int i = begin; i < end; ++i) {
      A* dst = i == begin ? out : w;
      const Odd o = difference(zl, expert(i, c, n), anti(i, c, n), n, far ? far[i] : nullptr, dst);
      odd.one_sided |= o.one_sided;
      odd.up |= o.up;
      const V ui = V::set(A(k < 0 ? u[i] : 1));
      if (i > begin)
        for (int v = 0; v < padded(n); v += V::W) V::fma(ui, V::load(w + v), V::load(out + v)).store(out + v);
      else if (k < 0 && u[i] != 1)
        for (int v = 0; v < padded(n); v += V::W) (ui * V::load(out + v)).store(out + v);
    }
    return odd;
  }
};
