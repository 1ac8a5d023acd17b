// w2s_fast._call: a call of a public function that is like one before, in a fraction of a microsecond.
//
// `Calls` remembers calls by what is looked at of their arguments (calibration.py: `exactly`): of a tensor its type,
// shape, dtype, layout and whether it wants a gradient, of an option its value. It knows what each kind of call does:
// plain PyTorch, ours, or one kernel at once, whose arguments are the caller's tensors, or those seen in another shape,
// and constants (replay.py). A call with a gradient leaves a `Gradient` behind, a node of the graph whose backward is
// the list of ops that Python's was seen to call (gradients.py: `Attachment`). What it has not seen, and calls that
// others look on at (autocast, modes, torch.func, profilers, hooks), it leaves to Python, which is always right; and a
// backward that it has not seen. It is made of torch's own C++ and Python interfaces, for the torch of the build.
// fuse_logits on 16 elements: 2.8 us, where Python's replay took 6.1 and the op 12.9, and torch.add 1.2 (AMD EPYC,
// family 25); a call that is known to take plain PyTorch: 0.7.
#include <ATen/Context.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/object_ptr.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using torch::autograd::create_gradient_edge;
using torch::autograd::Edge;
using torch::autograd::edge_list;
using torch::autograd::impl::get_autograd_meta;
using torch::autograd::impl::gradient_edge;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

using Words = std::vector<int64_t>;
using Shape = std::vector<int64_t>;

enum Tag : int64_t { kNone = 1, kTensor, kBool, kInt, kFloat, kObject, kSequence, kName };

struct Hash {
  size_t operator()(const Words& words) const {
    uint64_t h = 1469598103934665603u;
    for (const int64_t word : words) h = (h ^ static_cast<uint64_t>(word)) * 1099511628211u, h ^= h >> 29;
    return h;
  }
};

// All that a plain tensor on a CPU may have; whatever is more wants the dispatcher.
constexpr c10::DispatchKeySet kPlain = c10::DispatchKeySet(c10::DispatchKey::CPU) |
                                       c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                                       c10::autocast_dispatch_keyset |
                                       c10::DispatchKeySet(c10::DispatchKey::AutogradCPU);
const c10::DispatchKeySet kCpu(c10::DispatchKey::CPU);

// Whether nobody looks on at a backward either: no autocast, transform, mode or profiler.
bool nobody_watches(bool inference_too) {
  const auto tls = c10::impl::tls_local_dispatch_key_set();
  const bool usual = tls.included_ == c10::default_included_set && tls.excluded_ == c10::default_excluded_set;
  const bool inference = tls.included_ == c10::default_included_set.remove(c10::DispatchKey::ADInplaceOrView) &&
                         tls.excluded_ == (c10::default_excluded_set | c10::autograd_dispatch_keyset);
  if (!usual && !(inference && inference_too)) return false;
  return !at::impl::torch_function_mode_enabled() && !at::hasCallbacks() &&
         !at::globalContext().deterministicAlgorithms();
}

// Whether nobody looks on: what `alone` and `Op.run` of the package ask, in one look each. In inference mode too.
bool nobody_looks_on(PyObject* forward_ad, PyObject* level_name) {
  if (!nobody_watches(true)) return false;
  if (!at::SavedTensorDefaultHooks::is_enabled()) return false;
  if (!at::SavedTensorDefaultHooks::get_tls_state().stack.empty()) return false;
  PyObject* level = PyDict_GetItemWithError(forward_ad, level_name);
  return level != nullptr && PyLong_Check(level) && PyLong_AsLong(level) < 0;
}

// Whether it is a tensor as most are: on a CPU, nobody's subclass, no view to be negated, with memory of its own.
bool plain(const at::Tensor& t, bool empty_too = false) {
  const c10::TensorImpl* impl = t.unsafeGetTensorImpl();
  const auto keys = impl->key_set();
  if ((keys.raw_repr() & ~kPlain.raw_repr()) != 0 || !keys.has(c10::DispatchKey::CPU)) return false;
  return impl->has_storage() && (impl->storage().data() != nullptr || (empty_too && impl->numel() == 0));
}

// The same elements in another shape, without a history; both must be contiguous.
at::Tensor reshaped(const at::Tensor& t, const Shape& shape) {
  const c10::TensorImpl* impl = t.unsafeGetTensorImpl();
  auto seen = impl->shallow_copy_and_detach(impl->version_counter(), /*allow_tensor_metadata_change=*/true);
  seen->set_sizes_contiguous(shape);
  return at::Tensor(std::move(seen));
}

