// The folding of crc32_clmul.cpp with 512-bit registers: four of them over the next 256 bytes.
#include "crc32.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,pclmul,vpclmulqdq"))), apply_to = function)
#else
#pragma GCC target("avx512f,pclmul,vpclmulqdq")
#endif

namespace op_ds {
namespace {

constexpr int64_t kVectorBytes = 64;
constexpr int64_t kStrideBytes = 4 * kVectorBytes;

template <int kBits>
__m512i factors() {
  constexpr auto low = static_cast<int64_t>(crc_fold_low(kBits)), high = static_cast<int64_t>(crc_fold_high(kBits));
  return _mm512_set_epi64(high, low, high, low, high, low, high, low);
}

__m512i load(const uint8_t* p) { return _mm512_loadu_si512(p); }

__m512i fold(__m512i x, __m512i k, __m512i next) {
  constexpr int kXorOfThree = 0x96;
  return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(x, k, 0x00), _mm512_clmulepi64_epi128(x, k, 0x11), next,
                                   kXorOfThree);
}

uint32_t folded(uint32_t state, const uint8_t* data, int64_t num_bytes) noexcept {
  if (num_bytes < kStrideBytes) return crc32_clmul()(state, data, num_bytes);
  const __m512i first = _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(state)));
  __m512i a = _mm512_xor_si512(load(data), first);
  __m512i b = load(data + 64), c = load(data + 128), d = load(data + 192);
  data += kStrideBytes, num_bytes -= kStrideBytes;
  const __m512i by_stride = factors<2048>(), by_vector = factors<512>();
  for (; num_bytes >= kStrideBytes; data += kStrideBytes, num_bytes -= kStrideBytes) {
    a = fold(a, by_stride, load(data));
    b = fold(b, by_stride, load(data + 64));
    c = fold(c, by_stride, load(data + 128));
    d = fold(d, by_stride, load(data + 192));
  }
  __m512i x = fold(fold(fold(a, by_vector, b), by_vector, c), by_vector, d);
  for (; num_bytes >= kVectorBytes; data += kVectorBytes, num_bytes -= kVectorBytes) x = fold(x, by_vector, load(data));
  // What is left is a message of 64 bytes with the same remainder: the narrow path takes it and the last bytes.
  uint8_t rest[kVectorBytes];
  _mm512_storeu_si512(rest, x);
  return crc32_clmul()(crc32_clmul()(0, rest, kVectorBytes), data, num_bytes);
}

}  // namespace

Crc32Fn crc32_vclmul() noexcept { return folded; }

}  // namespace op_ds

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

namespace op_ds {
Crc32Fn crc32_vclmul() noexcept { return nullptr; }
}  // namespace op_ds

#endif
