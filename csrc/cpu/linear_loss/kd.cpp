// kd_loss: one row kernel, loss and gradient together, on a row of logits or on a vector of short rows. linear_kd: chunks
// of rows, one product a model into a tile, the same row kernel in place, two products that spend the gradient.
#include "cpu/linear_loss/kd.h"

#include "cpu/linear_loss/chunks.h"

namespace w2s {
namespace linear {
namespace {

struct KdArguments {
  RowwiseTensors teachers;
  std::vector<int64_t> forms;
  std::vector<double> shares;
  int64_t kind;
  double tau, beta, power;
  std::optional<Tensor> target, keep;
  Tensor coef_kd;
  std::optional<Tensor> coef_ce;
  static constexpr int arguments = 11;
};

struct Given {  // a teacher: its tensors, and for a linear one the tile that holds its logits
  KdForm form;
  double share;
  Tensors tensors;
  Rows rows, ids;
};

// Arguments that both ops have.
struct Distillation {
  int64_t T;
  KdLoss loss;
  std::vector<Given> teachers;
  const int64_t* target = nullptr;
  std::vector<double> coef_kd, coef_ce;
  std::vector<int64_t> index;  // rows that count
  bool f64;

  Distillation(const Tensor& student, int64_t V, bool gradient, bool statistics, const KdArguments& kd)
      : T(student.size(0)), loss{V, KdKind(kd.kind), kd.tau, kd.beta, kd.power, kd.coef_ce && kd.target, gradient, statistics},
        coef_kd(numbers(kd.coef_kd)), coef_ce(numbers(kd.coef_ce)), f64(is_double(student)) {
    size_t at = 0;
    for (size_t m = 0; m < kd.forms.size(); ++m) {
      Given g{KdForm(kd.forms[m]), kd.shares[m], {}, {}, {}};
      const int count = g.form == LOGITS || g.form == PROBS ? 1 : g.form == LINEAR_BIAS ? 3 : 2;
      for (int i = 0; i < count; ++i) {
        g.tensors.push_back(kd.teachers[at++]);
        f64 |= is_double(g.tensors.back());
      }
      if (g.form == TOPK) {
        g.ids.data = static_cast<char*>(g.tensors[0].data_ptr());
        g.ids.stride = g.tensors[0].size(0) > 1 ? g.tensors[0].stride(0) * 8 : 0;
        g.ids.bytes = 8;
        g.rows = Rows(g.tensors[1]);
      } else if (g.form == LOGITS || g.form == PROBS) {
        g.rows = Rows(g.tensors[0]);
      }
      teachers.push_back(std::move(g));
    }
    if (loss.hard) target = integers<int64_t>(*kd.target);
    const bool* kept = kd.keep ? integers<bool>(*kd.keep) : nullptr;
    index.reserve(size_t(T));
    for (int64_t t = 0; t < T; ++t)
      if (!kept || kept[t]) index.push_back(t);
    check_ids();
  }

  // Under torch.compile nobody has looked at them yet, and they are places to read and to write.
  void check_ids() const {
    const auto inside = [&](const char* what, int64_t id) {
      check(id >= 0 && id < loss.V, [&] {
        return std::string(what) + " must be in [0, " + std::to_string(loss.V) + "), got " + std::to_string(id) + ".";
      });
    };
    for (int64_t t : index) {
      if (target) inside("target", target[t]);
      for (const Given& g : teachers)
        for (int64_t k = 0; g.form == TOPK && k < g.tensors[0].size(1); ++k)
          inside("ids of a top-k teacher", reinterpret_cast<const int64_t*>(g.ids.at(t, 0))[k]);
    }
  }

  // Whether a vector of rows at a time is worked on; a top-k list and statistics are taken row by row.
  bool has_short_rows() const {
    bool all = loss.V <= KD_SHORT && !loss.statistics;
    for (const Given& g : teachers) all = all && (g.form == LOGITS || g.form == PROBS);
    return all;
  }

