// One row of dynamic_sample: load, solve the weights, fuse, filter, draw. Written for a Team, the threads that share
// the row: a thread-block cluster on the device (team.cuh), a few host threads in the tests.
//
//   team.thread / threads    within a block;     team.rank / ranks    blocks of the team
//   team.all(P)              P::merge over all threads of the team, in a fixed order, the result to every thread
//   team.leader(f)           f() by one thread of each block, the result to every thread of the block
//   team.before(n)           sum of n over the threads before this one, and over all, in (rank, thread) order
//   team.sync_block()        orders shared memory within a block
//
// Every block holds a contiguous slice of the row: z_L and the K shifts d_k = z_k - z_0k, float32. Decisions are made
// from results of `all`, which are the same bits in every block, so that all blocks take the same branches.
#pragma once
#include "cuda/logit_fusion/row_types.h"

// The row program is compiled for the device by nvcc and for the host by a plain C++ compiler, never for both at once.
#ifdef __CUDACC__
#define W2S_TEAM __device__ __forceinline__
#else
#define W2S_TEAM inline
#endif

namespace w2s::fusion {

struct Four {
  float v[4];
};

template <class Team>
struct Row {
  Team& team;
  const Arguments& a;
  Shared& shared;
  float *base, *shift;  // [slice], [K][slice]; base becomes the fused z
  int64_t row;
  int begin;  // first column of the slice
  float top_base = 0;
  bool base_nan = false, base_bad = false;  // bad: NaN, +inf, or nothing finite
  uint32_t expert_bad = 0;                  // a bit an expert, or its anti-expert

  W2S_TEAM int slice() const { return a.slice; }

  // f(i) for the columns of this thread, neighbours in neighbouring threads
  template <class F>
  W2S_TEAM void each(F f) const {
#pragma unroll 4
    for (int i = team.thread; i < slice(); i += team.threads) f(i);
  }

  template <class T>
  W2S_TEAM Four four(const Logits& from, int group) const {
    const T* x = static_cast<const T*>(from.data) + row * from.row_stride + begin + 4 * group;
    return Team::template four<T>(x, a.width - begin - 4 * group);  // -inf beyond the width
  }

  // ---- load -------------------------------------------------------------------------------------------------------

  template <class T>
  W2S_TEAM Maxima load_base() {
    Maxima m = Maxima::none();
#pragma unroll 4
    for (int g = team.thread; g < slice() / 4; g += team.threads) {
      const Four x = four<T>(a.base, g);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        m.base = fmaxf(m.base, x.v[j]);
        m.flags |= x.v[j] != x.v[j] ? Maxima::kBaseBad : 0;
        base[4 * g + j] = x.v[j];
      }
    }
    return m;
  }

  // Sums of this thread relative to its own maxima: sum e^(e-m), sum e^(e-m) (d-ref), sum e^(a-m0)
  struct Online {
    float m, s, ref, w, m0, s0;
    uint32_t flags;
  };

