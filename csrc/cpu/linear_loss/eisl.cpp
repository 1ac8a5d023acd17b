// linear_eisl: chunks of whole sentences; a product into a tile of logits, exponentials in place, the n-grams of each
// sentence, the gradient in place, two products that spend it.
#include "cpu/linear_loss/eisl.h"

#include "cpu/linear_loss/chunks.h"

namespace w2s {
namespace linear {
namespace {

struct Eisl {
  int64_t B, T, U;
  std::vector<int64_t> ngrams;
  std::vector<double> weights;
  double tau, floor, ngram_coef, ce_coef;
  bool logsumexp;
  const int64_t* target;
  Tensors noise;
  const bool *source = nullptr, *wanted = nullptr;  // masks, or null
  std::vector<int64_t> index, begin;                // rows that count; where each sentence's begin
  int64_t pairs = 0;                                // positions that count in both

  bool kept(const bool* mask, int64_t at) const { return !mask || mask[at]; }
  void check_target(int64_t V) const {  // under torch.compile nobody has looked at it yet, and it is a place to read
    for (int64_t i = 0; i < B * U; ++i)
      check(!kept(wanted, i) || (target[i] >= 0 && target[i] < V), [&] {
        return "target must be in [0, " + std::to_string(V) + "), got " + std::to_string(target[i]) + ".";
      });
  }
  void list_rows() {
    for (int64_t b = 0; b < B; ++b) {
      begin.push_back(int64_t(index.size()));
      for (int64_t t = 0; t < T; ++t) {
        if (!kept(source, b * T + t)) continue;
        index.push_back(b * T + t);
        pairs += t < U && kept(wanted, b * U + t);
      }
    }
    begin.push_back(int64_t(index.size()));
  }
  Sentence sentence(int64_t b) const {
    return {T, U, source ? source + b * T : nullptr, wanted ? wanted + b * U : nullptr, tau, floor, logsumexp};
  }
  std::vector<Ngram> sizes(int64_t b) const {
    std::vector<Ngram> found;
    for (size_t k = 0; k < ngrams.size(); ++k) {
      const int64_t n = ngrams[k];
      Ngram g{n, ngram_coef * weights[k] / double(B), {}};
      if (!noise.empty()) {
        g.noise.dtype = dtype_of(noise[k]);
        g.noise.data = static_cast<char*>(noise[k].data_ptr()) + b * (T - n + 1) * (U - n + 1) * bytes_of(g.noise.dtype);
      }
      found.push_back(g);
    }
    return found;
  }
};

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class A>
Outputs run(const Eisl& e, const Tensor& hidden, const Tensor& flat, const Tensor& weight, const std::optional<Tensor>& bias,
            bool need_hidden, bool need_head, bool need_bias) {
  const int64_t V = weight.size(0), raw_ld = eisl_width(e.U), count = int64_t(e.ngrams.size());
  CallMemory memory{hidden, {}};
  const Head<A> head(memory, flat, weight, bias ? &*bias : nullptr, V, e.index);
  const Chunks chunks(head.M, V, 1, int64_t(sizeof(A)), head.sum_of_chunks(need_head));
  const auto last_of = [&](int64_t b) {  // sentences [b, last) whose rows fit a chunk; at least one
    int64_t last = b + 1;
    while (last < e.B && e.begin[size_t(last + 1)] - e.begin[size_t(b)] <= chunks.size) ++last;
    return last;
  };
  int64_t rows = 0, sentences = 0, pieces = 0;
  for (int64_t b = 0; b < e.B; b = last_of(b)) {
    sentences = std::max(sentences, last_of(b) - b);
    rows = std::max(rows, e.begin[size_t(last_of(b))] - e.begin[size_t(b)]);
    ++pieces;
  }
  A* tile = memory.get<A>(rows * chunks.ld);
  A* raw = memory.get<A>(sentences * e.T * raw_ld);
  std::vector<double> inverse(static_cast<size_t>(rows)), losses(size_t(e.B * count)), diagonal(size_t(e.B), 0.0);
  Spend<A> spend(memory, head, flat, weight, bias ? &*bias : nullptr, need_hidden, need_head, need_bias, pieces);
  for (int64_t b = 0; b < e.B;) {
    const int64_t last = last_of(b), first = e.begin[size_t(b)], in_chunk = e.begin[size_t(last)] - first;
    const auto place = [&](int64_t m, int64_t& s, int64_t& t) {  // sentence of the chunk and position of its row m
      s = e.index[size_t(first + m)] / e.T - b;
      t = e.index[size_t(first + m)] % e.T;
    };
    const auto mask = [&](int64_t s) { return e.wanted ? e.wanted + (b + s) * e.U : nullptr; };
    head.logits(first, in_chunk, tile, chunks.ld);
    std::fill(raw, raw + (last - b) * e.T * raw_ld, A(0));
    parallel_items(in_chunk, 1, [&](int64_t m) {
      int64_t s, t;
      place(m, s, t);
      inverse[size_t(m)] = kernels<EislKernels, A>().row(tile + m * chunks.ld, V, head.bias, e.target + (b + s) * e.U, mask(s), e.U,
                                                     raw + (s * e.T + t) * raw_ld);
    });
    parallel_items(last - b, 1, [&](int64_t s) {
      A* working = scratch_of<A>(2, eisl_scratch(e.T, e.U));
      const std::vector<Ngram> sizes = e.sizes(b + s);
      diagonal[size_t(b + s)] = kernels<EislKernels, A>().sentence(
          e.sentence(b + s), sizes.data(), count, e.ce_coef / double(std::max<int64_t>(e.pairs, 1)), raw + s * e.T * raw_ld, working,
          losses.data() + (b + s) * count);
    });
    if (spend.any()) {
      parallel_items(in_chunk, 1, [&](int64_t m) {
        int64_t s, t;
        place(m, s, t);
        kernels<EislKernels, A>().gradient(tile + m * chunks.ld, V, inverse[size_t(m)], e.target + (b + s) * e.U, mask(s), e.U,
                                       raw + (s * e.T + t) * raw_ld, spend.dtype);
      });
      if (in_chunk) spend.chunk(first, in_chunk, tile, chunks.ld, e.begin[size_t(last)] == head.M);
    }
    b = last;
  }
  spend.finish(e.index);
  Tensor loss = fresh(hidden, {}, scalar_type<A>), parts = fresh(hidden, {count + 1}, scalar_type<A>);
  A* part = static_cast<A*>(parts.data_ptr());
  double total = 0, ce = 0;
  for (int64_t k = 0; k < count; ++k) {
    double sum = 0;
    for (int64_t b = 0; b < e.B; ++b) sum += losses[size_t(b * count + k)] / double(e.B);
    part[k] = A(sum);
    total += e.ngram_coef * e.weights[size_t(k)] * sum;
  }
  for (double d : diagonal) ce -= d / double(std::max<int64_t>(e.pairs, 1));
  part[count] = A(ce);
  *static_cast<A*>(loss.data_ptr()) = A(total + e.ce_coef * ce);
  const Tensor dhidden = need_hidden ? torch::stable::view(spend.dhidden, {e.B, e.T, head.D}) : spend.dhidden;
  return {loss, parts, dhidden, spend.dhead, spend.dbias};
}

Outputs linear_eisl(Tensor hidden, Rowwise head, std::optional<Tensor> bias, Tensor target, std::vector<int64_t> ngrams,
                    std::vector<double> weights, double tau, bool logsumexp, double floor, Tensors noise,
                    std::optional<Tensor> src_keep, std::optional<Tensor> tgt_keep, double ngram_coef, double ce_coef,
                    bool need_hidden, bool need_head, bool need_bias) {
  Eisl e{hidden.size(0), hidden.size(1), target.size(1), ngrams, weights, tau, floor, ngram_coef, ce_coef, logsumexp,
         integers<int64_t>(target), noise, nullptr, nullptr, {}, {}, 0};
  if (src_keep) e.source = integers<bool>(*src_keep);
  if (tgt_keep) e.wanted = integers<bool>(*tgt_keep);
  e.check_target(head.size(0));
  e.list_rows();
  const Tensor flat = torch::stable::flatten(hidden, 0, 1);  // contiguous, so a view
  return with_type(is_double(hidden), [&](auto zero) {
    return run<decltype(zero)>(e, hidden, flat, head, bias, need_hidden, need_head, need_bias);
  });
}

}  // namespace
}  // namespace linear
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) { m.add<&w2s::linear::linear_eisl>("linear_eisl"); }
