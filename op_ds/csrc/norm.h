// Sum of squares, defined so that thread count, instruction set and device do not matter (docs/optimizer.md).
#pragma once

#include <cstdint>

#include "kernels.h"

namespace op_ds {

// One group: at most kSumElements values, missing ones count as zero.
double group_sum(const KernelTable& kernels, const void* values, GradType type, int64_t n) noexcept;

int64_t count_nonfinite(const void* values, GradType type, int64_t n) noexcept;

// Adds neighbours until one value is left, an absent neighbour counting as zero. Overwrites `values`.
double add_pairwise(double* values, int64_t n) noexcept;

}  // namespace op_ds
