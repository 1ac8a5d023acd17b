// Runs the ops of csrc/cpu without torch: what they call of its stable C interface, in the plainest form, and a server that
// takes calls from stdin and answers on stdout. So kernels of another architecture run under an emulator, driven by a torch
// of this one (aarch64_check.py, which states the format of a call).
//
// Fresh memory is all ones, NaN in every floating dtype: what reads before it writes is seen. The library's products and
// attention are not here; W2S_FAST_GEMM=own keeps them from being asked for.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/stable/c/shim.h>

namespace {

using Implementation = void (*)(StableIValue*, uint64_t, uint64_t);
using Sizes = std::vector<int64_t>;
using List = std::vector<StableIValue>;

std::map<std::string, Implementation>& implementations() {
  static std::map<std::string, Implementation> all;
  return all;
}

enum Dtype : int32_t { u8, i8, i16, i32, i64, f16, f32, f64, boolean = 11, bf16 = 15, u16 = 27, u32 = 28, u64 = 29 };

int64_t bytes_of(int32_t dtype) {
  switch (dtype) {
    case u8: case i8: case boolean: return 1;
    case i16: case f16: case bf16: case u16: return 2;
    case i32: case f32: case u32: return 4;
    case i64: case f64: case u64: return 8;
    default: throw std::runtime_error("a dtype that no op takes");
  }
}

int64_t product(const Sizes& sizes) {
  int64_t n = 1;
  for (const int64_t size : sizes) n *= size;
  return n;
}

Sizes packed(const Sizes& sizes) {
  Sizes strides(sizes.size());
  int64_t next = 1;
  for (size_t i = sizes.size(); i-- > 0; next *= std::max<int64_t>(sizes[i], 1)) strides[i] = next;
  return strides;
}

// Elements from the first to the last that strides reach.
int64_t extent(const Sizes& sizes, const Sizes& strides) {
  if (product(sizes) == 0) return 0;
  int64_t last = 0;
  for (size_t i = 0; i < sizes.size(); ++i) last += (sizes[i] - 1) * strides[i];
  return last + 1;
}

struct Tensor {
  std::shared_ptr<char> memory;
  char* data = nullptr;
  int32_t dtype = f32;
  Sizes sizes, strides;

  bool contiguous() const {
    const Sizes wanted = packed(sizes);
    for (size_t i = 0; i < sizes.size(); ++i)
      if (sizes[i] > 1 && strides[i] != wanted[i] && product(sizes) > 0) return false;
    return true;
  }
};

Tensor fresh(int32_t dtype, const Sizes& sizes, const Sizes& strides) {
  const size_t bytes = size_t(std::max<int64_t>(extent(sizes, strides) * bytes_of(dtype), 1));
  char* data = static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  if (!data) throw std::bad_alloc();
  std::memset(data, 0xff, bytes);
  return {{data, std::free}, data, dtype, sizes, strides};
}

// Element by element, whatever the strides.
void copy(const Tensor& from, const Tensor& to) {
  if (from.sizes != to.sizes || from.dtype != to.dtype) throw std::runtime_error("copy_ of another shape or dtype");
  const int64_t bytes = bytes_of(from.dtype), n = product(from.sizes);
  for (int64_t i = 0; i < n; ++i) {
    int64_t rest = i, source = 0, target = 0;
    for (size_t d = from.sizes.size(); d-- > 0; rest /= from.sizes[d]) {
      source += rest % from.sizes[d] * from.strides[d];
      target += rest % from.sizes[d] * to.strides[d];
    }
    std::memcpy(to.data + target * bytes, from.data + source * bytes, size_t(bytes));
  }
}

Tensor contiguous(const Tensor& t) {
  if (t.contiguous()) return t;
  Tensor made = fresh(t.dtype, t.sizes, packed(t.sizes));
  copy(t, made);
  return made;
}

Tensor zeros(const Tensor& t) {
  if (!t.contiguous()) throw std::runtime_error("zero_ of a tensor with gaps");
  std::memset(t.data, 0, size_t(product(t.sizes) * bytes_of(t.dtype)));
  return t;
}

Tensor reshaped(Tensor t, const Sizes& sizes) {
  if (!t.contiguous() || product(t.sizes) != product(sizes)) throw std::runtime_error("a view that is none");
  t.sizes = sizes, t.strides = packed(sizes);
  return t;
}

Tensor* of(AtenTensorHandle handle) { return reinterpret_cast<Tensor*>(handle); }
AtenTensorHandle handle(Tensor t) { return reinterpret_cast<AtenTensorHandle>(new Tensor(std::move(t))); }

template <class T>
StableIValue value(T x) {
  StableIValue found = 0;
  std::memcpy(&found, &x, sizeof x);
  return found;
}
template <class T>
T as(StableIValue given) {
  T x;
  std::memcpy(&x, &given, sizeof x);
  return x;
}

// What a value on the stack owns goes to whom takes it.
Tensor taken(StableIValue given) {
  const std::unique_ptr<Tensor> t(as<Tensor*>(given));
  return *t;
}
Sizes taken_sizes(StableIValue given) {
  const std::unique_ptr<List> list(as<List*>(given));
  Sizes found;
  for (const StableIValue one : *list) found.push_back(as<int64_t>(one));
  return found;
}
int32_t taken_dtype(StableIValue given, int32_t otherwise) {
  const std::unique_ptr<StableIValue> inner(as<StableIValue*>(given));
  return inner ? as<int32_t>(*inner) : otherwise;
}

template <class F>
AOTITorchError guarded(const F& work) {
  try {
    work();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "torch_stand_in: %s\n", error.what());
    return 1;
  }
}

}  // namespace

