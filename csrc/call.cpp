// w2s_fast._call: a call of a public function that is like one before, in a fraction of a microsecond.
//
// `Calls` remembers calls by what is looked at of their arguments (calibration.py: `exactly`): of a tensor its type,
// shape, dtype, layout and whether it wants a gradient, of an option its value. It knows what each kind of call does:
// plain PyTorch, ours, or one kernel at once, whose arguments are the caller's tensors, or those seen in another shape,
// and constants (replay.py). What it has not seen, and calls that others look on at (autocast, modes, torch.func,
// profilers, hooks), it leaves to Python, which is always right. It is made of torch's own C++ and Python interfaces,
// for the torch of the build. fuse_logits on 16 elements: 2.8 us, where Python's replay took 6.1 and the op 12.9, and
// torch.add 1.2 (AMD EPYC, family 25); a call that is known to take plain PyTorch: 0.7.
#include <ATen/Context.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

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

// Whether nobody looks on: what `alone` and `Op.run` of the package ask, in one look each. In inference mode too.
bool nobody_looks_on(PyObject* forward_ad, PyObject* level_name) {
  const auto tls = c10::impl::tls_local_dispatch_key_set();
  const bool usual = tls.included_ == c10::default_included_set && tls.excluded_ == c10::default_excluded_set;
  const bool inference = tls.included_ == c10::default_included_set.remove(c10::DispatchKey::ADInplaceOrView) &&
                         tls.excluded_ == (c10::default_excluded_set | c10::autograd_dispatch_keyset);
  if (!usual && !inference) return false;
  if (at::impl::torch_function_mode_enabled() || at::hasCallbacks()) return false;
  if (at::globalContext().deterministicAlgorithms()) return false;
  if (!at::SavedTensorDefaultHooks::is_enabled()) return false;
  if (!at::SavedTensorDefaultHooks::get_tls_state().stack.empty()) return false;
  PyObject* level = PyDict_GetItemWithError(forward_ad, level_name);
  return level != nullptr && PyLong_Check(level) && PyLong_AsLong(level) < 0;
}

