// Compiles the header W2S_KERNEL once a target in this source, each time in that target's namespace with its Vec: for the
// dense product, whose host and kernels are one. All others are sources of their own; see kernels.h.
// No include guard: a source file includes it once for its kernel.
#include "cpu/kernels.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own intrinsic headers warn about their undefined operands; vectors never cross a call here, so ABI notes
// say nothing. Instantiation is at the end of the file, hence no pop.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#if W2S_TARGETS & 4
W2S_TARGET_BEGIN(W2S_AVX512)
namespace w2s::avx512 {
template <class T>
using Vec = std::conditional_t<std::is_same_v<T, float>, Float, VectorExtension<double, 8>>;
#include "cpu/vec_math.h"
#include W2S_KERNEL
}  // namespace w2s::avx512
W2S_TARGET_END
#endif

#if W2S_TARGETS & 6  // also double's, whatever the instruction set of float
W2S_TARGET_BEGIN(W2S_AVX2)
namespace w2s::avx2 {
template <class T>
using Vec = std::conditional_t<std::is_same_v<T, float>, Float, VectorExtension<double, 4>>;
#include "cpu/vec_math.h"
#include W2S_KERNEL
}  // namespace w2s::avx2
W2S_TARGET_END
#endif

#if W2S_TARGETS & 1
namespace w2s::portable {
template <class T>
using Vec = VectorExtension<T, 16 / sizeof(T)>;
#include "cpu/vec_math.h"
#include W2S_KERNEL
}  // namespace w2s::portable
#endif

// The copy of a function over A for this machine: W2S_DISPATCH_AS(A, pack<A>)(arguments). In a template over A.
#if W2S_TARGETS == 6
#define W2S_DISPATCH_AS(A, ...)                                                          \
  ([] {                                                                                  \
    if constexpr (sizeof(A) == 8) return &::w2s::avx2::__VA_ARGS__;                       \
    else return ::w2s::isa() == ::w2s::Isa::avx512 ? &::w2s::avx512::__VA_ARGS__ : &::w2s::avx2::__VA_ARGS__; \
  }())
#elif W2S_TARGETS == 4
#define W2S_DISPATCH_AS(A, ...)                                     \
  ([] {                                                             \
    if constexpr (sizeof(A) == 8) return &::w2s::avx2::__VA_ARGS__;  \
    else return &::w2s::avx512::__VA_ARGS__;                        \
  }())
#elif W2S_TARGETS == 2
#define W2S_DISPATCH_AS(A, ...) (&::w2s::avx2::__VA_ARGS__)
#else
#define W2S_DISPATCH_AS(A, ...) (&::w2s::portable::__VA_ARGS__)
#endif