// Appends what is looked at of an argument; false where no two calls are compared by it, or if it is no plain tensor.
bool describe(PyObject* value, Words& to) {
  if (value == Py_None) return to.push_back(kNone), true;
  PyTypeObject* type = Py_TYPE(value);
  if (THPVariable_CheckTypeExact(type)) {
    const at::Tensor& t = THPVariable_Unpack(value);
    if (!plain(t)) return false;
    const c10::TensorImpl* impl = t.unsafeGetTensorImpl();
    const auto sizes = impl->sizes();
    const int64_t marks = t.requires_grad() | impl->is_contiguous() << 1;
    const auto dtype = static_cast<int64_t>(t.scalar_type()), dims = static_cast<int64_t>(sizes.size());
    to.push_back(kTensor | marks << 8 | dtype << 16 | dims << 32);
    to.insert(to.end(), sizes.begin(), sizes.end());
    return true;
  }
  if (type == &PyBool_Type) return to.push_back(kBool | (value == Py_True) << 8), true;
  if (type == &PyLong_Type) {
    int overflow = 0;
    const int64_t number = PyLong_AsLongLongAndOverflow(value, &overflow);
    if (overflow) return false;
    return to.push_back(kInt), to.push_back(number), true;
  }
  if (type == &PyFloat_Type) {
    const double number = PyFloat_AS_DOUBLE(value);
    int64_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    return to.push_back(kFloat), to.push_back(bits), true;
  }
  if (type == &PyUnicode_Type || type == &THPDtypeType) {  // by identity: `put` keeps them alive
    return to.push_back(kObject), to.push_back(reinterpret_cast<int64_t>(value)), true;
  }
  const bool list = type == &PyList_Type;
  if (!list && type != &PyTuple_Type) return false;
  const Py_ssize_t count = list ? PyList_GET_SIZE(value) : PyTuple_GET_SIZE(value);
  to.push_back(kSequence | list << 8 | static_cast<int64_t>(count) << 16);
  for (Py_ssize_t i = 0; i < count; ++i)
    if (!describe(list ? PyList_GET_ITEM(value, i) : PyTuple_GET_ITEM(value, i), to)) return false;
  return true;
}

// A tensor of the caller: argument `place` (by position, then by keyword), or `item` of that list, in another shape.
struct Place {
  int64_t place = 0, item = -1;
  std::optional<Shape> shape;

  const at::Tensor& given(PyObject* args, PyObject* const* named) const {
    const Py_ssize_t count = PyTuple_GET_SIZE(args);
    PyObject* value = place < count ? PyTuple_GET_ITEM(args, place) : named[place - count];
    if (item >= 0) value = PyList_Check(value) ? PyList_GET_ITEM(value, item) : PyTuple_GET_ITEM(value, item);
    return THPVariable_Unpack(value);
  }

  at::Tensor taken(PyObject* args, PyObject* const* named) const {
    const at::Tensor& t = given(args, named);
    return shape ? reshaped(t, *shape) : t;
  }
};

// An argument of the kernel: a constant, a tensor of the caller, or a list of these.
struct Value {
  c10::IValue constant;
  std::vector<Place> places;
  bool list = false;
};

struct Result {
  int64_t index = 0;
  std::optional<Shape> shape;
};

// A step of a backward: an op and its arguments, each a constant, a tensor by its number, or a list of numbers. Numbers
// count the gradients of the results, what was saved, and what the steps before made.
struct Step {
  struct Given {
    c10::IValue constant;
    std::vector<int64_t> numbers;
    bool list = false;
  };
  c10::OperatorHandle op;
  bool at_once = false;  // past the keys above the CPU's, which a view or a change of its argument wants
  std::vector<Given> given;
  std::vector<int64_t> last;  // tensors that nobody wants after it
};

// A backward as it was seen once: of gradients that looked like `words`. Without steps it is Python's to do.
struct Steps {
  Words words;
  bool followed = false;
  std::vector<Step> steps;
  std::vector<int64_t> found;  // the gradient of every input, or -1
  size_t tensors = 0;

  variable_list run(std::vector<at::Tensor> known) const {
    torch::jit::Stack stack;
    for (const Step& step : steps) {
      for (const Step::Given& one : step.given) {
        if (one.numbers.empty() && !one.list) stack.push_back(one.constant);
        else if (!one.list) stack.emplace_back(known[one.numbers[0]]);
        else {
          c10::List<at::Tensor> tensors;
          for (const int64_t number : one.numbers) tensors.push_back(known[number]);
          stack.emplace_back(std::move(tensors));
        }
      }
      if (step.at_once) step.op.redispatchBoxed(kCpu, &stack);
      else step.op.callBoxed(&stack);
      for (c10::IValue& made : stack) {
        if (made.isTensor()) known.push_back(std::move(made).toTensor());
        else
          for (const at::Tensor& t : made.toTensorVector()) known.push_back(t);
      }
      stack.clear();
      for (const int64_t number : step.last) known[number].reset();
    }
    TORCH_CHECK(known.size() == tensors, "a backward made ", known.size(), " tensors, and ", tensors, " before");
    variable_list all;
    all.reserve(found.size());
    for (const int64_t number : found) all.push_back(number < 0 ? at::Tensor() : known[number]);
    return all;
  }
};

