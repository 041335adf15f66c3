// Which kernels this processor can run.
#include "kernels.h"

namespace op_ds {
namespace {

// __builtin_cpu_supports also asks the operating system (XCR0) whether it saves the wide registers.
bool has_avx2() noexcept {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

bool has_avx512() noexcept {
#if defined(__x86_64__)
  return has_avx2() && __builtin_cpu_supports("avx512f");
#else
  return false;
#endif
}

}  // namespace

const KernelTable* find_kernels(Isa isa) noexcept {
  switch (isa) {
    case Isa::kScalar:
      return scalar_kernels();
    case Isa::kAvx2:
      return has_avx2() ? avx2_kernels() : nullptr;
    case Isa::kAvx512:
      return has_avx512() ? avx512_kernels() : nullptr;
    case Isa::kAuto:
      if (has_avx512()) return avx512_kernels();
      return has_avx2() ? avx2_kernels() : scalar_kernels();
  }
  return nullptr;
}

}  // namespace op_ds
