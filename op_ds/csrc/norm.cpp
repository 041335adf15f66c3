#include "norm.h"

#include <cstring>

namespace op_ds {
namespace {

int64_t bytes_of(GradType type) { return type == GradType::kBf16 ? 2 : 4; }

}  // namespace

double add_pairwise(double* values, int64_t n) noexcept {
  if (n == 0) return 0.0;
  for (; n > 1; n = (n + 1) / 2) {
    for (int64_t i = 0; i < n / 2; ++i) values[i] = values[2 * i] + values[2 * i + 1];
    if (n % 2) values[n / 2] = values[n - 1];
  }
  return values[0];
}

double group_sum(const KernelTable& kernels, const void* values, GradType type, int64_t n) noexcept {
  alignas(64) double lanes[kSumLanes];
  if (n == kSumElements) {
    kernels.sum_lanes(values, type, lanes);
  } else {
    alignas(64) char padded[kSumElements * sizeof(float)] = {};
    std::memcpy(padded, values, static_cast<size_t>(n * bytes_of(type)));
    kernels.sum_lanes(padded, type, lanes);
  }
  return add_pairwise(lanes, kSumLanes);
}

int64_t count_nonfinite(const void* values, GradType type, int64_t n) noexcept {
  const auto* bytes = static_cast<const char*>(values);
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits = 0;
    if (type == GradType::kBf16) {
      uint16_t half;
      std::memcpy(&half, bytes + 2 * i, sizeof half);
      bits = static_cast<uint32_t>(half) << 16;
    } else {
      std::memcpy(&bits, bytes + 4 * i, sizeof bits);
    }
    count += (bits & 0x7f800000u) == 0x7f800000u;
  }
  return count;
}

}  // namespace op_ds
