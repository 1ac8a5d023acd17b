#pragma once

#include "cpu/sparse_lowrank/products.h"

namespace w2s::sparse {

constexpr int64_t DECODE = 8;  // at most so many tokens

// y [N, O] in this thread's scratch, valid until its next call; h [N, r] is filled where given.
template <class A>
const A* decode(const Pattern& s, const Operand& x, const Operand& a, const Operand& b, double scale, const Tensor& values,
                const std::vector<A>& bias, A* h);

}  // namespace w2s::sparse