// ---------------------------------------------------------------- what the ops call of torch
extern "C" {

uint64_t aoti_torch_abi_version() { return TORCH_TARGET_VERSION; }

#define CODE(name, code) \
  int32_t name() { return code; }
CODE(aoti_torch_dtype_uint8, u8)
CODE(aoti_torch_dtype_int8, i8)
CODE(aoti_torch_dtype_int16, i16)
CODE(aoti_torch_dtype_int32, i32)
CODE(aoti_torch_dtype_int64, i64)
CODE(aoti_torch_dtype_float16, f16)
CODE(aoti_torch_dtype_float32, f32)
CODE(aoti_torch_dtype_float64, f64)
CODE(aoti_torch_dtype_bool, boolean)
CODE(aoti_torch_dtype_bfloat16, bf16)
CODE(aoti_torch_dtype_uint16, u16)
CODE(aoti_torch_dtype_uint32, u32)
CODE(aoti_torch_dtype_uint64, u64)
CODE(aoti_torch_dtype_complex32, 8)
CODE(aoti_torch_dtype_complex64, 9)
CODE(aoti_torch_dtype_complex128, 10)
CODE(aoti_torch_dtype_float8_e5m2, 23)
CODE(aoti_torch_dtype_float8_e4m3fn, 24)
CODE(aoti_torch_dtype_float8_e5m2fnuz, 25)
CODE(aoti_torch_dtype_float8_e4m3fnuz, 26)
CODE(torch_dtype_float8_e8m0fnu, 44)
CODE(torch_dtype_float4_e2m1fn_x2, 45)
CODE(aoti_torch_device_type_cpu, 0)
CODE(aoti_torch_device_type_cuda, 1)
CODE(aoti_torch_device_type_xpu, 12)
CODE(aoti_torch_device_type_mps, 13)
CODE(aoti_torch_device_type_meta, 14)
CODE(aoti_torch_device_type_privateuse1, 20)
CODE(aoti_torch_layout_strided, 0)
CODE(aoti_torch_layout_sparse_coo, 1)
CODE(aoti_torch_layout_sparse_csr, 2)
CODE(aoti_torch_layout__mkldnn, 3)
CODE(aoti_torch_layout_sparse_csc, 4)
CODE(aoti_torch_layout_sparse_bsr, 5)
CODE(aoti_torch_layout_sparse_bsc, 6)
CODE(aoti_torch_layout_jagged, 7)
CODE(aoti_torch_memory_format_contiguous_format, 0)
CODE(aoti_torch_memory_format_preserve_format, 1)
CODE(aoti_torch_memory_format_channels_last, 2)
CODE(aoti_torch_memory_format_channels_last_3d, 3)
#undef CODE

AOTITorchError aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t, TorchLibraryHandle* made) {
  *made = nullptr;
  return 0;
}
AOTITorchError aoti_torch_library_init_def(const char*, const char*, uint32_t, TorchLibraryHandle* made) {
  *made = nullptr;
  return 0;
}
AOTITorchError aoti_torch_library_init_fragment(const char*, const char*, uint32_t, TorchLibraryHandle* made) {
  *made = nullptr;
  return 0;
}
AOTITorchError aoti_torch_library_def(TorchLibraryHandle, const char*) { return 0; }
AOTITorchError aoti_torch_delete_library_object(TorchLibraryHandle) { return 0; }
AOTITorchError torch_library_impl(TorchLibraryHandle, const char* name, Implementation call, uint64_t) {
  implementations()[name] = call;
  return 0;
}

