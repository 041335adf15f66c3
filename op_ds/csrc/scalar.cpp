// Plain C++: the reference of the vector paths, and the only path off x86.
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "kernels_inl.h"

namespace op_ds {
namespace {

struct Scalar {
  using Floats = float;
  using Ints = uint32_t;
  struct Lanes {
    double sum[kSumLanes];
  };
  static constexpr int64_t kWidth = 1;

  static float set1(float x) { return x; }
  static float load(const float* p) { return *p; }
  static float load_bf16(const uint16_t* p) { return from_bits(static_cast<uint32_t>(*p) << 16); }
  static float load_master(const uint16_t* hi, const int16_t* lo) {
    return from_bits((static_cast<uint32_t>(*hi) << 16) + static_cast<uint32_t>(static_cast<int32_t>(*lo)));
  }
  static void store(float* p, float x) { *p = x; }
  static void store_master(uint16_t* hi, int16_t* lo, float x) {
    *hi = static_cast<uint16_t>((bits(x) + 0x8000u) >> 16);
    *lo = static_cast<int16_t>(bits(x));
  }
  static void stream(float* p, float x) { store(p, x); }
  static void stream_master(uint16_t* hi, int16_t* lo, float x) { store_master(hi, lo, x); }
  static void fence() {}
  static float add(float a, float b) { return a + b; }
  static float sub(float a, float b) { return a - b; }
  static float mul(float a, float b) { return a * b; }
  static float div(float a, float b) { return a / b; }
  static float sqrt(float a) { return std::sqrt(a); }
  static float fma(float a, float b, float c) { return std::fma(a, b, c); }

  static uint32_t count_from(uint32_t first) { return first; }
  static uint32_t set1_int(uint32_t x) { return x; }
  static uint32_t bits(float x) {
    uint32_t found;
    std::memcpy(&found, &x, sizeof found);
    return found;
  }
  static uint32_t xor_int(uint32_t x, uint32_t y) { return x ^ y; }
  static uint32_t add_int(uint32_t x, uint32_t y) { return x + y; }
  static uint32_t mul_int(uint32_t x, uint32_t y) { return x * y; }
  static uint32_t and_int(uint32_t x, uint32_t y) { return x & y; }
  template <int kBits>
  static uint32_t shift_right(uint32_t x) { return x >> kBits; }
  static uint32_t keep_below(uint32_t x, uint32_t value, uint32_t limit) {
    return static_cast<int32_t>(value) < static_cast<int32_t>(limit) ? x : 0;
  }
  static void store_upper(uint16_t* p, uint32_t x) { *p = static_cast<uint16_t>(x >> 16); }
  static void stream_upper(uint16_t* p, uint32_t x) { store_upper(p, x); }
  static uint32_t max_int(uint32_t x, uint32_t y) { return static_cast<int32_t>(x) > static_cast<int32_t>(y) ? x : y; }
  static uint32_t to_ints(float x) { return static_cast<uint32_t>(static_cast<int32_t>(x)); }
  static float to_floats(uint32_t x) { return static_cast<float>(static_cast<int32_t>(x)); }
  static float abs(float x) { return std::fabs(x); }
  static float min(float x, float y) { return x < y ? x : y; }
  static float max(float x, float y) { return x > y ? x : y; }
  static float largest(float x) { return x; }
  static float load_codes(const uint8_t* p) { return static_cast<float>(*p); }
  static float load_signed_codes(const uint8_t* p) { return static_cast<float>(static_cast<int8_t>(*p)); }
  static void store_codes(uint8_t* p, uint32_t x) { *p = static_cast<uint8_t>(x); }

  static Lanes zero_lanes() { return {}; }
  template <bool kBf16>
  static void add_squares(Lanes& lanes, const void* values, int64_t i) {
    for (int lane = 0; lane < kSumLanes; ++lane) {
      const double x = load_grad<Scalar, kBf16>(values, i + lane);
      lanes.sum[lane] += x * x;  // the product of two floats is exact in double
    }
  }
  static void store_lanes(double* target, const Lanes& lanes) { std::memcpy(target, lanes.sum, sizeof lanes.sum); }

 private:
  static float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
};

}  // namespace

const KernelTable* scalar_kernels() noexcept {
  static constexpr KernelTable table = make_table<Scalar>("scalar");
  return &table;
}

}  // namespace op_ds
