// A look at the values of a tensor from Python, in less time than one operator takes (values.cpp).
#pragma once

#include <cstdint>

namespace w2s {

bool finite32(const float* values, std::int64_t count);
bool finite64(const double* values, std::int64_t count);
// Whether all lie in [0, size).
bool inside32(const std::int32_t* values, std::int64_t count, std::int64_t size);
bool inside64(const std::int64_t* values, std::int64_t count, std::int64_t size);

}  // namespace w2s