// A Python object that may be let go of by a thread without the interpreter.
struct Held {
  PyObject* object;
  explicit Held(PyObject* given) : object(Py_NewRef(given)) {}
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;
  ~Held() {
    if (!Py_IsInitialized()) return;
    pybind11::gil_scoped_acquire gil;
    Py_DECREF(object);
  }
};

struct Input {  // a tensor among the op's arguments that wants a gradient, and the caller's shape of it
  int64_t value = 0, item = -1;
  std::optional<Shape> shape;
};

struct Carrier {  // a result that carries one, and the op's shape of it
  int64_t result = 0;
  std::optional<Shape> shape;
};

struct Saved {  // an argument or a result that backward needs, in the op's shape; or none, with value -1
  bool made = false, output = false;
  int64_t value = 0, item = -1;
  std::optional<Shape> shape;
};

// What is saved, Python's backward of it, and the backwards that were seen.
struct Variant {
  std::vector<Saved> saved;
  Held python;
  mutable std::mutex mutex;
  mutable std::vector<std::shared_ptr<const Steps>> seen;

  explicit Variant(PyObject* backward) : python(backward) {}

  std::shared_ptr<const Steps> find(const Words& words) const {
    const std::lock_guard<std::mutex> lock(mutex);
    for (const auto& steps : seen)
      if (steps->words == words) return steps;
    return nullptr;
  }

  static constexpr size_t kMost = 16;
  bool full() const {
    const std::lock_guard<std::mutex> lock(mutex);
    return seen.size() >= kMost;
  }
};

// How the results of a kind of call carry a gradient. Which variant may depend on a result, `looked`: the first where
// it is finite from below everywhere.
struct Attachment {
  std::string name;
  std::vector<Input> inputs;
  std::vector<Carrier> carriers;
  bool materialize = false;
  int64_t looked = -1;
  std::vector<std::unique_ptr<Variant>> variants;
  uint64_t number = 0;  // nobody else's, ever
};

template <class T>
bool above_minus_infinity(const at::Tensor& t) {
  const T *at = t.const_data_ptr<T>(), *end = at + t.numel();
  bool all = true;
  for (; at != end; ++at) all &= static_cast<float>(*at) > -std::numeric_limits<float>::infinity();
  return all;
}

bool finite(const at::Tensor& t) {
  constexpr int64_t kFew = 4096;
  if (t.numel() <= kFew && t.is_contiguous()) {
    if (t.scalar_type() == at::kFloat) return above_minus_infinity<float>(t);
    if (t.scalar_type() == at::kBFloat16) return above_minus_infinity<c10::BFloat16>(t);
  }
  return t.amin().item<double>() > -std::numeric_limits<double>::infinity();
}

// What is looked at of the gradients that arrive: all of their layout, whether a single number is 1 (a loss's own, by
// which nothing is multiplied), and whether the graph is kept. False where one is not plain.
bool describe(const variable_list& grads, Words& words) {
  words.push_back(torch::autograd::get_current_graph_task_keep_graph());
  for (const at::Tensor& grad : grads) {
    if (!grad.defined()) {
      words.push_back(kNone);
      continue;
    }
    if (!plain(grad, true)) return false;
    const auto* meta = get_autograd_meta(grad);
    if (meta != nullptr && meta->fw_grad_) return false;
    const auto sizes = grad.sizes(), strides = grad.strides();
    const bool number = grad.numel() == 1 && at::isFloatingType(grad.scalar_type());
    const bool one = number && (grad.scalar_type() == at::kFloat ? *grad.const_data_ptr<float>() == 1.0F
                                                                  : grad.item<double>() == 1.0);
    words.push_back(kTensor | one << 8 | static_cast<int64_t>(grad.scalar_type()) << 16 |
                    static_cast<int64_t>(sizes.size()) << 32);
    words.insert(words.end(), sizes.begin(), sizes.end());
    words.insert(words.end(), strides.begin(), strides.end());
  }
  return true;
}

std::shared_ptr<const Steps> read_steps(PyObject* given, const Words& words);

THPObjectPtr tuple_of(const std::vector<at::Tensor>& tensors) {
  THPObjectPtr all(PyTuple_New(static_cast<Py_ssize_t>(tensors.size())));
  if (!all) throw python_error();
  for (size_t i = 0; i < tensors.size(); ++i)
    PyTuple_SET_ITEM(all.get(), static_cast<Py_ssize_t>(i),
                     tensors[i].defined() ? THPVariable_Wrap(tensors[i]) : Py_NewRef(Py_None));
  return all;
}

[[noreturn]] void raise_python_error() {
  python_error error;
  error.persist();
  throw std::move(error);
}

