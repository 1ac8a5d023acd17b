// Torch's threads for sources that do not see torch, and how rows are cut into work.
#pragma once

#include <algorithm>
#include <cstdint>

namespace w2s {

int64_t threads();  // at least 1

// work(context, begin, end) for ranges of [0, count) of at least `grain`, in parallel; an exception of a range comes back.
void parallel_call(int64_t count, int64_t grain, void (*work)(const void*, int64_t, int64_t), const void* context);

template <class F>
inline void parallel_ranges(int64_t count, int64_t grain, const F& work) {
  parallel_call(count, grain, [](const void* f, int64_t begin, int64_t end) { (*static_cast<const F*>(f))(begin, end); }, &work);
}

// work(i) for i in [0, count)
template <class F>
inline void parallel_items(int64_t count, int64_t grain, const F& work) {
  parallel_ranges(count, grain, [&work](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(i);
  });
}

inline int64_t pieces(int64_t n, int64_t of) { return (n + of - 1) / of; }
inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Work is cut into (row, segment) items of fixed size, so that results do not depend on the number of threads.
constexpr int64_t SEGMENT = 8192;
inline int64_t segments(int64_t V) { return pieces(V, SEGMENT); }

// Items of `elements` each that a thread is woken for: waking it takes as long as going over some ten thousand elements.
constexpr int64_t WORTH = 16384;
inline int64_t grain_of(int64_t elements) { return std::max<int64_t>(1, WORTH / std::max<int64_t>(elements, 1)); }
inline int64_t segment_grain(int64_t row) { return grain_of(std::min(row, SEGMENT)); }

}  // namespace w2s
