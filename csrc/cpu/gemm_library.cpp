// The library's float32 product beside our own: this machine takes the one that it runs faster (choice.h), for each class
// of shapes.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <vector>

#include "cpu/choice.h"
#include "cpu/convert.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/products.h"
#include "cpu/tensors.h"

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace w2s {
namespace {

// The BLAS that torch.mm itself calls, or null: called as it is, without tensors and the dispatcher.
using Sgemm = void (*)(const char*, const char*, const int*, const int*, const int*, const float*, const float*, const int*,
                       const float*, const int*, const float*, float*, const int*);
Sgemm blas() {
#if defined(__linux__)
  static const auto found = [] {
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch ? reinterpret_cast<Sgemm>(dlsym(torch, "sgemm_")) : nullptr;
  }();
  return found;
#else
  return nullptr;
#endif
}

// Shapes that differ in what limits them: few rows (the other operand is read once, or for some tens packed to be read
// again) with either layout of that operand, rows that fill a quarter of a vector at most (transposed, they are the vector in our product) and a single one (which the
// library reads the matrix for as fast as memory gives it), many rows over a short depth (writing c), so many rows that
// packing the other operand is still felt, and the rest: with the depth of the first operand contiguous, or its rows
// (gradients: dz^T W), which have to be turned. Last, bfloat16 operands that we widen: as we pack them, or piece by piece
// for the library's product of float32.
enum Class { few_rows, tens_of_rows, few_columns, fewest_columns, one_column, shallow, some, deep, deep_turned, widened, CLASSES };
constexpr const char* NAMES[CLASSES] = {"product-few-rows", "product-tens-of-rows", "product-few-rows-transposed",
                                        "product-fewest-rows-transposed", "product-one-row-transposed", "product-shallow",
                                        "product-some-rows", "product-deep", "product-deep-turned", "product-widened"};
constexpr int64_t FEWEST = 4, TENS = 24, SOME = 256;
constexpr double SMALL = 1 << 18;  // products below this many multiply-adds are ours: the library's call costs more

Class class_of(int64_t M, int64_t N, int64_t K, bool transposed, bool first_turned) {
  if (M <= FEW) return !transposed ? M < TENS ? few_rows : tens_of_rows : M == 1 ? one_column : M <= FEWEST ? fewest_columns : few_columns;
  return K <= 256 || N <= FEW ? shallow : first_turned ? deep_turned : M <= SOME ? some : deep;
}

bool plain(int64_t rows, int64_t columns, int64_t down, int64_t across) {  // a matrix as BLAS takes it
  return (across == 1 && down >= std::max<int64_t>(columns, 1)) || (down == 1 && across >= std::max<int64_t>(rows, 1));
}

Tensor view(const void* data, int64_t rows, int64_t columns, int64_t down, int64_t across, ScalarType type = ScalarType::Float) {
  const int64_t sizes[2] = {rows, columns}, strides[2] = {down, across};
  return torch::stable::from_blob(const_cast<void*>(data), {sizes, 2}, {strides, 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), type);
}

// BLAS stores by columns: there, what is c is c^T = b^T a^T.
bool run_blas(Sgemm gemm, const Operand& a, const Operand& b, Target<float> c, float alpha, bool add) {
  if (c.across != 1) return run_blas(gemm, b.t(), a.t(), {c.data, c.across, c.down}, alpha, add);
  const auto fits = [](int64_t n) { return n < (int64_t(1) << 31); };
  const auto pitch = [](const Operand& x) { return x.across == 1 ? std::max(x.down, x.columns) : std::max(x.across, x.rows); };
  if (!fits(a.rows) || !fits(b.columns) || !fits(a.columns) || !fits(pitch(a)) || !fits(pitch(b)) || !fits(c.down)) return false;
  const int M = int(a.rows), N = int(b.columns), K = int(a.columns), of_a = int(pitch(a)), of_b = int(pitch(b));
  const int of_c = int(std::max<int64_t>(c.down, N));
  const float before = add ? 1.0f : 0.0f;
  gemm(b.across == 1 ? "N" : "T", a.across == 1 ? "N" : "T", &N, &M, &K, &alpha, static_cast<const float*>(b.data), &of_b,
       static_cast<const float*>(a.data), &of_a, &before, c.data, &of_c);
  return true;
}

void run(const Operand& a, const Operand& b, Target<float> c, float alpha, bool add) {
  if (const Sgemm gemm = blas(); gemm && run_blas(gemm, a, b, c, alpha, add)) return;
  const Tensor x = view(a.data, a.rows, a.columns, a.down, a.across), y = view(b.data, b.rows, b.columns, b.down, b.across);
  const Tensor out = view(c.data, a.rows, b.columns, c.down, c.across);
  if (!add && alpha == 1) {
    library_call(aoti_torch_cpu_mm_out(out.get(), x.get(), y.get()));
  } else {
    library_call(aoti_torch_cpu_addmm_out(out.get(), out.get(), x.get(), y.get(), add ? 1.0 : 0.0, alpha));
  }
}

constexpr int64_t PIECE = 1024, COLUMNS = 512;  // rows and depth, and columns, that are widened at a time

// rows [row, row + rows) and columns [column, column + columns) of x as float32, in scratch where they are not
Operand widened_piece(const Operand& x, int64_t row, int64_t rows, int64_t column, int64_t columns, int slot) {
  const char* from = static_cast<const char*>(x.data) + (row * x.down + column * x.across) * bytes_of(x.dtype);
  if (x.dtype == Dtype::f32) return {from, Dtype::f32, rows, columns, x.down, x.across};
  const bool by_rows = x.across == 1;
  const int64_t lines = by_rows ? rows : columns, length = by_rows ? columns : rows, apart = by_rows ? x.down : x.across;
  float* to = scratch_of<float>(slot, rows * columns);
  parallel_items(lines, grain_of(length), [&](int64_t i) {
    kernels<ConvertKernels, float>().widen(from + i * apart * bytes_of(x.dtype), x.dtype, length, to + i * length);
  });
  return {to, Dtype::f32, rows, columns, by_rows ? length : 1, by_rows ? 1 : length};
}

// A piece of the longer side is widened once beside pieces of the other one.
void run_widened(const Operand& a, const Operand& b, Target<float> c, float alpha, bool add) {
  const int64_t M = a.rows, N = b.columns, K = a.columns;
  for (int64_t k = 0; k < K; k += PIECE) {
    const int64_t depth = std::min(PIECE, K - k);
    for (int64_t i = 0; i < M; i += PIECE) {
      const int64_t rows = std::min(PIECE, M - i);
      const Operand left = widened_piece(a, i, rows, k, depth, 0);
      for (int64_t j = 0; j < N; j += COLUMNS) {
        const int64_t columns = std::min(COLUMNS, N - j);
        run(left, widened_piece(b, k, depth, j, columns, 1), {c.data + i * c.down + j * c.across, c.down, c.across}, alpha, add || k > 0);
      }
    }
  }
}

// Both products of one class, on sizes that take about a millisecond.
Choice& choice(int k) {
  static Choice choices[CLASSES] = {Choice(NAMES[0]), Choice(NAMES[1]), Choice(NAMES[2]), Choice(NAMES[3]), Choice(NAMES[4]),
                                    Choice(NAMES[5]), Choice(NAMES[6]), Choice(NAMES[7]), Choice(NAMES[8]), Choice(NAMES[9])};
  struct Shape { int64_t M, N, K; bool transposed, first_turned = false; };
  constexpr Shape shapes[CLASSES] = {{8, 2048, 1024, false}, {FEW, 2048, 1024, false}, {8, 2048, 1024, true}, {2, 2048, 1024, true},
                                     {1, 2048, 1024, true}, {512, 1024, 128, true}, {64, 1024, 1024, true}, {512, 512, 1024, true},
                                     {256, 256, 2048, false, true}, {256, 1024, 512, true}};
  const Shape& s = shapes[k];
  choices[k].settle([&](auto&& race) {
    const bool wide = k != widened;
    std::vector<float> a(size_t(s.M * s.K), 0.5f), b(size_t(s.N * s.K), 0.25f), c(size_t(s.M * s.N));
    std::vector<uint16_t> a16(wide ? 0 : a.size(), 0x3f00), b16(wide ? 0 : b.size(), 0x3e80);
    const Dtype type = wide ? Dtype::f32 : Dtype::bf16;
    Operand left{a.data(), type, s.M, s.K, s.K, 1}, right{b.data(), type, s.K, s.N, s.N, 1};
    if (!wide) left.data = a16.data(), right.data = b16.data();
    if (s.first_turned) left.down = 1, left.across = s.M;
    if (s.transposed) right.down = 1, right.across = s.K;
    const Target<float> to{c.data(), s.N, 1};
    race(2.0 * double(s.M) * double(s.N) * double(s.K), [&] { gemm_own(left, right, to, 1.0f, false); },
         [&] { (wide ? run : run_widened)(left, right, to, 1.0f, false); });
  });
  return choices[k];
}

bool takes(int64_t rows, int64_t columns, int64_t depth, bool transposed, bool first_turned) {
  if (double(rows) * double(columns) * double(depth) < SMALL || !library_allowed()) return false;
  return library_forced() || choice(class_of(rows, columns, depth, transposed, first_turned)).library_is_faster();
}

void run_bf16(const Operand& a, const Operand& b, void* c) {
  const auto seen = [](const Operand& x) { return view(x.data, x.rows, x.columns, x.down, x.across, ScalarType::BFloat16); };
  const Tensor x = seen(a), y = seen(b), out = view(c, a.rows, b.columns, b.columns, 1, ScalarType::BFloat16);
  library_call(aoti_torch_cpu_mm_out(out.get(), x.get(), y.get()));
}

// Few rows are ours: they are read where they lie. The rest in two classes, as of float32.
Choice& choice_bf16(int64_t rows) {
  static Choice choices[2] = {Choice("product-bf16-some-rows"), Choice("product-bf16")};
  const bool many = rows > SOME;
  choices[many].settle([&](auto&& race) {
    const int64_t M = many ? 512 : 64, N = many ? 512 : 1024, K = 1024;
    std::vector<uint16_t> a(size_t(M * K), 0x3f00), b(size_t(N * K), 0x3e80), c(size_t(M * N));  // 0.5, 0.25
    std::vector<float> sums(size_t(M * N));
    const Operand left{a.data(), Dtype::bf16, M, K, K, 1}, right{b.data(), Dtype::bf16, K, N, 1, K};
    race(2.0 * double(M) * double(N) * double(K), [&] { gemm_bf16(left, right, {sums.data(), N, 1}, false); },
         [&] { run_bf16(left, right, c.data()); });
  });
  return choices[many];
}

}  // namespace

bool gemm_library_bf16(const Operand& a, const Operand& b, void* c) {
  const int64_t M = a.rows, N = b.columns, K = a.columns;
  if (a.dtype != Dtype::bf16 || b.dtype != Dtype::bf16 || M <= FEW || !has_bf16_dot() || !library_allowed()) return false;
  if (double(M) * double(N) * double(K) < SMALL || !plain(M, K, a.down, a.across) || !plain(K, N, b.down, b.across)) return false;
  if (!library_forced() && !choice_bf16(M).library_is_faster()) return false;
  run_bf16(a, b, c);
  return true;
}

void settle_products() {
  if (!library_allowed() || library_forced()) return;
  for (int k = 0; k < CLASSES; ++k) choice(k);
}

bool library_takes(int64_t rows, int64_t columns, int64_t depth, bool transposed) { return takes(rows, columns, depth, transposed, false); }

bool gemm_library(const Operand& a, const Operand& b, Target<float> c, float alpha, bool add) {
  const int64_t M = a.rows, N = b.columns, K = a.columns;
  if (a.dtype != Dtype::f32 || b.dtype != Dtype::f32) return false;
  if (!plain(M, K, a.down, a.across) || !plain(K, N, b.down, b.across) || !plain(M, N, c.down, c.across)) return false;
  // few columns, and the depth contiguous on both sides: few rows of the product turned round
  const bool turned = a.across == 1 && b.down == 1 && N < M && N <= FEW;
  if (turned && !library_takes(N, M, K, true)) return false;
  // c stored by columns: it is b^T a^T that is computed
  if (!turned && !(c.across == 1 ? takes(M, N, K, b.down == 1, a.across != 1) : takes(N, M, K, a.across == 1, b.down != 1)))
    return false;
  run(a, b, c, alpha, add);
  return true;
}

bool gemm_widened(const Operand& a, const Operand& b, Target<float> c, float alpha, bool add) {
  const int64_t M = a.rows, N = b.columns, K = a.columns;
  const auto narrow = [](const Operand& x) { return x.dtype == Dtype::bf16 || x.dtype == Dtype::f16; };
  const auto fits = [&](const Operand& x) { return (narrow(x) || x.dtype == Dtype::f32) && plain(x.rows, x.columns, x.down, x.across); };
  if (!(narrow(a) || narrow(b)) || !fits(a) || !fits(b) || !plain(M, N, c.down, c.across)) return false;
  if (std::min(M, N) < SOME || K <= FEW || !library_allowed()) return false;
  if (!library_forced() && !choice(widened).library_is_faster()) return false;
  run_widened(a, b, c, alpha, add);
  return true;
}

namespace {

// [classes, 3]: our rate and the library's in FLOP a second, and whether the library's is taken
Tensor product_rates(Tensor like) {
  Tensor out = fresh(like, {CLASSES, 3}, ScalarType::Double);
  double* p = static_cast<double*>(out.data_ptr());
  for (int k = 0; k < CLASSES; ++k, p += 3) {
    p[0] = choice(k).own;
    p[1] = choice(k).library;
    p[2] = library_allowed() && (library_forced() || choice(k).library_is_faster());
  }
  return out;
}

// c = a b or c += a b as the kernels make it in float32 (way 0), by our own product (1), or as they make it of operands
// that may be bfloat16 (2: the machine's bfloat16 instructions where it has them): the door for tests and benchmarks of
// the product alone
void product(Strided a, Strided b, Strided c, bool add, int64_t way) {
  const auto operand = [](const Tensor& t) {
    return Operand{t.data_ptr(), dtype_of(t.scalar_type()), t.size(0), t.size(1), t.stride(0), t.stride(1)};
  };
  const Operand x = operand(a), y = operand(b);
  if (c.scalar_type() == ScalarType::Double) {
    gemm(x, y, Target<double>{static_cast<double*>(c.data_ptr()), c.stride(0), c.stride(1)}, 1.0, add);
    return;
  }
  const Target<float> to{static_cast<float*>(c.data_ptr()), c.stride(0), c.stride(1)};
  if (way == 1) gemm_own(x, y, to, 1.0f, add);
  else if (way == 2) multiply(x, y, to, add);
  else gemm(x, y, to, 1.0f, add);
}

}  // namespace
}  // namespace w2s

STABLE_TORCH_LIBRARY_FRAGMENT(w2s_fast, m) {
  m.def("product_rates(Tensor like) -> Tensor");
  m.def("product(Tensor a, Tensor b, Tensor(a!) c, bool add, int way) -> ()");
}
W2S_IMPLEMENTATIONS(m) {
  m.add<&w2s::product_rates>("product_rates");
  m.add<&w2s::product>("product");
}
