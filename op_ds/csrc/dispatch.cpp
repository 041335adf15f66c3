// Which kernels this processor can run.
//
// Asks the processor itself: the compilers' __builtin_cpu_supports reads a table whose layout belongs to their run-time
// library, and with a clang linked against another one it denied everything without a word.
#include "crc32.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace op_ds {
namespace {

struct Features {
  bool avx2 = false;
  bool avx512 = false;
  bool clmul = false;   // with AVX2
  bool vclmul = false;  // with AVX-512
};

#if defined(__x86_64__)
Features detect() noexcept {
  constexpr uint32_t kYmmState = 0x06, kZmmState = 0xe6;  // bits of XCR0: what the operating system saves
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !(c & bit_AVX)) return {};
  const bool has_fma = c & bit_FMA, has_clmul = c & bit_PCLMUL;
  uint32_t saved, upper;
  __asm__("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return {};
  const bool avx2 = has_fma && (b & bit_AVX2) && (saved & kYmmState) == kYmmState;
  const bool avx512 = avx2 && (b & bit_AVX512F) && (saved & kZmmState) == kZmmState;
  const bool clmul = avx2 && has_clmul;
  return {avx2, avx512, clmul, avx512 && clmul && (c & bit_VPCLMULQDQ)};
}
#else
Features detect() noexcept { return {}; }
#endif

}  // namespace

const KernelTable* find_kernels(Isa isa) noexcept {
  const Features features = detect();
  switch (isa) {
    case Isa::kScalar:
      return scalar_kernels();
    case Isa::kAvx2:
      return features.avx2 ? avx2_kernels() : nullptr;
    case Isa::kAvx512:
      return features.avx512 ? avx512_kernels() : nullptr;
    case Isa::kAuto:
      if (features.avx512) return avx512_kernels();
      return features.avx2 ? avx2_kernels() : scalar_kernels();
  }
  return nullptr;
}

Crc32Fn find_crc32(Isa isa) noexcept {
  const Features features = detect();
  if (features.vclmul && (isa == Isa::kAuto || isa == Isa::kAvx512)) return crc32_vclmul();
  return features.clmul && isa != Isa::kScalar ? crc32_clmul() : crc32_scalar;
}

}  // namespace op_ds
