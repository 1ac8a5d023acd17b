// w2s_fast._C: what this build is, what this CPU offers, and what the machine can do at best.
//
// No torch here (the kernels are in _ops), so this module loads before torch and beside any version of it.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <string>

#include "probes.h"
#include "values.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define W2S_X86 1
#include <cpuid.h>
#else
#define W2S_X86 0
#endif

// setup.py passes the build facts; a fact it does not pass is None in Python.
#ifndef W2S_COMPILER
#define W2S_COMPILER "None"
#endif
#ifndef W2S_FLAGS
#define W2S_FLAGS "None"
#endif
#ifndef W2S_TORCH
#define W2S_TORCH "None"
#endif
#ifndef W2S_TORCH_TARGET
#define W2S_TORCH_TARGET "None"
#endif
#ifndef W2S_CUDA
#define W2S_CUDA "None"
#endif
#ifndef W2S_CUDA_ARCHS
#define W2S_CUDA_ARCHS "None"
#endif

namespace py = pybind11;

namespace {

py::object fact(const char* text) {
  return std::strcmp(text, "None") == 0 ? py::object(py::none()) : py::object(py::str(text));
}

py::dict build_facts() {
  py::dict facts;
  facts["compiler"] = fact(W2S_COMPILER);
  facts["flags"] = fact(W2S_FLAGS);
  facts["torch"] = fact(W2S_TORCH);
  facts["torch_target"] = fact(W2S_TORCH_TARGET);
  facts["cuda"] = fact(W2S_CUDA);
  facts["cuda_archs"] = fact(W2S_CUDA_ARCHS);
  return facts;
}

#if W2S_X86
// __builtin_cpu_supports has no AMX names before GCC 13, so these two come from CPUID leaf 7.
bool cpuid7_edx(unsigned bit) {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx >> bit & 1u) != 0;
}
#endif

py::dict cpu_features() {
  py::dict found;
#if W2S_X86
  __builtin_cpu_init();
  found["avx2"] = __builtin_cpu_supports("avx2") != 0;
  found["fma"] = __builtin_cpu_supports("fma") != 0;
  found["avx512f"] = __builtin_cpu_supports("avx512f") != 0;
  found["avx512bw"] = __builtin_cpu_supports("avx512bw") != 0;
  found["avx512vl"] = __builtin_cpu_supports("avx512vl") != 0;
  found["avx512bf16"] = __builtin_cpu_supports("avx512bf16") != 0;
  found["amx_tile"] = cpuid7_edx(24);
  found["amx_bf16"] = cpuid7_edx(22);
#else
  for (const char* name : {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512bf16", "amx_tile", "amx_bf16"})
    found[name] = false;
#endif
  return found;
}

template <class T>
const T* at(std::uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}

bool all_finite(std::uintptr_t address, std::int64_t count, int bytes) {
  return bytes == 8 ? w2s::finite64(at<double>(address), count) : w2s::finite32(at<float>(address), count);
}

bool all_inside(std::uintptr_t address, std::int64_t count, int bytes, std::int64_t size) {
  return bytes == 8 ? w2s::inside64(at<std::int64_t>(address), count, size)
                    : w2s::inside32(at<std::int32_t>(address), count, size);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.doc() = "Build facts, CPU features and machine probes of w2s_fast.";
  m.def("build_facts", build_facts, "Compiler, flags, torch and CUDA versions this extension was built with.");
  m.def("cpu_features", cpu_features, "Instruction sets this CPU has.");
  m.def("finite", all_finite, "(address, count, bytes a number): whether all of float32 or float64 numbers are finite.");
  m.def("inside", all_inside, "(address, count, bytes a number, size): whether all of int32 or int64 are in [0, size).");
  m.def("fma_isa", [] { return std::string(w2s::fma_isa()); }, "The instruction set `fma_peak` runs on.");
  m.def("copy_bandwidth", w2s::copy_bandwidth, release(), py::arg("megabytes") = 256, py::arg("threads") = 1,
        py::arg("repetitions") = 3, "Bytes per second, read and written, of a copy of `megabytes` MiB.");
  m.def("read_bandwidth", w2s::read_bandwidth, release(), py::arg("megabytes") = 256, py::arg("threads") = 1,
        py::arg("repetitions") = 3, "Bytes per second of reading `megabytes` MiB once.");
  m.def("fma_peak", w2s::fma_peak, release(), py::arg("threads") = 1, py::arg("repetitions") = 5,
        "float32 operations per second (a fused multiply-add counts two) from registers.");
}
