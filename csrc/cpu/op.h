// How an implementation meets the dispatcher, through torch's stable ABI.
//
//     W2S_IMPLEMENTATIONS(m) { m.add<&w2s::spmm>("spmm"); }
//
// The type of a parameter says how the implementation reads it, and that is made true before it runs:
//     Tensor    contiguous: copied if it is not. The default, so that what is forgotten costs a copy, not a wrong result.
//     Rowwise   columns next to each other, outer strides free: copied if the last dimension has another stride than 1.
//     Strided   as it comes; the implementation honours every stride.
// Each of them also as std::optional and as a list (Tensors, RowwiseTensors). A parameter may be a group: a plain struct,
// whose fields are filled from as many arguments. Schemas stand in Python and the stable ABI does not check them: each
// implementation's types are kept, and tests/test_contract.py compares them.
#pragma once

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace w2s {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

struct Rowwise : Tensor {};
struct Strided : Tensor {};
struct RowwiseTensors : Tensors {};

// An error that the caller sees as "w2s_fast.<op>: <message>".
struct Refusal : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// A message is built only where it is needed: check(ok, [&] { return "y must be ..."; }), or a literal.
template <class Message>
inline void check(bool ok, const Message& message) {
  if (ok) return;
  if constexpr (std::is_invocable_v<Message>) throw Refusal(message());
  else throw Refusal(message);
}

inline Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
inline Tensor with_rows(const Tensor& t) {
  const int64_t n = t.dim();
  return n == 0 || t.size(n - 1) <= 1 || t.stride(n - 1) == 1 ? t : torch::stable::contiguous(t);
}

// What a parameter is in a schema, what the dispatcher gives for it, and how that becomes it.
template <class T>
struct Parameter;
template <class T, class G = T>
struct AsGiven {
  using Given = G;
  static T take(G given) { return given; }
};
template <>
struct Parameter<double> : AsGiven<double> { static constexpr const char* type = "float"; };
template <>
struct Parameter<int64_t> : AsGiven<int64_t> { static constexpr const char* type = "int"; };
template <>
struct Parameter<bool> : AsGiven<bool> { static constexpr const char* type = "bool"; };
template <>
struct Parameter<std::string> : AsGiven<std::string> { static constexpr const char* type = "str"; };
template <>
struct Parameter<ScalarType> : AsGiven<ScalarType> { static constexpr const char* type = "ScalarType"; };
template <>
struct Parameter<std::vector<double>> : AsGiven<std::vector<double>> { static constexpr const char* type = "float[]"; };
template <>
struct Parameter<std::vector<int64_t>> : AsGiven<std::vector<int64_t>> { static constexpr const char* type = "int[]"; };
template <>
struct Parameter<Tensor> {
  using Given = Tensor;
  static constexpr const char *type = "Tensor", *optional = "Tensor?";
  static Tensor take(const Tensor& t) { return packed(t); }
};
template <>
struct Parameter<Rowwise> : Parameter<Tensor> {
  static Rowwise take(const Tensor& t) { return {with_rows(t)}; }
};
template <>
struct Parameter<Strided> : Parameter<Tensor> {
  static Strided take(const Tensor& t) { return {t}; }
};
template <class T>
struct Parameter<std::optional<T>> {
  using Given = std::optional<typename Parameter<T>::Given>;
  static constexpr const char* type = Parameter<T>::optional;
  static std::optional<T> take(const Given& t) {
    if (!t) return std::nullopt;
    return Parameter<T>::take(*t);
  }
};
template <>
struct Parameter<Tensors> {
  using Given = Tensors;
  static constexpr const char* type = "Tensor[]";
  static Tensors take(Tensors list) {
    for (Tensor& t : list) t = packed(t);
    return list;
  }
};
template <>
struct Parameter<RowwiseTensors> : Parameter<Tensors> {
  static RowwiseTensors take(Tensors list) {
    for (Tensor& t : list) t = with_rows(t);
    return {std::move(list)};
  }
};

// A group: a plain struct that says how many fields it has. Its fields' types, in order:
template <class T>
concept Group = requires { T::arguments; };
template <class... F>
struct List {};
template <Group T>
auto fields_of(T& group) {
  const auto list = []<class... F>(F&...) { return List<F...>(); };
#define W2S_FIELDS(n, ...)             \
  if constexpr (T::arguments == n) {   \
    auto& [__VA_ARGS__] = group;       \
    return list(__VA_ARGS__);          \
  }
  W2S_FIELDS(4, a, b, c, d)
  W2S_FIELDS(7, a, b, c, d, e, f, g)
  W2S_FIELDS(8, a, b, c, d, e, f, g, h)
  W2S_FIELDS(9, a, b, c, d, e, f, g, h, i)
  W2S_FIELDS(11, a, b, c, d, e, f, g, h, i, j, k)
  W2S_FIELDS(13, a, b, c, d, e, f, g, h, i, j, k, l, m)
#undef W2S_FIELDS
}
template <Group T>
using FieldsOf = decltype(fields_of(std::declval<T&>()));

// Appends to a text, or counts where there is none.
constexpr size_t append(char* to, size_t at, const char* piece) {
  for (; *piece; ++piece, ++at)
    if (to) to[at] = *piece;
  return at;
}

// A parameter: how many arguments it takes from the stack, and their types, each with ", " behind it.
template <class T>
struct Argument {
  static constexpr size_t count = 1;
  static T take(const StableIValue*& at) { return Parameter<T>::take(torch::stable::detail::to<typename Parameter<T>::Given>(*at++)); }
  static constexpr size_t types(char* to, size_t at) { return append(to, append(to, at, Parameter<T>::type), ", "); }
};
template <class... F>
struct Argument<List<F...>> {
  static constexpr size_t count = sizeof...(F);
  static constexpr size_t types(char* to, size_t at) {
    ((at = Argument<F>::types(to, at)), ...);
    return at;
  }
};
template <Group T>
struct Argument<T> : Argument<FieldsOf<T>> {
  template <class... F>
  static T fill(List<F...>, const StableIValue*& at) { return T{Argument<F>::take(at)...}; }
  static T take(const StableIValue*& at) { return fill(FieldsOf<T>(), at); }
};

template <class R>
struct Returned {
  static constexpr size_t count = 1;
  static void put(StableIValue* stack, R r) { *stack = torch::stable::detail::from(std::move(r)); }
  static constexpr size_t types(char* to, size_t at) { return Argument<R>::types(to, at); }
};
template <>
struct Returned<void> {
  static constexpr size_t count = 0;
  static constexpr size_t types(char*, size_t at) { return at; }
};
template <class... R>
struct Returned<std::tuple<R...>> {
  static constexpr size_t count = sizeof...(R);
  static void put(StableIValue* stack, std::tuple<R...> all) {
    std::apply([&](R&... r) { ((*stack++ = torch::stable::detail::from(std::move(r))), ...); }, all);
  }
  static constexpr size_t types(char* to, size_t at) { return Argument<List<R...>>::types(to, at); }
};

// What both sides of an implementation are checked for, out of line: a call that does not fit, and an error's name.
[[noreturn]] void wrong_count(const char* op, size_t wanted, uint64_t given);
[[noreturn]] void refused(const char* op, const Refusal& error);

template <auto function>
struct Implementation;
template <class R, class... P, R (*function)(P...)>
struct Implementation<function> {
  static inline const char* name = "";

  static void call(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
    constexpr size_t wanted = (Argument<P>::count + ... + 0);
    if (inputs != wanted) wrong_count(name, wanted, inputs);
    if (outputs != Returned<R>::count) wrong_count(name, Returned<R>::count, outputs);
    const StableIValue* at = stack;
    std::tuple<P...> arguments{Argument<P>::take(at)...};  // in order
    try {
      if constexpr (std::is_void_v<R>) std::apply(function, std::move(arguments));
      else Returned<R>::put(stack, std::apply(function, std::move(arguments)));
    } catch (const Refusal& error) {
      refused(name, error);
    }
  }

  // "Tensor, float, -> Tensor, "
  static constexpr size_t write(char* to) {
    size_t at = 0;
    ((at = Argument<P>::types(to, at)), ...);
    return Returned<R>::types(to, append(to, at, "-> "));
  }
  static constexpr auto types = [] {
    std::array<char, write(nullptr) + 1> text{};
    write(text.data());
    return text;
  }();
};

// What W2S_IMPLEMENTATIONS hands out.
class Implementations {
 public:
  explicit Implementations(torch::stable::detail::StableLibrary& library) : library(library) {}
  template <auto function>
  void add(const char* op) {
    using I = Implementation<function>;
    I::name = op;
    add(op, I::types.data(), &I::call);
  }

 private:
  torch::stable::detail::StableLibrary& library;
  void add(const char* op, const char* types, void (*call)(StableIValue*, uint64_t, uint64_t));
};

#define W2S_IMPLEMENTATIONS(m)                                  \
  static void w2s_implementations(::w2s::Implementations&&);    \
  STABLE_TORCH_LIBRARY_IMPL(w2s_fast, CPU, library) {           \
    w2s_implementations(::w2s::Implementations(library));       \
  }                                                             \
  static void w2s_implementations(::w2s::Implementations&& m)

}  // namespace w2s