  // Row t; sources of linear teachers are left to the caller.
  KdRow row(int64_t t, std::vector<RowTeacher>& own) const {
    own.clear();
    for (const Given& g : teachers) {
      RowTeacher r{g.form, g.share, {}, nullptr, 0};
      if (g.form == LOGITS || g.form == PROBS || g.form == TOPK) r.values = {g.rows.at(t, 0), g.rows.dtype, nullptr};
      if (g.form == TOPK) {
        r.ids = static_cast<const int64_t*>(g.ids.at(t, 0));
        r.K = g.tensors[0].size(1);
      }
      own.push_back(r);
    }
    return {loss, coef_kd[size_t(t)], target ? coef_ce[size_t(t)] : 0.0, target ? target[t] : -1, {}, own.data(), int(own.size())};
  }
};

template <class A>
struct Results {
  Tensor loss, kd, ce, stats;
  A *d, *c, *s = nullptr;
  int64_t T;

  Results(const Tensor& like, const Distillation& given)
      : loss(make(like, {})), kd(make(like, {given.T})), ce(make(like, {given.T})),
        stats(given.loss.statistics ? make(like, {3, given.T}) : make(like, {0})), T(given.T) {
    d = static_cast<A*>(kd.data_ptr());
    c = static_cast<A*>(ce.data_ptr());
    if (given.loss.statistics) s = static_cast<A*>(stats.data_ptr());
    if (int64_t(given.index.size()) == T) return;  // every row is written
    std::fill(d, d + T, A(0));
    std::fill(c, c + T, A(0));
    if (s) std::fill(s, s + 3 * T, A(0));
  }
  static Tensor make(const Tensor& like, std::vector<int64_t> shape) { return fresh(like, shape, scalar_type<A>); }