// The node of the graph that a call leaves behind.
struct Gradient : Node {
  std::shared_ptr<const Attachment> attachment;
  size_t variant;
  std::vector<SavedVariable> saved;
  bool released = false;

  Gradient(std::shared_ptr<const Attachment> given, size_t which, edge_list&& edges)
      : Node(std::move(edges)), attachment(std::move(given)), variant(which) {}

  std::string name() const override { return attachment->name; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    released = true;
    for (SavedVariable& one : saved) one.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    const Variant& mine = *attachment->variants[variant];
    std::vector<at::Tensor> kept;
    kept.reserve(saved.size());
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      TORCH_CHECK(!released, torch::autograd::ERR_BACKWARD_TWICE);
      for (const SavedVariable& one : saved) kept.push_back(one.unpack(getptr()));
    }
    bool any = attachment->materialize;
    for (size_t k = 0; k < grads.size(); ++k) {
      if (!grads[k].defined() && attachment->materialize) grads[k] = input_metadata(k).zeros_like();
      any |= grads[k].defined();
    }
    if (!any) return variable_list(attachment->inputs.size());
    Words words;
    const bool usual = !c10::GradMode::is_enabled() && nobody_watches(false) && describe(grads, words);
    if (!usual) return by_python(std::move(grads), kept, nullptr);
    const auto steps = mine.find(words);
    if (steps == nullptr || !steps->followed)
      return by_python(std::move(grads), kept, steps == nullptr && !mine.full() ? &words : nullptr);
    std::vector<at::Tensor> known;
    known.reserve(steps->tensors);
    for (size_t k = 0; k < grads.size(); ++k) {
      const auto& shape = attachment->carriers[k].shape;
      if (!shape || !grads[k].defined()) known.push_back(std::move(grads[k]));
      else known.push_back(grads[k].is_contiguous() ? reshaped(grads[k], *shape) : grads[k].reshape(*shape));
    }
    for (size_t i = 0; i < kept.size(); ++i) {
      const auto& shape = mine.saved[i].shape;
      known.push_back(shape ? reshaped(kept[i], *shape) : std::move(kept[i]));
    }
    grads.clear(), kept.clear();
    variable_list found = steps->run(std::move(known));
    for (size_t i = 0; i < found.size(); ++i) {
      const auto& shape = attachment->inputs[i].shape;
      if (shape && found[i].defined())
        found[i] = found[i].is_contiguous() ? reshaped(found[i], *shape) : found[i].reshape(*shape);
    }
    return found;
  }

  // As Python's own node: called with what was saved and the gradients, all in the op's shapes; with `words`, it is
  // asked for its steps.
  variable_list by_python(variable_list&& grads, std::vector<at::Tensor>& kept, const Words* words) const {
    const Variant& mine = *attachment->variants[variant];
    for (size_t k = 0; k < grads.size(); ++k) {
      const auto& shape = attachment->carriers[k].shape;
      if (shape && grads[k].defined()) grads[k] = grads[k].reshape(*shape);
    }
    for (size_t i = 0; i < kept.size(); ++i)
      if (mine.saved[i].shape && kept[i].defined()) kept[i] = kept[i].view(*mine.saved[i].shape);
    variable_list found;
    {
      pybind11::gil_scoped_acquire gil;
      THPObjectPtr given(tuple_of(kept)), arrived(tuple_of(grads));
      THPObjectPtr all(PyObject_CallFunctionObjArgs(mine.python.object, given.get(), arrived.get(),
                                                    words == nullptr ? Py_False : Py_True, nullptr));
      if (!all) raise_python_error();
      PyObject* gradients = PyTuple_Check(all.get()) ? PyTuple_GetItem(all.get(), 0) : nullptr;
      const auto count = static_cast<Py_ssize_t>(attachment->inputs.size());
      TORCH_CHECK(gradients != nullptr && PyList_Check(gradients) && PyList_GET_SIZE(gradients) == count,
                  name(), ": a gradient for every input is wanted");
      for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject* one = PyList_GET_ITEM(gradients, i);
        TORCH_CHECK(one == Py_None || THPVariable_Check(one), name(), ": a gradient must be a tensor or None");
        found.push_back(one == Py_None ? at::Tensor() : THPVariable_Unpack(one));
      }
      PyObject* seen = PyTuple_GetItem(all.get(), 1);
      if (words != nullptr && seen != Py_False) {
        auto steps = read_steps(seen, *words);
        const std::lock_guard<std::mutex> lock(mine.mutex);
        mine.seen.push_back(std::move(steps));
      }
    }
    for (size_t i = 0; i < found.size(); ++i)
      if (attachment->inputs[i].shape && found[i].defined()) found[i] = found[i].reshape(*attachment->inputs[i].shape);
    return found;
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(attachment->number);
    args.collect(static_cast<uint64_t>(variant));
    for (size_t i = 0; i < saved.size(); ++i) args.collect(saved[i], attachment->variants[variant]->saved[i].output);
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    for (SavedVariable& one : saved) swap.before(one);
    auto found = apply(variable_list(grads));
    for (SavedVariable& one : saved) swap.after(one);
    return found;
  }
};

