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
#include <concepts>
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

// What a function of torch's C interface returns; it has said on stderr what was wrong.
inline void library_call(int32_t error) {
  if (error != 0) throw std::runtime_error("w2s_fast: a function of torch failed");
}

// What a parameter is in a schema.
template <class T>
inline constexpr const char* type_of = nullptr;
template <>
inline constexpr const char* type_of<double> = "float";
template <>
inline constexpr const char* type_of<int64_t> = "int";
template <>
inline constexpr const char* type_of<bool> = "bool";
template <>
inline constexpr const char* type_of<std::string> = "str";
template <>
inline constexpr const char* type_of<ScalarType> = "ScalarType";
template <>
inline constexpr const char* type_of<std::vector<double>> = "float[]";
template <>
inline constexpr const char* type_of<std::vector<int64_t>> = "int[]";
template <std::derived_from<Tensor> T>
inline constexpr const char* type_of<T> = "Tensor";
template <std::derived_from<Tensor> T>
inline constexpr const char* type_of<std::optional<T>> = "Tensor?";
template <std::derived_from<Tensors> T>
inline constexpr const char* type_of<T> = "Tensor[]";

// A parameter of what the dispatcher gives for it, and what it wants for a result. In op.cpp, once for all ops: there is much
// of torch in them.
template <class T>
T taken(StableIValue given);
StableIValue handed(Tensor result);
StableIValue handed(Tensors results);

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
  W2S_FIELDS(2, a, b)
  W2S_FIELDS(3, a, b, c)
  W2S_FIELDS(4, a, b, c, d)
  W2S_FIELDS(5, a, b, c, d, e)
  W2S_FIELDS(6, a, b, c, d, e, f)
  W2S_FIELDS(7, a, b, c, d, e, f, g)
  W2S_FIELDS(8, a, b, c, d, e, f, g, h)
  W2S_FIELDS(9, a, b, c, d, e, f, g, h, i)
  W2S_FIELDS(10, a, b, c, d, e, f, g, h, i, j)
  W2S_FIELDS(11, a, b, c, d, e, f, g, h, i, j, k)
  W2S_FIELDS(12, a, b, c, d, e, f, g, h, i, j, k, l)
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
  static T take(const StableIValue*& at) { return taken<T>(*at++); }
  static constexpr size_t types(char* to, size_t at) { return append(to, append(to, at, type_of<T>), ", "); }
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
  static void put(StableIValue* stack, R r) { *stack = handed(std::move(r)); }
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
    std::apply([&](R&... r) { ((*stack++ = handed(std::move(r))), ...); }, all);
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