  void put(int64_t t, const KdResult& r) {
    d[t] = A(r.kd);
    c[t] = A(r.ce);
    if (!s) return;
    s[t] = A(r.entropy_student);
    s[T + t] = A(r.entropy_teacher);
    s[2 * T + t] = A(r.agree);
  }
  void sum(const Distillation& given) {  // in the order of the rows, whatever the threads
    double total = 0;
    for (int64_t t : given.index)
      total += given.coef_kd[size_t(t)] * double(d[t]) + (given.target ? given.coef_ce[size_t(t)] * double(c[t]) : 0.0);
    *static_cast<A*>(loss.data_ptr()) = A(total);
  }
};

// work(row to fill in, its teachers, m, buffers) for every row in [0, count) of the list, in parallel
template <class A, class F>
void each_row(int64_t count, int64_t V, const F& work) {
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(V, 1));
  parallel_ranges(count, grain, [&](int64_t begin, int64_t end) {
    A* buffers = scratch_of<A>(2, KD_BUFFERS * kd_width(V));
    std::vector<RowTeacher> own;
    for (int64_t m = begin; m < end; ++m) work(m, own, buffers);
  });
}

using Rows4 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class A>
Rows4 kd_rows(const Tensor& logits, const Distillation& given) {
  const int64_t V = given.loss.V, count = int64_t(given.index.size());
  const bool gradient = given.loss.gradient;
  Results<A> out(logits, given);
  Tensor dlogits = gradient ? fresh(logits, {given.T, V}) : fresh(logits, {0});
  if (gradient && count < given.T) torch::stable::zero_(dlogits);
  const Rows student(logits);
  Rows to = student;
  to.data = static_cast<char*>(dlogits.data_ptr());
  to.stride = V * to.bytes;
  if (given.has_short_rows()) {
    std::vector<KdSource> teachers;
    for (const Given& g : given.teachers) teachers.push_back({g.form, g.share, g.rows});
    const KdRows rows{given.loss, given.index.data(), given.coef_kd.data(), given.coef_ce.data(), given.target,
                      student, teachers.data(), int(teachers.size()), to};
    parallel_ranges(count, 16 * std::max<int64_t>(1, 1024 / V), [&](int64_t begin, int64_t end) {
      A* buffers = scratch_of<A>(2, KD_BUFFERS * kd_short_width(V));
      kernels<KdKernels, A>().short_rows(rows, begin, end, buffers, out.d, out.c);
    });
  } else {
    each_row<A>(count, V, [&](int64_t m, std::vector<RowTeacher>& own, A* buffers) {
      const int64_t t = given.index[size_t(m)];
      KdRow row = given.row(t, own);
      row.student = {student.at(t, 0), student.dtype, nullptr};
      out.put(t, kernels<KdKernels, A>().row(row, buffers, to.at(t, 0), student.dtype));
    });
  }
  out.sum(given);
  return {out.loss, out.kd, out.ce, out.stats, dlogits};
}

Rows4 kd_loss(Rowwise logits, KdArguments kd, bool need_gradient, bool need_statistics) {
  const Distillation given(logits, logits.size(1), need_gradient, need_statistics, kd);
  return with_type(given.f64, [&](auto zero) { return kd_rows<decltype(zero)>(logits, given); });
}

using Linear7 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct Need {
  bool hidden, head, bias;
};

template <class A>
Linear7 linear_rows(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Distillation& given, Need need) {
  const int64_t V = weight.size(0);
  CallMemory memory{hidden, {}};
  const Head<A> student(memory, hidden, weight, bias ? &*bias : nullptr, V, given.index);
  std::vector<Head<A>> heads;
  for (const Given& g : given.teachers)
    if (g.form >= LINEAR)
      heads.emplace_back(memory, g.tensors[0], g.tensors[1], g.form == LINEAR_BIAS ? &g.tensors[2] : nullptr, V, given.index);
  const Chunks chunks(student.M, V, 1 + int64_t(heads.size()), int64_t(sizeof(A)), student.sum_of_chunks(need.head));
  const int64_t ld = chunks.ld;
  std::vector<A*> tiles;
  for (size_t i = 0; i <= heads.size(); ++i) tiles.push_back(memory.get<A>(chunks.size * ld));
  Results<A> out(hidden, given);
  Spend<A> spend(memory, student, hidden, weight, bias ? &*bias : nullptr, need.hidden, need.head, need.bias, chunks.pieces());
  for (int64_t first = 0; first < student.M; first += chunks.size) {
    const int64_t count = std::min(chunks.size, student.M - first);
    student.logits(first, count, tiles[0], ld);
    for (size_t i = 0; i < heads.size(); ++i) heads[i].logits(first, count, tiles[i + 1], ld);
    each_row<A>(count, V, [&](int64_t m, std::vector<RowTeacher>& own, A* buffers) {
      const int64_t t = given.index[size_t(first + m)];
      KdRow row = given.row(t, own);
      row.student = {tiles[0] + m * ld, own_dtype<A>, student.bias};
      size_t next = 0;
      for (RowTeacher& r : own)
        if (r.form >= LINEAR) {
          r.values = {tiles[next + 1] + m * ld, own_dtype<A>, heads[next].bias};
          ++next;
        }
      out.put(t, kernels<KdKernels, A>().row(row, buffers, tiles[0] + m * ld, spend.dtype));
    });
    if (spend.any()) spend.chunk(first, count, tiles[0], ld, first + count == student.M);
  }
  spend.finish(given.index);
  out.sum(given);
  return {out.loss, out.kd, out.ce, out.stats, spend.dhidden, spend.dhead, spend.dbias};
}

Linear7 linear_kd(Rowwise hidden, Rowwise head, std::optional<Tensor> bias, KdArguments kd, bool need_hidden, bool need_head,
                  bool need_bias, bool need_statistics) {
  const Need need{need_hidden, need_head, need_bias};
  const bool gradient = need_hidden || need_head || need_bias;
  const Distillation given(hidden, head.size(0), gradient, need_statistics, kd);
  return with_type(given.f64, [&](auto zero) { return linear_rows<decltype(zero)>(hidden, head, bias, given, need); });
}

}  // namespace
}  // namespace linear
}  // namespace w2s

W2S_IMPLEMENTATIONS(m) {
  m.add<&w2s::linear::kd_loss>("kd_loss");
  m.add<&w2s::linear::linear_kd>("linear_kd");
}