// Nodes are counted by themselves, or by shared pointers in a torch before 2.13.
auto new_node(const std::shared_ptr<const Attachment>& attachment, size_t variant, edge_list&& edges) {
  using Pointer = decltype(Edge::function);
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>)
    return std::make_shared<Gradient>(attachment, variant, std::move(edges));
  else
    return c10::make_intrusive<Gradient>(attachment, variant, std::move(edges));
}

PyObject* wrapped(const c10::IValue& made) {
  if (made.isTensor()) return THPVariable_Wrap(made.toTensor());
  const auto tensors = made.toTensorVector();
  THPObjectPtr list(PyList_New(static_cast<Py_ssize_t>(tensors.size())));
  if (!list) return nullptr;
  for (size_t i = 0; i < tensors.size(); ++i)
    PyList_SET_ITEM(list.get(), static_cast<Py_ssize_t>(i), THPVariable_Wrap(tensors[i]));
  return list.release();
}

struct Way {
  bool plain = false;
  std::optional<c10::OperatorHandle> op;
  std::vector<Value> values;
  std::vector<Result> results;
  bool tuple = false;
  std::shared_ptr<const Attachment> attachment;  // of a call with a gradient
  std::vector<THPObjectPtr> alive;  // what the words name by its address

  // What the kernel makes, as the function returns it.
  PyObject* run(PyObject* args, PyObject* const* named) const {
    torch::jit::Stack stack;
    stack.reserve(values.size());
    for (const Value& value : values) {
      if (value.places.empty() && !value.list) stack.push_back(value.constant);
      else if (!value.list) stack.emplace_back(value.places[0].taken(args, named));
      else {
        c10::List<at::Tensor> tensors;
        tensors.reserve(value.places.size());
        for (const Place& place : value.places) tensors.push_back(place.taken(args, named));
        stack.emplace_back(std::move(tensors));
      }
    }
    size_t variant = 0;
    {
      pybind11::gil_scoped_release released;
      const c10::AutoGradMode without(false);  // of the kernel's own operations
      op->redispatchBoxed(kCpu, &stack);
      if (attachment && attachment->looked >= 0) variant = !finite(stack[attachment->looked].toTensor());
    }
    for (const Result& result : results)
      if (result.shape) stack[result.index].toTensor().unsafeGetTensorImpl()->set_sizes_contiguous(*result.shape);
    if (attachment) attach(stack, variant, args, named);
    THPObjectPtr all(tuple ? PyTuple_New(static_cast<Py_ssize_t>(results.size())) : nullptr);
    for (size_t i = 0; i < results.size(); ++i) {
      PyObject* one = wrapped(stack[results[i].index]);
      if (one == nullptr) throw python_error();
      if (!tuple) return one;
      PyTuple_SET_ITEM(all.get(), static_cast<Py_ssize_t>(i), one);
    }
    return all.release();
  }

  void attach(const torch::jit::Stack& made, size_t variant, PyObject* args, PyObject* const* named) const {
    const auto at = [&](int64_t value, int64_t item) -> const at::Tensor& {
      return values[value].places[std::max<int64_t>(item, 0)].given(args, named);
    };
    edge_list edges;
    edges.reserve(attachment->inputs.size());
    for (const Input& input : attachment->inputs) edges.push_back(gradient_edge(at(input.value, input.item)));
    auto node = new_node(attachment, variant, std::move(edges));
    for (const Carrier& carrier : attachment->carriers) {
      at::Tensor result = made[carrier.result].toTensor();
      TORCH_CHECK(get_autograd_meta(result) == nullptr, "a result that has a history");
      create_gradient_edge(result, node);
    }
    const std::vector<Saved>& wanted = attachment->variants[variant]->saved;
    node->saved.reserve(wanted.size());
    for (const Saved& one : wanted) {
      if (one.value < 0) node->saved.emplace_back();
      else if (one.made && one.item >= 0) node->saved.emplace_back(made[one.value].toTensorVector()[one.item], false);
      else if (one.made) node->saved.emplace_back(made[one.value].toTensor(), one.output);
      else node->saved.emplace_back(at(one.value, one.item), false);
    }
  }
};

std::optional<Shape> shape_of(PyObject* given) {
  if (given == Py_None) return std::nullopt;
  Shape found;
  for (Py_ssize_t i = 0; i < PyTuple_Size(given); ++i) found.push_back(PyLong_AsLongLong(PyTuple_GetItem(given, i)));
  return found;
}

Place place_of(PyObject* given) {  // (place, item, shape)
  return {PyLong_AsLongLong(PyTuple_GetItem(given, 0)), PyLong_AsLongLong(PyTuple_GetItem(given, 1)),
          shape_of(PyTuple_GetItem(given, 2))};
}

