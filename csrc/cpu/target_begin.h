// Opens the namespace and the instruction set of one copy of a kernel source; target_end.h closes them. See kernels.h.
// No include guard: once in a source, after its own headers, none of which may be included in between for the first time
// (what the standard library defines has to stay code for any machine).
#include "cpu/kernel_headers.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own intrinsic headers warn about their undefined operands; vectors never cross a call here, so ABI notes
// say nothing. Instantiation is at the end of the file, hence no pop.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

// W2S_COPY: 512, 2 or 0 (portable) of float, 64 of double (AVX2 where the library has it).
#if W2S_COPY == 512
W2S_TARGET_BEGIN(W2S_AVX512)
namespace w2s::avx512 {
using Real = float;
template <class T>
using Vec = std::conditional_t<std::is_same_v<T, float>, Float, VectorExtension<double, 8>>;
#elif W2S_COPY == 2
W2S_TARGET_BEGIN(W2S_AVX2)
namespace w2s::avx2 {
using Real = float;
template <class T>
using Vec = std::conditional_t<std::is_same_v<T, float>, Float, VectorExtension<double, 4>>;
#elif W2S_COPY == 64 && W2S_TARGETS != 1
W2S_TARGET_BEGIN(W2S_AVX2)
namespace w2s::wide {
using Real = double;
template <class T>
using Vec = std::conditional_t<std::is_same_v<T, float>, avx2::Float, VectorExtension<double, 4>>;
#elif W2S_COPY == 64
namespace w2s::wide {
using Real = double;
template <class T>
using Vec = VectorExtension<T, 16 / sizeof(T)>;
#else
namespace w2s::portable {
using Real = float;
template <class T>
using Vec = VectorExtension<T, 16 / sizeof(T)>;
#endif

// Fills the table of this copy: W2S_KERNELS(EislKernels, eisl_row<Real>, ...)
#define W2S_KERNELS(Table, ...)                       \
  template <>                                         \
  const Table<Real>& table<Table<Real>>() {           \
    static constexpr Table<Real> filled{__VA_ARGS__}; \
    return filled;                                    \
  }

#include "cpu/vec_math.h"
