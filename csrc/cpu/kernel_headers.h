// What every kernel source begins with; precompiled.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/log_sum_exp.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"