// A constant as the schema has it; nullopt for what it does not take.
std::optional<c10::IValue> constant(PyObject* given, const c10::TypePtr& type) {
  if (THPDtype_Check(given)) return c10::IValue(static_cast<int64_t>(reinterpret_cast<THPDtype*>(given)->scalar_type));
  try {
    const torch::jit::ToIValueAllowNumbersAsTensors numbers(true);
    return torch::jit::toIValue(pybind11::handle(given), type);
  } catch (...) {
    PyErr_Clear();
    return std::nullopt;
  }
}

int64_t number_at(PyObject* tuple, Py_ssize_t i) { return PyLong_AsLongLong(PyTuple_GetItem(tuple, i)); }

// `gradients.Attachment`: name, inputs, carriers, materialize, looked, variants.
std::shared_ptr<const Attachment> read_attachment(PyObject* given) {
  static std::atomic<uint64_t> count{0};
  auto made = std::make_shared<Attachment>();
  made->number = ++count;
  made->name = PyUnicode_AsUTF8(PyTuple_GetItem(given, 0));
  PyObject *inputs = PyTuple_GetItem(given, 1), *carriers = PyTuple_GetItem(given, 2);
  for (Py_ssize_t i = 0; i < PyList_Size(inputs); ++i) {
    PyObject* one = PyList_GetItem(inputs, i);
    made->inputs.push_back({number_at(one, 0), number_at(one, 1), shape_of(PyTuple_GetItem(one, 2))});
  }
  for (Py_ssize_t i = 0; i < PyList_Size(carriers); ++i) {
    PyObject* one = PyList_GetItem(carriers, i);
    made->carriers.push_back({number_at(one, 0), shape_of(PyTuple_GetItem(one, 1))});
  }
  made->materialize = PyTuple_GetItem(given, 3) == Py_True;
  made->looked = number_at(given, 4);
  PyObject* variants = PyTuple_GetItem(given, 5);
  for (Py_ssize_t v = 0; v < PyList_Size(variants); ++v) {
    PyObject *one = PyList_GetItem(variants, v), *saved = PyTuple_GetItem(one, 0);
    made->variants.push_back(std::make_unique<Variant>(PyTuple_GetItem(one, 1)));
    for (Py_ssize_t i = 0; i < PyList_Size(saved); ++i) {
      PyObject* from = PyList_GetItem(saved, i);
      Saved what{PyTuple_GetItem(from, 0) == Py_True, false, number_at(from, 1), number_at(from, 2),
                 shape_of(PyTuple_GetItem(from, 3))};
      for (const Carrier& carrier : made->carriers) what.output |= what.made && carrier.result == what.value;
      made->variants.back()->saved.push_back(std::move(what));
    }
  }
  return made;
}

// An argument of a step: a number, a list of numbers, or a constant in a tuple of its own.
std::optional<Step::Given> read_given(PyObject* value, const c10::TypePtr& type) {
  Step::Given given;
  if (PyLong_Check(value)) {
    given.numbers.push_back(PyLong_AsLongLong(value));
  } else if (PyList_Check(value)) {
    given.list = true;
    for (Py_ssize_t i = 0; i < PyList_Size(value); ++i)
      given.numbers.push_back(PyLong_AsLongLong(PyList_GetItem(value, i)));
  } else {
    auto made = constant(PyTuple_GetItem(value, 0), type);
    if (!made) return std::nullopt;
    given.constant = *std::move(made);
  }
  return given;
}

// (op, overload, arguments) as a step; nullopt for what cannot be one.
std::optional<Step> read_step(PyObject* given) {
  const auto op = c10::Dispatcher::singleton().findSchema(
      {PyUnicode_AsUTF8(PyTuple_GetItem(given, 0)), PyUnicode_AsUTF8(PyTuple_GetItem(given, 1))});
  PyObject* values = PyTuple_GetItem(given, 2);
  if (!op || static_cast<size_t>(PyList_Size(values)) != op->schema().arguments().size()) return std::nullopt;
  Step step{*op};
  step.at_once = op->hasKernelForDispatchKey(c10::DispatchKey::CPU) ||
                 op->hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd);
  for (const auto& argument : op->schema().arguments()) step.at_once &= argument.alias_info() == nullptr;
  for (Py_ssize_t i = 0; i < PyList_Size(values); ++i) {
    auto one = read_given(PyList_GetItem(values, i), op->schema().arguments()[static_cast<size_t>(i)].type());
    if (!one) return std::nullopt;
    step.given.push_back(*std::move(one));
  }
  return step;
}

