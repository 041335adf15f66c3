// CRC-32 as zlib, gzip and Ethernet define it: polynomial 0x04c11db7, bits reflected, inverted before and after.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace op_ds {

constexpr uint32_t kCrcPolynomial = 0xedb88320u;  // reflected: the bit of x^31 is the lowest one

// Goes on from `state`, which is not inverted, over `num_bytes` more.
using Crc32Fn = uint32_t (*)(uint32_t state, const uint8_t* data, int64_t num_bytes);

uint32_t crc32_scalar(uint32_t state, const uint8_t* data, int64_t num_bytes) noexcept;
Crc32Fn crc32_clmul() noexcept;   // nullptr where the compiler does not target x86
Crc32Fn crc32_vclmul() noexcept;  // the same

// The path that goes with `isa`. Carry-less multiplication is a feature of its own: a processor with AVX2 or AVX-512
// that lacks it gets the next narrower path, which gives the same sums.
Crc32Fn find_crc32(Isa isa) noexcept;

// x^exponent modulo the polynomial, reflected, as the carry-less multiplications of the folding paths take it: the
// product of two reflected 64-bit numbers comes out one bit too low, and the factor makes that good.
constexpr uint64_t crc_fold_factor(int exponent) {
  uint32_t power = 0x80000000u;  // x^0
  for (int i = 0; i < exponent; ++i) power = (power >> 1) ^ (power & 1 ? kCrcPolynomial : 0);
  return static_cast<uint64_t>(power) << 1;
}

// What the two halves of 128 bits are multiplied by to move them `bits` further back in the message.
constexpr uint64_t crc_fold_low(int bits) { return crc_fold_factor(bits + 32); }
constexpr uint64_t crc_fold_high(int bits) { return crc_fold_factor(bits - 32); }

}  // namespace op_ds
