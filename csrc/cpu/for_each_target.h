// Compiles the header W2S_KERNEL once a target, each time in that target's namespace with its Vec. See vec.h.
// No include guard: a source file includes it once for its kernel.
#include "cpu/vec.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own intrinsic headers warn about their undefined operands; vectors never cross a call here, so ABI notes
// say nothing. Instantiation is at the end of the file, hence no pop.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

// -DW2S_ONLY_TARGET=512, 2 (AVX2) or 0 (portable) leaves the others out: a quicker build, for the sanitizers.
#if !defined(W2S_ONLY_TARGET)
#define W2S_HAS_TARGET(target) W2S_X86
#else
#define W2S_HAS_TARGET(target) (W2S_X86 && W2S_ONLY_TARGET == target)
#endif

#if W2S_HAS_TARGET(512)
W2S_TARGET_BEGIN(W2S_AVX512)
namespace w2s::avx512 {
template <class T>
using Vec = std::conditional_t<std::is_same_v<T, float>, Float, VectorExtension<double, 8>>;
#include "cpu/vec_math.h"
#include W2S_KERNEL
}  // namespace w2s::avx512
W2S_TARGET_END
#endif

#if W2S_HAS_TARGET(2)
W2S_TARGET_BEGIN(W2S_AVX2)
namespace w2s::avx2 {
template <class T>
using Vec = std::conditional_t<std::is_same_v<T, float>, Float, VectorExtension<double, 4>>;
#include "cpu/vec_math.h"
#include W2S_KERNEL
}  // namespace w2s::avx2
W2S_TARGET_END
#endif

#if W2S_HAS_TARGET(512) && W2S_HAS_TARGET(2)
#define W2S_DISPATCH(function)                                    \
  (::w2s::isa() == ::w2s::Isa::avx512 ? ::w2s::avx512::function   \
   : ::w2s::isa() == ::w2s::Isa::avx2 ? ::w2s::avx2::function     \
                                      : ::w2s::portable::function)
#elif W2S_HAS_TARGET(512)
#define W2S_DISPATCH(function) (::w2s::avx512::function)
#elif W2S_HAS_TARGET(2)
#define W2S_DISPATCH(function) (::w2s::avx2::function)
#else
#define W2S_DISPATCH(function) (::w2s::portable::function)
#endif

namespace w2s::portable {
template <class T>
using Vec = VectorExtension<T, 16 / sizeof(T)>;
#include "cpu/vec_math.h"
#include W2S_KERNEL
}  // namespace w2s::portable