  W2S_TEAM void absorb(Online& o, const Four& e, const Four& n, float* d) const {
    float most = o.m, most_shift = o.ref, most0 = o.m0, finite[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float x = e.v[j], y = n.v[j];
      // Both -inf is marked by NaN: such a column is not shifted at all, and a row with a NaN input never uses d.
      const float delta = x == y ? (x == -HUGE_VALF ? NAN : 0.0f) : x - y;
      d[j] = delta;
      finite[j] = fabsf(delta) <= 3.4e38f ? delta : 0.0f;
      o.flags |= (x != x ? Maxima::kExpertBad : 0) | (y != y ? Maxima::kAntiBad : 0);
      if (y == -HUGE_VALF && x > y) o.flags |= Maxima::kInfinite;
      if (x > most) most = x, most_shift = finite[j];
      most0 = fmaxf(most0, y);
    }
    if (most > o.m) {
      const float f = expf(o.m - most);
      o.w = f * fmaf(o.ref - most_shift, o.s, o.w);
      o.s *= f;
      o.m = most, o.ref = most_shift;
    }
    if (most0 > o.m0) o.s0 *= expf(o.m0 - most0), o.m0 = most0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float p = e.v[j] > -HUGE_VALF ? expf(e.v[j] - o.m) : 0.0f;
      o.s += p;
      o.w = fmaf(p, finite[j] - o.ref, o.w);
      o.s0 += n.v[j] > -HUGE_VALF ? expf(n.v[j] - o.m0) : 0.0f;
    }
  }

  template <class T>
  W2S_TEAM Online load_expert(int k) {
    Online o = {-HUGE_VALF, 0, 0, 0, -HUGE_VALF, 0, 0};
    float* d = shift + static_cast<int64_t>(k) * slice();
    const int groups = slice() / 4;
    for (int g = team.thread; g < groups; g += 2 * team.threads) {
      const int h = g + team.threads;  // two groups in flight
      const bool second = h < groups;
      const Four e = four<T>(a.expert[k], g), n = four<T>(a.anti[k], g);
      const Four e2 = second ? four<T>(a.expert[k], h) : e, n2 = second ? four<T>(a.anti[k], h) : n;
      absorb(o, e, n, d + 4 * g);
      if (second) absorb(o, e2, n2, d + 4 * h);
    }
    return o;
  }

  W2S_TEAM void load() {
    Maxima mine;
    Team::of_type(a.type, [&](auto zero) { mine = load_base<decltype(zero)>(); });
    for (int k = 0; k < a.experts; ++k) {
      Online o;
      Team::of_type(a.type, [&](auto zero) { o = load_expert<decltype(zero)>(k); });
      mine.expert = o.m, mine.shift = o.ref, mine.anti = o.m0, mine.flags |= o.flags;
      const Maxima most = team.all(mine);
      mine = Maxima::none();
      const float f = o.s > 0 ? expf(o.m - most.expert) : 0.0f, f0 = o.s0 > 0 ? expf(o.m0 - most.anti) : 0.0f;
      const double s = static_cast<double>(f) * o.s;
      const double w = static_cast<double>(f) * o.w + (static_cast<double>(o.ref) - most.shift) * s;
      const Sums<3> sums = team.all(Sums<3>{{s, w, static_cast<double>(f0) * o.s0}});
      if (k == 0) top_base = most.base;
      const bool bad = (most.flags & (Maxima::kExpertBad | Maxima::kAntiBad)) || !(fabsf(most.expert) <= 3.4e38f) ||
                       !(fabsf(most.anti) <= 3.4e38f);
      if (k == 0) base_nan = most.flags & Maxima::kBaseBad;
      if (bad) expert_bad |= 1u << k;
      if (team.thread == 0) {
        const Expert e = {most.expert, sums.v[0], most.shift, sums.v[1], most.anti, sums.v[2]};
        shared.offset[k] = static_cast<float>(e.offset());
        shared.kl[k] = bad ? not_a_number() : most.flags & Maxima::kInfinite ? infinity() : e.kl();
      }
      team.sync_block();
    }
    base_bad = base_nan || !(fabsf(top_base) <= 3.4e38f);
  }

  // ---- solve ------------------------------------------------------------------------------------------------------

  W2S_TEAM float clamped(int k, int i) const {
    const float d = shift[static_cast<int64_t>(k) * slice() + i], x = d - shared.offset[k];
    return d != d ? 0.0f : fminf(fmaxf(x, -kClamp), kClamp);
  }

  // x = sum_k u_k d_k over experts [first, last)
  W2S_TEAM float along(int first, int last, int i) const {
    float x = shared.u[first] * clamped(first, i);
    for (int k = first + 1; k < last; ++k) x = fmaf(shared.u[k], clamped(k, i), x);
    return x;
  }

  // Sums at N alphas of exp(b + alpha (x - centre) - shift_n) (x - centre)^r, r = 0, 1, 2
  template <int N>
  W2S_TEAM Sums<3 * N> sweep(int first, int last, const float (&alpha)[N], const float (&shift_n)[N], float centre) {
    float s[3 * N] = {};
    each([&](int i) {
      const float b = base[i] - top_base;
      const float y = along(first, last, i) - centre;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float p = expf(fmaf(alpha[n], y, b) - shift_n[n]), py = p * y;
        s[3 * n] += p;
        s[3 * n + 1] += py;
        s[3 * n + 2] = fmaf(py, y, s[3 * n + 2]);
      }
    });
    Sums<3 * N> total;