// Appends what is looked at of an argument; false where no two calls are compared by it, or if it is no plain tensor.
bool describe(PyObject* value, Words& to) {
  if (value == Py_None) return to.push_back(kNone), true;
  PyTypeObject* type = Py_TYPE(value);
  if (THPVariable_CheckTypeExact(type)) {
    const at::Tensor& t = THPVariable_Unpack(value);
    const c10::TensorImpl* impl = t.unsafeGetTensorImpl();
    const auto keys = impl->key_set();
    if ((keys.raw_repr() & ~kPlain.raw_repr()) != 0 || !keys.has(c10::DispatchKey::CPU)) return false;
    if (!impl->has_storage() || impl->storage().data() == nullptr) return false;
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

  at::Tensor taken(PyObject* args, PyObject* const* named) const {
    const Py_ssize_t count = PyTuple_GET_SIZE(args);
    PyObject* value = place < count ? PyTuple_GET_ITEM(args, place) : named[place - count];
    if (item >= 0) value = PyList_Check(value) ? PyList_GET_ITEM(value, item) : PyTuple_GET_ITEM(value, item);
    const at::Tensor& t = THPVariable_Unpack(value);
    if (!shape) return t;
    const c10::TensorImpl* impl = t.unsafeGetTensorImpl();
    auto seen = impl->shallow_copy_and_detach(impl->version_counter(), /*allow_tensor_metadata_change=*/true);
    seen->set_sizes_contiguous(*shape);
    return at::Tensor(std::move(seen));
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

struct Way {
  bool plain = false;
  std::optional<c10::OperatorHandle> op;
  std::vector<Value> values;
  std::vector<Result> results;
  bool tuple = false;
  std::vector<THPObjectPtr> alive;  // what the words name by its address

  // What the kernel makes, as the function returns it.
  PyObject* run(PyObject* args, PyObject* const* named) const {
    torch::jit::Stack stack;
    stack.reserve(values.size());
    for (const Value& value : values) {
      if (value.places.empty()) stack.push_back(value.constant);
      else if (!value.list) stack.emplace_back(value.places[0].taken(args, named));
      else {
        c10::List<at::Tensor> tensors;
        tensors.reserve(value.places.size());
        for (const Place& place : value.places) tensors.push_back(place.taken(args, named));
        stack.emplace_back(std::move(tensors));
      }
    }
    {
      pybind11::gil_scoped_release released;
      op->redispatchBoxed(kCpu, &stack);
    }
    THPObjectPtr all(tuple ? PyTuple_New(static_cast<Py_ssize_t>(results.size())) : nullptr);
    for (size_t i = 0; i < results.size(); ++i) {
      at::Tensor made = std::move(stack[results[i].index]).toTensor();
      if (results[i].shape) made.unsafeGetTensorImpl()->set_sizes_contiguous(*results[i].shape);
      PyObject* one = THPVariable_Wrap(std::move(made));
      if (!tuple) return one;
      PyTuple_SET_ITEM(all.get(), static_cast<Py_ssize_t>(i), one);
    }
    return all.release();
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

template <class T, class Read>
c10::IValue numbers(PyObject* given, Read read) {
  c10::List<T> found;
  for (Py_ssize_t i = 0; i < PySequence_Size(given); ++i) {
    THPObjectPtr item(PySequence_GetItem(given, i));
    found.push_back(read(item.get()));
  }
  return found;
}

// A constant as the schema has it; nullopt for what is not foreseen.
std::optional<c10::IValue> constant(PyObject* given, const c10::Type& type) {
  if (const auto* optional = type.castRaw<c10::OptionalType>())
    return given == Py_None ? std::optional(c10::IValue()) : constant(given, *optional->getElementType());
  switch (type.kind()) {
    case c10::TypeKind::FloatType: return c10::IValue(PyFloat_AsDouble(given));
    case c10::TypeKind::BoolType: return c10::IValue(PyObject_IsTrue(given) == 1);
    case c10::TypeKind::StringType: return c10::IValue(std::string(PyUnicode_AsUTF8(given)));
    case c10::TypeKind::IntType:
    case c10::TypeKind::SymIntType:
    case c10::TypeKind::ScalarTypeType:
      if (THPDtype_Check(given))
        return c10::IValue(static_cast<int64_t>(reinterpret_cast<THPDtype*>(given)->scalar_type));
      return c10::IValue(static_cast<int64_t>(PyLong_AsLongLong(given)));
    case c10::TypeKind::ListType: {
      const auto element = type.expectRef<c10::ListType>().getElementType()->kind();
      if (element == c10::TypeKind::FloatType) return numbers<double>(given, PyFloat_AsDouble);
      if (element == c10::TypeKind::IntType) return numbers<int64_t>(given, PyLong_AsLongLong);
      if (element == c10::TypeKind::TensorType && PySequence_Size(given) == 0)
        return c10::IValue(c10::List<at::Tensor>());
      return std::nullopt;
    }
    default: return std::nullopt;
  }
}

// (op, values, results, many): values a constant in a tuple of its own, a place, or a list of places (`replay.Seen`).
bool read_way(PyObject* given, Way& way) {
  const auto found =
      c10::Dispatcher::singleton().findSchema({PyUnicode_AsUTF8(PyTuple_GetItem(given, 0)), ""});
  if (!found) return false;
  way.op = found;
  const auto& schema = found->schema();
  PyObject* values = PyTuple_GetItem(given, 1);
  if (static_cast<size_t>(PyList_Size(values)) != schema.arguments().size()) return false;
  for (const auto& result : schema.returns())
    if (result.type()->kind() != c10::TypeKind::TensorType) return false;
  for (Py_ssize_t i = 0; i < PyList_Size(values); ++i) {
    PyObject* value = PyList_GetItem(values, i);
    Value one;
    if (PyList_Check(value)) {
      one.list = true;
      for (Py_ssize_t j = 0; j < PyList_Size(value); ++j) one.places.push_back(place_of(PyList_GetItem(value, j)));
    } else if (PyTuple_Size(value) == 3) {
      one.places.push_back(place_of(value));
    } else {
      const auto made = constant(PyTuple_GetItem(value, 0), *schema.arguments()[static_cast<size_t>(i)].type());
      if (!made || PyErr_Occurred()) return PyErr_Clear(), false;
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