// Lets go of every tensor where it is wanted last.
void end_lives(Steps& steps) {
  std::vector<bool> wanted(steps.tensors);
  for (const int64_t number : steps.found)
    if (number >= 0) wanted[number] = true;
  for (auto step = steps.steps.rbegin(); step != steps.steps.rend(); ++step)
    for (const Step::Given& one : step->given)
      for (const int64_t number : one.numbers)
        if (!wanted[number]) wanted[number] = true, step->last.push_back(number);
}

// (steps, found, tensors) of `gradients.Steps`, or None.
std::shared_ptr<const Steps> read_steps(PyObject* given, const Words& words) {
  auto made = std::make_shared<Steps>();
  made->words = words;
  if (given == nullptr || given == Py_None) return made;
  PyObject *steps = PyTuple_GetItem(given, 0), *found = PyTuple_GetItem(given, 1);
  for (Py_ssize_t i = 0; i < PyList_Size(steps); ++i) {
    auto step = read_step(PyList_GetItem(steps, i));
    if (!step) return made;
    made->steps.push_back(*std::move(step));
  }
  for (Py_ssize_t i = 0; i < PyList_Size(found); ++i)
    made->found.push_back(PyLong_AsLongLong(PyList_GetItem(found, i)));
  made->tensors = static_cast<size_t>(number_at(given, 2));
  end_lives(*made);
  made->followed = true;
  return made;
}

// (op, values, results, many, attachment): values a constant in a tuple of its own, a place, or a list of places
// (`replay.Seen`).
bool read_way(PyObject* given, Way& way) {
  const auto found =
      c10::Dispatcher::singleton().findSchema({PyUnicode_AsUTF8(PyTuple_GetItem(given, 0)), ""});
  if (!found) return false;
  way.op = found;
  const auto& schema = found->schema();
  PyObject* values = PyTuple_GetItem(given, 1);
  if (static_cast<size_t>(PyList_Size(values)) != schema.arguments().size()) return false;
  for (const auto& result : schema.returns()) {
    const auto* list = result.type()->castRaw<c10::ListType>();
    if ((list ? list->getElementType()->kind() : result.type()->kind()) != c10::TypeKind::TensorType) return false;
  }
  for (Py_ssize_t i = 0; i < PyList_Size(values); ++i) {
    PyObject* value = PyList_GetItem(values, i);
    Value one;
    if (PyList_Check(value)) {
      one.list = true;
      for (Py_ssize_t j = 0; j < PyList_Size(value); ++j) one.places.push_back(place_of(PyList_GetItem(value, j)));
    } else if (PyTuple_Size(value) == 3) {
      one.places.push_back(place_of(value));
    } else {
      const auto made = constant(PyTuple_GetItem(value, 0), schema.arguments()[static_cast<size_t>(i)].type());
      if (!made) return false;
      one.constant = *made;
    }
    way.values.push_back(std::move(one));
  }
  PyObject* results = PyTuple_GetItem(given, 2);
  for (Py_ssize_t i = 0; i < PyList_Size(results); ++i) {
    PyObject* result = PyList_GetItem(results, i);
    way.results.push_back({PyLong_AsLongLong(PyTuple_GetItem(result, 0)), shape_of(PyTuple_GetItem(result, 1))});
  }
  way.tuple = PyTuple_GetItem(given, 3) == Py_True;
  PyObject* attached = PyTuple_GetItem(given, 4);
  if (attached != nullptr && attached != Py_None) way.attachment = read_attachment(attached);
  return !PyErr_Occurred();
}

constexpr size_t kMost = 4096;
constexpr Py_ssize_t kMostNamed = 16;

struct Calls {
  PyObject_HEAD
  std::unordered_map<Words, std::shared_ptr<const Way>, Hash>* known;
  Words* words;
  PyObject *forward_ad, *level;
};

// The call in words, and the values of its keywords; false where it cannot be looked up.
bool written(Calls* self, PyObject* args, PyObject* kwargs, PyObject** named) {
  Words& words = *self->words;
  words.clear();
  const Py_ssize_t count = PyTuple_GET_SIZE(args);
  words.push_back(c10::GradMode::is_enabled() | static_cast<int64_t>(count) << 8);
  for (Py_ssize_t i = 0; i < count; ++i)
    if (!describe(PyTuple_GET_ITEM(args, i), words)) return false;
  if (PyDict_GET_SIZE(kwargs) > kMostNamed) return false;
  PyObject *name, *value;
  Py_ssize_t at = 0;
  while (PyDict_Next(kwargs, &at, &name, &value)) {
    words.push_back(kName), words.push_back(reinterpret_cast<int64_t>(name));
    if (!describe(value, words)) return false;
    *named++ = value;
  }
  return true;
}

bool two(PyObject* const* given, Py_ssize_t count, Py_ssize_t wanted) {
  if (count == wanted && PyTuple_CheckExact(given[0]) && PyDict_CheckExact(given[1])) return true;
  PyErr_SetString(PyExc_TypeError, "Calls: a tuple of arguments and a dict of keywords are wanted");
  return false;
}