#pragma unroll
    for (int n = 0; n < 3 * N; ++n) total.v[n] = s[n];
    return team.all(total);
  }

  // Exact F at one alpha, relative to the chord bound of the exponent, or to its maximum where the chord is too loose
  W2S_TEAM Tilt evaluate(int first, int last, double alpha, double chord, double centre, double log_z0) {
    const float at[1] = {static_cast<float>(alpha)}, c = static_cast<float>(centre);
    float bound[1] = {static_cast<float>(alpha * (chord - centre))};
    for (bool loose = true;; loose = false) {
      const Sums<3> s = sweep<1>(first, last, at, bound, c);
      if (!loose || !(s.v[0] < kUnderflow)) return tilt(at[0], s.v[0], s.v[1], s.v[2], bound[0], log_z0);
      Range r = Range::none();
      each([&](int i) { r.end = fmaxf(r.end, fmaf(at[0], along(first, last, i) - c, base[i] - top_base)); });
      bound[0] = team.all(r).end;
    }
  }

  struct Search {
    Root root;
    Grid grid;
  };
  struct Solution {
    double t, kl;
    bool saturated;
  };

  W2S_TEAM Solution solve(int first, int last, double target) {
    Range mine = Range::none();
    each([&](int i) {
      if (base[i] > -HUGE_VALF) {
        const float x = along(first, last, i);
        const float end = fmaf(static_cast<float>(a.alpha_max), x, base[i] - top_base);
        mine = Range::merge(mine, Range{end, x, x});
      }
    });
    const Range range = team.all(mine);
    const double chord = static_cast<double>(range.end) / a.alpha_max;  // every exponent is <= alpha * chord
    float at[kNodes], zero[kNodes] = {};
#pragma unroll
    for (int n = 0; n < kNodes; ++n) at[n] = static_cast<float>(a.alpha_max * n / (kNodes - 1));
    const Sums<3 * kNodes> s = sweep<kNodes>(first, last, at, zero, static_cast<float>(chord));
    const double log_z0 = log(s.v[0]);
    const double centre = static_cast<float>(static_cast<float>(chord) + s.v[1] / s.v[0]);  // E_p x

    const bool exact = a.first_candidate < 0;
    Search now = team.leader([&] {
      Tilt node[kNodes];
#pragma unroll
      for (int n = 0; n < kNodes; ++n)
        node[n] = tilt(at[n], s.v[3 * n], s.v[3 * n + 1], s.v[3 * n + 2], 0.0, log_z0);
      Search begun;
      begun.root.begin(target, a.alpha_max, a.tol, node, range.low == range.high);
      begun.grid.begin(target, a.alpha_max, exact ? 0 : a.first_candidate, a.nodes);
      return begun;
    });
    while (exact ? !now.root.done : !now.grid.done()) {
      const Tilt found = evaluate(first, last, exact ? now.root.alpha : now.grid.next(), chord, centre, log_z0);
      now = team.leader([&] {
        Search next = now;
        exact ? next.root.step(found) : next.grid.feed(found.kl);
        return next;
      });
    }
    if (exact) return {now.root.alpha, now.root.achieved, now.root.saturated};
    return {now.grid.alpha, now.grid.achieved, now.grid.saturated()};
  }

  W2S_TEAM double target_of(int k) const { return a.target_kl ? a.target_kl.at(row, k) : shared.kl[k]; }

  W2S_TEAM void set_direction() {
    if (team.thread == 0) {
      double largest = 0, u[kMaxExperts];
#pragma unroll
      for (int k = 0; k < kMaxExperts; ++k)
        if (k < a.experts) {
          u[k] = a.decoupled || a.direction_kind == 0 ? 1.0 : a.direction_kind == 1 ? target_of(k) : a.direction.at(row, k);
          largest = fmax(largest, u[k]);
        }
#pragma unroll
      for (int k = 0; k < kMaxExperts; ++k)
        if (k < a.experts)
          shared.u[k] = static_cast<float>(largest == infinity() ? (u[k] == largest ? 1.0 : 0.0)
                                           : largest > 0         ? u[k] / largest
                                                                 : (a.direction_kind == 1 ? 1.0 : 0.0));
    }
    team.sync_block();
  }

  // Weights of the row into shared.alpha and the outputs. False if one of them is NaN.
  W2S_TEAM bool weights() {
    set_direction();
    const int problems = a.decoupled ? a.experts : 1;
    double mean = 0;
    for (int k = 0; k < a.experts; ++k) mean += target_of(k) / a.experts;
    bool fine = true;
    for (int p = 0; p < problems; ++p) {
      const int first = a.decoupled ? p : 0, last = a.decoupled ? p + 1 : a.experts;
      const double target = a.decoupled ? target_of(p) : mean;
      const bool bad = target != target || base_bad || (a.decoupled ? expert_bad >> p & 1 : expert_bad) != 0;
      Solution found = {not_a_number(), not_a_number(), false};
      if (!bad) found = solve(first, last, target);
      fine = fine && found.t == found.t;
      const double share = a.decoupled && a.average ? 1.0 / a.experts : 1.0;
      if (team.thread == 0)
        for (int k = first; k < last; ++k) {
          shared.alpha[k] = static_cast<float>(found.t * share * shared.u[k]);
          if (team.rank != 0) continue;
          const int64_t at = row * a.experts + k;
          a.alpha[at] = shared.alpha[k];
          a.target[at] = static_cast<float>(target_of(k));
          a.saturated[at] = found.saturated;
          if (k == first) a.achieved[row * problems + p] = static_cast<float>(found.kl);
        }
    }
    team.sync_block();
    return fine;
  }

  // ---- filter and draw --------------------------------------------------------------------------------------------

  // Index of the first column at which the cumulative weight, in index order, exceeds goal(total)
  template <class Weight, class Goal>
  W2S_TEAM int crossing(const Weight& weight, const Goal& goal) {
    const int chunk = (slice() + team.threads - 1) / team.threads | 1;  // odd: no two lanes of a warp share a bank
    const int from = team.thread * chunk, to = from + chunk < slice() ? from + chunk : slice();
    uint64_t mine = 0;
    for (int i = from; i < to; ++i) mine += weight(i);
    const auto scan = team.before(mine);
    const uint64_t wanted = goal(scan.total);
    Best found = Best::none();
    if (scan.before <= wanted && wanted < scan.before + mine) {
      uint64_t sum = scan.before;
      int i = from;
      while (sum + weight(i) <= wanted) sum += weight(i++);
      found = {0.0f, begin + i};
    }
    return team.all(found).index;
  }

  // Prefix of the columns of `base` within `given` that reaches a count (share < 0) or a share of the mass
  W2S_TEAM Prefix prefix(const Mass& mass, const Prefix& given, double share, double count) {
    if (share >= 1.0) return given;
    const bool by_count = share < 0;
    const auto weight = [&](float z) { return by_count ? uint64_t{1} : mass(z); };
    Tallies<1> whole = Tallies<1>::none();
    each([&](int i) {
      if (base[i] > -HUGE_VALF && given.has(base[i], begin + i)) whole.v[0].weight += weight(base[i]), ++whole.v[0].count;
    });
    whole = team.all(whole);
    const double goal = by_count ? count : reached(share) * static_cast<double>(whole.v[0].weight);
    if (by_count && count >= whole.v[0].count) return given;

    Boundary edge;
    edge.begin(mass.top, whole.v[0], goal);
    while (!edge.exact() && !edge.single()) {
      uint32_t pivots[kPivots];
#pragma unroll
      for (int n = 0; n < kPivots; ++n) pivots[n] = edge.pivot(n);
      Tallies<kPivots> tally = Tallies<kPivots>::none();
      each([&](int i) {
        const float z = base[i];
        const uint32_t key = key_of(z);
        if (key > edge.low && given.has(z, begin + i)) {
          const uint64_t w = weight(z);
#pragma unroll
          for (int n = 0; n < kPivots; ++n)
            if (key > pivots[n]) tally.v[n].weight += w, ++tally.v[n].count;
        }
      });
      tally = team.all(tally);
      edge.step(pivots, tally.v);
    }
    Prefix found = {edge.high, kNoCut};
    if (!edge.exact()) {  // the one column between low and high
      Best only = Best::none();
      each([&](int i) {
        const uint32_t key = key_of(base[i]);
        if (key > edge.low && key <= edge.high && given.has(base[i], begin + i)) only = {base[i], begin + i};
      });
      only = team.all(only);
      return {key_of(only.value), only.index};
    }
    const uint64_t tie = weight(value_of(found.key));
    if (found.key == given.key) found.cut = given.cut;
    if (edge.cuts_ties(tie)) {
      const uint64_t keep = edge.ties_kept(tie);
      found.cut = crossing([&](int i) -> uint64_t { return key_of(base[i]) == found.key ? 1 : 0; },
                           [&](uint64_t) { return keep - 1; });
    }
    return found;
  }

  // z = (base + sum_k alpha_k d_k) / tau in place of base, -inf outside the plausible set
  W2S_TEAM void fuse(float tau) {
    Prefix nucleus;
    if (a.plausible == 2) nucleus = prefix(Mass(top_base, a.width), Prefix(), a.plausible_value, 0);
    const float level = a.plausible == 1 ? least_distance(a.plausible_value) : -HUGE_VALF;
    each([&](int i) {
      const float b = base[i];
      float z = b;
      for (int k = 0; k < a.experts; ++k) {
        const float d = shift[static_cast<int64_t>(k) * slice() + i], w = shared.alpha[k];
        if (w != 0 && d == d) z += w * d;
      }
      const bool out = b == -HUGE_VALF || b - top_base < level || (a.plausible == 2 && !nucleus.has(b, begin + i));
      base[i] = out ? -HUGE_VALF : z / tau;
    });
    team.sync_block();
  }

  W2S_TEAM void write(int64_t token, float logprob, float lse, int kept) const {
    if (team.thread != 0 || team.rank != 0) return;
    a.token[row] = token;
    a.logprob[row] = logprob;
    a.lse[row] = lse;
    a.kept[row] = kept;
  }

  W2S_TEAM void sample() {
    const double heat = a.temperature ? a.temperature.at(row, 0) : a.temperature_value;
    const bool greedy = heat == 0;
    fuse(greedy ? 1.0f : static_cast<float>(heat));
    Best mine = Best::none();
    each([&](int i) {
      if (base[i] > -HUGE_VALF) mine = Best::merge(mine, Best{base[i], begin + i});
    });
    const Best top = team.all(mine);
    Sums<1> sum = Sums<1>::none();
    float part = 0;
    each([&](int i) { part += expf(base[i] - top.value); });
    sum.v[0] = part;
    sum = team.all(sum);
    const double lse = top.value + log(sum.v[0]);
    const float lse_out = top.value == HUGE_VALF ? HUGE_VALF : static_cast<float>(lse);
    if (!(fabsf(lse_out) <= 3.4e38f)) return write(-1, NAN, lse_out, 0);
    if (greedy) return write(top.index, static_cast<float>(top.value - lse), lse_out, 1);

    const Mass mass(top.value, a.width);
    Prefix kept;
    for (int filter = 0; filter < 2; ++filter)  // top-k, then top-p of what it leaves
      if (filter == 0 ? a.top_k > 0 && a.top_k < a.width : a.top_p < 1.0)
        kept = prefix(mass, kept, filter == 0 ? -1.0 : a.top_p, a.top_k);
    const float floor = least_distance(a.min_p);
    const auto has = [&](int i) {
      return base[i] > -HUGE_VALF && base[i] - top.value >= floor && kept.has(base[i], begin + i);
    };
    Sums<1> count = Sums<1>::none();
    each([&](int i) { count.v[0] += has(i); });
    count = team.all(count);
    const double u = a.uniform.at(row, 0);
    const int token = crossing([&](int i) -> uint64_t { return has(i) ? mass(base[i]) : 0; },
                               [&](uint64_t total) { return draw_goal(u, total); });
    const int home = token - begin;
    if (home >= 0 && home < slice() && team.thread == 0) {  // the block that holds the token writes the row
      a.token[row] = token;
      a.logprob[row] = static_cast<float>(base[home] - lse);
      a.lse[row] = lse_out;
      a.kept[row] = static_cast<int>(count.v[0]);
    }
  }

  W2S_TEAM void run() {
    load();
    const bool fine = weights();
    if (!fine) {
      const bool empty = top_base == -HUGE_VALF && !base_nan;
      return write(-1, NAN, empty ? -HUGE_VALF : NAN, 0);
    }
    sample();
  }
};

}  // namespace w2s::fusion
