// CRC-32 by folding (Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel,
// 2009): four times 128 bits are multiplied forward over the next 64 bytes, two multiplications per 16 bytes. The last
// 128 bits go through the tables, which costs less code than a reduction and nothing on pieces of some KiB.
#include "crc32.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,pclmul"))), apply_to = function)
#else
#pragma GCC target("avx2,pclmul")
#endif

namespace op_ds {
namespace {

constexpr int64_t kLaneBytes = 16;
constexpr int64_t kStrideBytes = 4 * kLaneBytes;  // four independent chains hide the multiplier's latency

template <int kBits>
__m128i factors() {
  constexpr uint64_t low = crc_fold_low(kBits), high = crc_fold_high(kBits);
  return _mm_set_epi64x(static_cast<int64_t>(high), static_cast<int64_t>(low));
}

__m128i load(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

__m128i fold(__m128i x, __m128i k, __m128i next) {
  const __m128i low = _mm_clmulepi64_si128(x, k, 0x00), high = _mm_clmulepi64_si128(x, k, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

uint32_t folded(uint32_t state, const uint8_t* data, int64_t num_bytes) noexcept {
  if (num_bytes < kStrideBytes) return crc32_scalar(state, data, num_bytes);
  __m128i a = _mm_xor_si128(load(data), _mm_cvtsi32_si128(static_cast<int>(state)));
  __m128i b = load(data + 16), c = load(data + 32), d = load(data + 48);
  data += kStrideBytes, num_bytes -= kStrideBytes;
  const __m128i by_stride = factors<512>(), by_lane = factors<128>();
  for (; num_bytes >= kStrideBytes; data += kStrideBytes, num_bytes -= kStrideBytes) {
    a = fold(a, by_stride, load(data));
    b = fold(b, by_stride, load(data + 16));
    c = fold(c, by_stride, load(data + 32));
    d = fold(d, by_stride, load(data + 48));
  }
  __m128i x = fold(fold(fold(a, by_lane, b), by_lane, c), by_lane, d);
  for (; num_bytes >= kLaneBytes; data += kLaneBytes, num_bytes -= kLaneBytes) x = fold(x, by_lane, load(data));
  uint8_t rest[kLaneBytes];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(rest), x);
  return crc32_scalar(crc32_scalar(0, rest, kLaneBytes), data, num_bytes);
}

}  // namespace

Crc32Fn crc32_clmul() noexcept { return folded; }

}  // namespace op_ds

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

namespace op_ds {
Crc32Fn crc32_clmul() noexcept { return nullptr; }
}  // namespace op_ds

#endif