AOTITorchError aoti_torch_new_uninitialized_tensor(AtenTensorHandle* made) {
  *made = handle({});
  return 0;
}
AOTITorchError aoti_torch_new_tensor_handle(AtenTensorHandle from, AtenTensorHandle* made) {
  *made = handle(*of(from));
  return 0;
}
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle t) {
  delete of(t);
  return 0;
}
AOTITorchError aoti_torch_empty_strided(int64_t n, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t, int32_t,
                                        AtenTensorHandle* made) {
  return guarded([&] { *made = handle(fresh(dtype, {sizes, sizes + n}, {strides, strides + n})); });
}
AOTITorchError aoti_torch_create_tensor_from_blob_v2(void* data, int64_t n, const int64_t* sizes, const int64_t* strides, int64_t offset,
                                                     int32_t dtype, int32_t, int32_t, AtenTensorHandle* made, int32_t, const uint8_t*,
                                                     int64_t) {
  return guarded([&] {
    *made = handle({nullptr, static_cast<char*>(data) + offset * bytes_of(dtype), dtype, {sizes, sizes + n}, {strides, strides + n}});
  });
}
AOTITorchError torch_from_blob(void* data, int64_t n, const int64_t* sizes, const int64_t* strides, int64_t offset, int32_t dtype,
                               int32_t device, int32_t index, AtenTensorHandle* made, int32_t layout, const uint8_t*, int64_t,
                               void (*deleter)(void*, void*), void*) {
  if (deleter) return 1;
  return aoti_torch_create_tensor_from_blob_v2(data, n, sizes, strides, offset, dtype, device, index, made, layout, nullptr, 0);
}

AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle t, void** found) {
  *found = of(t)->data;
  return 0;
}
AOTITorchError aoti_torch_get_dim(AtenTensorHandle t, int64_t* found) {
  *found = int64_t(of(t)->sizes.size());
  return 0;
}
AOTITorchError aoti_torch_get_numel(AtenTensorHandle t, int64_t* found) {
  *found = product(of(t)->sizes);
  return 0;
}
AOTITorchError aoti_torch_get_size(AtenTensorHandle t, int64_t d, int64_t* found) {
  const Sizes& sizes = of(t)->sizes;
  return guarded([&] { *found = sizes.at(size_t(d < 0 ? d + int64_t(sizes.size()) : d)); });
}
AOTITorchError aoti_torch_get_stride(AtenTensorHandle t, int64_t d, int64_t* found) {
  const Sizes& strides = of(t)->strides;
  return guarded([&] { *found = strides.at(size_t(d < 0 ? d + int64_t(strides.size()) : d)); });
}
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle t, int32_t* found) {
  *found = of(t)->dtype;
  return 0;
}
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle, int32_t* found) {
  *found = 0;
  return 0;
}
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* found) {
  *found = 0;
  return 0;
}
AOTITorchError aoti_torch_is_contiguous(AtenTensorHandle t, bool* found) {
  *found = of(t)->contiguous();
  return 0;
}

AOTITorchError torch_new_list_reserve_size(size_t size, StableListHandle* made) {
  List* list = new List;
  list->reserve(size);
  *made = reinterpret_cast<StableListHandle>(list);
  return 0;
}
AOTITorchError torch_list_size(StableListHandle list, size_t* size) {
  *size = reinterpret_cast<List*>(list)->size();
  return 0;
}
AOTITorchError torch_list_get_item(StableListHandle list, size_t index, StableIValue* element) {
  return guarded([&] { *element = reinterpret_cast<List*>(list)->at(index); });
}
AOTITorchError torch_list_push_back(StableListHandle list, StableIValue element) {
  reinterpret_cast<List*>(list)->push_back(element);
  return 0;
}
AOTITorchError torch_delete_list(StableListHandle list) {
  delete reinterpret_cast<List*>(list);
  return 0;
}
AOTITorchError torch_string_length(StringHandle text, size_t* length) {
  *length = reinterpret_cast<std::string*>(text)->size();
  return 0;
}
AOTITorchError torch_string_c_str(StringHandle text, const char** data) {
  *data = reinterpret_cast<std::string*>(text)->c_str();
  return 0;
}
AOTITorchError torch_delete_string(StringHandle text) {
  delete reinterpret_cast<std::string*>(text);
  return 0;
}

// Two threads, one after the other: work is cut as for two, and no result may depend on that.
AOTITorchError torch_get_num_threads(uint32_t* found) {
  *found = 2;
  return 0;
}
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelFunc work, void* context) {
  const int64_t half = std::max((end - begin + 1) / 2, std::max<int64_t>(grain, 1));
  for (int64_t at = begin; at < end; at += half) work(at, std::min(end, at + half), context);
  return 0;
}

