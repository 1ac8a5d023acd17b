// How the host reaches kernels, and which copy of them serves this machine.
//
// A family states what its kernels are as a table of function pointers, `template <class A> struct EislKernels`, A the
// accumulating type. A *_kernel.cpp, torch-free, is compiled once a copy: float for every instruction set, double for one
// only (it is for gradcheck and soundness, not for speed). It stands between target_begin.h and target_end.h and fills the
// table with W2S_KERNELS. The host calls kernels<EislKernels, A>().row(...).
#pragma once

#include "cpu/vec.h"

// What this library has: 6 AVX-512 and AVX2, 4 or 2 one of them, 1 portable vectors. setup.py passes it.
#ifndef W2S_TARGETS
#define W2S_TARGETS (W2S_X86 ? 6 : 1)
#endif

namespace w2s {

namespace avx512 {
template <class Table>
const Table& table();
}
namespace avx2 {
template <class Table>
const Table& table();
}
namespace portable {
template <class Table>
const Table& table();
}
namespace wide {  // double
template <class Table>
const Table& table();
}

template <template <class> class Table, class A>
inline const Table<A>& kernels() {
  if constexpr (sizeof(A) == 8) return wide::table<Table<A>>();
#if W2S_TARGETS == 6
  else return isa() == Isa::avx512 ? avx512::table<Table<A>>() : avx2::table<Table<A>>();
#elif W2S_TARGETS == 4
  else return avx512::table<Table<A>>();
#elif W2S_TARGETS == 2
  else return avx2::table<Table<A>>();
#else
  else return portable::table<Table<A>>();
#endif
}

// f(A{}) with the accumulating type of a call
template <class F>
inline auto with_type(bool f64, const F& f) {
  return f64 ? f(double()) : f(float());
}

// f(table) with the one of a call's accumulating type
template <template <class> class Table, class F>
inline auto with_kernels(bool f64, const F& f) {
  return f64 ? f(kernels<Table, double>()) : f(kernels<Table, float>());
}

// Why this library does not serve this machine (as W2S_FAST_CPU caps it), or null.
inline const char* refusal() {
#if W2S_TARGETS == 6 || W2S_TARGETS == 2
  if (isa() == Isa::portable) return "the C++ kernels need AVX2 on this kind of processor";
#elif W2S_TARGETS == 4
  if (isa() != Isa::avx512) return "the C++ kernels were built for AVX-512 alone (W2S_FAST_TARGETS=native)";
#endif
  return nullptr;
}

}  // namespace w2s