PyObject* find(PyObject* object, PyObject* const* given, Py_ssize_t count) {
  auto* self = reinterpret_cast<Calls*>(object);
  PyObject* named[kMostNamed];
  if (!two(given, count, 2)) return nullptr;
  if (!nobody_looks_on(self->forward_ad, self->level)) Py_RETURN_NONE;
  if (!written(self, given[0], given[1], named)) Py_RETURN_NONE;
  const auto found = self->known->find(*self->words);
  if (found == self->known->end()) Py_RETURN_NONE;
  const std::shared_ptr<const Way> way = found->second;  // another thread may forget it while the kernel runs
  if (!way->op) return Py_NewRef(way->plain ? Py_True : Py_False);
  try {
    return way->run(given[0], named);
  } catch (...) {  // the function says what was wrong
    PyErr_Clear();
    Py_RETURN_NONE;
  }
}

void keep(PyObject* value, std::vector<THPObjectPtr>& alive) {
  if (PyUnicode_Check(value) || THPDtype_Check(value)) alive.emplace_back(Py_NewRef(value));
  if (!PyList_Check(value) && !PyTuple_Check(value)) return;
  THPObjectPtr items(PySequence_Tuple(value));
  for (Py_ssize_t i = 0; items && i < PyTuple_GET_SIZE(items.get()); ++i) keep(PyTuple_GET_ITEM(items.get(), i), alive);
}

PyObject* put(PyObject* object, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  auto* self = reinterpret_cast<Calls*>(object);
  PyObject* named[kMostNamed];
  if (!two(given, count, 3)) return nullptr;
  if (!nobody_looks_on(self->forward_ad, self->level) || !written(self, given[0], given[1], named)) Py_RETURN_FALSE;
  auto made = std::make_shared<Way>();
  Way& way = *made;
  if (PyBool_Check(given[2])) way.plain = given[2] == Py_True;
  else if (!read_way(given[2], way)) Py_RETURN_FALSE;
  keep(given[0], way.alive);
  PyObject *name, *value;
  Py_ssize_t at = 0;
  while (PyDict_Next(given[1], &at, &name, &value)) keep(name, way.alive), keep(value, way.alive);
  if (self->known->size() >= kMost) self->known->clear();
  (*self->known)[*self->words] = std::move(made);
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

PyObject* clear(PyObject* object, PyObject*) {
  reinterpret_cast<Calls*>(object)->known->clear();
  Py_RETURN_NONE;
}

PyObject* create(PyTypeObject* type, PyObject*, PyObject*) {
  THPObjectPtr module(PyImport_ImportModule("torch.autograd.forward_ad"));
  if (!module) return nullptr;
  auto* self = reinterpret_cast<Calls*>(type->tp_alloc(type, 0));
  if (self == nullptr) return nullptr;
  self->known = new std::unordered_map<Words, std::shared_ptr<const Way>, Hash>();
  self->words = new Words();
  self->forward_ad = Py_NewRef(PyModule_GetDict(module.get()));
  self->level = PyUnicode_InternFromString("_current_level");
  return reinterpret_cast<PyObject*>(self);
}

void destroy(PyObject* object) {
  auto* self = reinterpret_cast<Calls*>(object);
  delete self->known;
  delete self->words;
  Py_XDECREF(self->forward_ad);
  Py_XDECREF(self->level);
  Py_TYPE(object)->tp_free(object);
}

template <class F>
PyCFunction method(F function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef kMethods[] = {
    {"find", method(find), METH_FASTCALL,
     "find(args, kwargs): True where plain PyTorch is taken, False where ours is, what a kernel made; None: unknown."},
    {"put", method(put), METH_FASTCALL, "put(args, kwargs, way): remember the way of such calls; whether it can be."},
    {"clear", clear, METH_NOARGS, "Forget all calls."},
    {nullptr, nullptr, 0, nullptr}};

PyTypeObject kCalls = [] {
  PyTypeObject type = {PyVarObject_HEAD_INIT(nullptr, 0)};
  type.tp_name = "w2s_fast._call.Calls";
  type.tp_doc = "Calls of one function, and the way that each takes.";
  type.tp_basicsize = sizeof(Calls);
  type.tp_flags = Py_TPFLAGS_DEFAULT;
  type.tp_methods = kMethods;
  type.tp_new = create;
  type.tp_dealloc = destroy;
  return type;
}();

PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "w2s_fast._call", "Calls that were seen before.", -1, nullptr,
                       nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__call() {
  if (PyType_Ready(&kCalls) < 0) return nullptr;
  THPObjectPtr module(PyModule_Create(&kModule));
  if (!module || PyModule_AddObjectRef(module.get(), "Calls", reinterpret_cast<PyObject*>(&kCalls)) < 0) return nullptr;
  return module.release();
}