AOTITorchError torch_call_dispatcher(const char* name, const char*, StableIValue* stack, uint64_t) {
  return guarded([&] {
    const std::string op = name;
    const Tensor self = taken(stack[0]);
    Tensor made;
    if (op == "aten::contiguous") {
      made = contiguous(self);
    } else if (op == "aten::zero_") {
      made = zeros(self);
    } else if (op == "aten::view") {
      made = reshaped(self, taken_sizes(stack[1]));
    } else if (op == "aten::flatten") {  // of the first two dimensions, the only use
      Sizes sizes = self.sizes;
      if (as<int64_t>(stack[1]) != 0 || as<int64_t>(stack[2]) != 1) throw std::runtime_error("flatten of other dimensions");
      sizes[0] *= sizes[1];
      sizes.erase(sizes.begin() + 1);
      made = reshaped(self, sizes);
    } else if (op == "aten::new_zeros") {
      const Sizes sizes = taken_sizes(stack[1]);
      made = zeros(fresh(taken_dtype(stack[2], self.dtype), sizes, packed(sizes)));
    } else {
      throw std::runtime_error(op + " is not here");
    }
    stack[0] = value(new Tensor(made));
  });
}

// The library's, which are never asked for.
AOTITorchError aoti_torch_cpu_mm_out(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle) { return 1; }
AOTITorchError aoti_torch_cpu_addmm_out(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, double, double) { return 1; }
AOTITorchError aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, double,
                                                                          int32_t, AtenTensorHandle*, double*, AtenTensorHandle*,
                                                                          AtenTensorHandle*) {
  return 1;
}
AOTITorchError aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu_backward(
    AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, double, int32_t,
    AtenTensorHandle*, double*, AtenTensorHandle*, AtenTensorHandle*, AtenTensorHandle*) {
  return 1;
}

}  // extern "C"

// ---------------------------------------------------------------- the server
namespace {

void read(void* to, size_t bytes) {
  if (bytes && std::fread(to, 1, bytes, stdin) != bytes) throw std::runtime_error("a call that ends early");
}
template <class T>
T read() {
  T x;
  read(&x, sizeof x);
  return x;
}
std::string read_text() {
  std::string text(read<uint32_t>(), '\0');
  read(text.data(), text.size());
  return text;
}
template <class T>
StableIValue read_list() {
  List* list = new List;
  for (uint32_t left = read<uint32_t>(); left > 0; --left) list->push_back(value(read<T>()));
  return value(list);
}
StableIValue read_tensor() {
  const int32_t dtype = read<int32_t>();
  Sizes sizes(read<uint32_t>()), strides(sizes.size());
  read(sizes.data(), sizes.size() * 8);
  read(strides.data(), strides.size() * 8);
  const Tensor made = fresh(dtype, sizes, strides);
  read(made.data, size_t(extent(sizes, strides) * bytes_of(dtype)));
  return value(new Tensor(made));
}
StableIValue read_argument() {
  switch (read<char>()) {
    case 't': return read_tensor();
    case 'o': return value(new StableIValue(read_tensor()));
    case 'n': return 0;
    case 'T': {
      List* list = new List;
      for (uint32_t left = read<uint32_t>(); left > 0; --left) list->push_back(read_tensor());
      return value(list);
    }
    case 'd': return value(read<double>());
    case 'i': return value(read<int64_t>());
    case 'b': return value(read<char>() != 0);
    case 'y': return value(read<int32_t>());
    case 's': return value(new std::string(read_text()));
    case 'D': return read_list<double>();
    case 'I': return read_list<int64_t>();
    default: throw std::runtime_error("an argument of no kind");
  }
}

void write(const void* from, size_t bytes) {
  if (bytes && std::fwrite(from, 1, bytes, stdout) != bytes) std::exit(3);
}
template <class T>
void write(T x) {
  write(&x, sizeof x);
}
void write_text(const std::string& text) {
  write(uint32_t(text.size()));
  write(text.data(), text.size());
}
void write_tensor(StableIValue given) {
  const Tensor t = contiguous(taken(given));
  write(t.dtype);
  write(uint32_t(t.sizes.size()));
  write(t.sizes.data(), t.sizes.size() * 8);
  write(t.data, size_t(product(t.sizes) * bytes_of(t.dtype)));
}
void write_result(char kind, StableIValue given) {
  if (kind == 't') return write_tensor(given);
  const std::unique_ptr<List> list(as<List*>(given));
  write(uint32_t(list->size()));
  for (const StableIValue one : *list) write_tensor(one);
}

}  // namespace

extern "C" const char* w2s_fast_signatures();

int main() {
  write_text(w2s_fast_signatures());
  std::fflush(stdout);
  for (int first; (first = std::getc(stdin)) != EOF; std::fflush(stdout)) {
    std::ungetc(first, stdin);
    const std::string op = read_text(), kinds = read_text();
    const uint32_t inputs = read<uint32_t>();
    List stack(std::max<size_t>(inputs, kinds.size()));
    for (uint32_t i = 0; i < inputs; ++i) stack[i] = read_argument();
    try {
      implementations().at(op)(stack.data(), inputs, kinds.size());
    } catch (const std::exception& error) {
      write('e');
      write_text(error.what());
      continue;
    }
    write('r');
    for (size_t i = 0; i < kinds.size(); ++i) write_result(kinds[i], stack[i]);
  }
}
