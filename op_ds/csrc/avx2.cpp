// AVX2 + FMA: sixteen elements at a time in two registers, so that hi and lo are packed into whole ones.
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#include "kernels_inl.h"

namespace op_ds {
namespace {

struct Avx2 {
  struct Floats {
    __m256 a, b;
  };
  struct Ints {
    __m256i a, b;
  };
  struct Lanes {
    __m256d sum[kSumLanes / 4];
  };
  static constexpr int64_t kWidth = 16;

  static Floats set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static Floats load_bf16(const uint16_t* p) { return {as_floats(upper(p)), as_floats(upper(p + 8))}; }
  static Floats load_master(const uint16_t* hi, const int16_t* lo) {
    return {as_floats(_mm256_add_epi32(upper(hi), lower(lo))),
            as_floats(_mm256_add_epi32(upper(hi + 8), lower(lo + 8)))};
  }
  static void store(float* p, Floats x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
  }
  static void store_master(uint16_t* hi, int16_t* lo, Floats x) {
    const Halves halves = halve(x);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(hi), halves.hi);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lo), halves.lo);
  }
  static void stream(float* p, Floats x) {
    _mm256_stream_ps(p, x.a);
    _mm256_stream_ps(p + 8, x.b);
  }
  static void stream_master(uint16_t* hi, int16_t* lo, Floats x) {
    const Halves halves = halve(x);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(hi), halves.hi);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(lo), halves.lo);
  }
  static void fence() { _mm_sfence(); }
  static Floats add(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static Floats sub(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static Floats mul(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static Floats div(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  static Floats sqrt(Floats x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
  static Floats fma(Floats x, Floats y, Floats z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
  }

  static Ints count_from(uint32_t first) {
    const __m256i begin = _mm256_set1_epi32(static_cast<int>(first)), lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i a = _mm256_add_epi32(begin, lanes);
    return {a, _mm256_add_epi32(a, _mm256_set1_epi32(8))};
  }
  static Ints set1_int(uint32_t x) { return {_mm256_set1_epi32(static_cast<int>(x)), _mm256_set1_epi32(static_cast<int>(x))}; }
  static Ints bits(Floats x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
  static Ints xor_int(Ints x, Ints y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
  static Ints add_int(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
  static Ints mul_int(Ints x, Ints y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
  static Ints and_int(Ints x, Ints y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
  template <int kBits>
  static Ints shift_right(Ints x) { return {_mm256_srli_epi32(x.a, kBits), _mm256_srli_epi32(x.b, kBits)}; }
  static Ints keep_below(Ints x, Ints value, Ints limit) {
    return {_mm256_and_si256(x.a, _mm256_cmpgt_epi32(limit.a, value.a)),
            _mm256_and_si256(x.b, _mm256_cmpgt_epi32(limit.b, value.b))};
  }
  static void store_upper(uint16_t* p, Ints x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), upper_halves(x)); }
  static void stream_upper(uint16_t* p, Ints x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), upper_halves(x)); }
  static Ints max_int(Ints x, Ints y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
  static Ints to_ints(Floats x) { return {_mm256_cvttps_epi32(x.a), _mm256_cvttps_epi32(x.b)}; }
  static Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
  static Floats abs(Floats x) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(x.a, magnitude), _mm256_and_ps(x.b, magnitude)};
  }
  static Floats min(Floats x, Floats y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
  static Floats max(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static float largest(Floats x) {
    const __m256 eight = _mm256_max_ps(x.a, x.b);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
  }
  static Floats load_codes(const uint8_t* p) {
    const __m128i codes = load8(p);
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(codes, 8)))};
  }
  static Floats load_signed_codes(const uint8_t* p) {
    const __m128i codes = load8(p);
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(codes, 8)))};
  }
  static void store_codes(uint8_t* p, Ints x) {
    const __m256i mask = _mm256_set1_epi32(0xff);
    const __m256i words = pack(_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask));
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  }

  static Lanes zero_lanes() {
    Lanes lanes;
    for (__m256d& sum : lanes.sum) sum = _mm256_setzero_pd();
    return lanes;
  }
  template <bool kBf16>
  static void add_squares(Lanes& lanes, const void* values, int64_t i) {
    for (int half = 0; half < 2; ++half) {
      const Floats x = load_grad<Avx2, kBf16>(values, i + 16 * half);
      add_squares4(lanes.sum[4 * half], _mm256_castps256_ps128(x.a));
      add_squares4(lanes.sum[4 * half + 1], _mm256_extractf128_ps(x.a, 1));
      add_squares4(lanes.sum[4 * half + 2], _mm256_castps256_ps128(x.b));
      add_squares4(lanes.sum[4 * half + 3], _mm256_extractf128_ps(x.b, 1));
    }
  }
  static void store_lanes(double* target, const Lanes& lanes) {
    for (int i = 0; i < kSumLanes / 4; ++i) _mm256_storeu_pd(target + 4 * i, lanes.sum[i]);
  }

 private:
  static __m256 as_floats(__m256i bits) { return _mm256_castsi256_ps(bits); }
  static __m128i load8(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static __m256i upper(const uint16_t* p) { return _mm256_slli_epi32(_mm256_cvtepu16_epi32(load8(p)), 16); }
  static __m256i lower(const int16_t* p) { return _mm256_cvtepi16_epi32(load8(p)); }
  struct Halves {
    __m256i hi, lo;
  };
  static Halves halve(Floats x) {
    const __m256i a = _mm256_castps_si256(x.a), b = _mm256_castps_si256(x.b);
    const __m256i half = _mm256_set1_epi32(0x8000), mask = _mm256_set1_epi32(0xffff);
    const __m256i rounded_a = _mm256_add_epi32(a, half), rounded_b = _mm256_add_epi32(b, half);
    return {pack(_mm256_srli_epi32(rounded_a, 16), _mm256_srli_epi32(rounded_b, 16)),
            pack(_mm256_and_si256(a, mask), _mm256_and_si256(b, mask))};
  }
  static __m256i upper_halves(Ints x) { return pack(_mm256_srli_epi32(x.a, 16), _mm256_srli_epi32(x.b, 16)); }
  static __m256i pack(__m256i a, __m256i b) {
    // packus interleaves the two registers by 128-bit halves; the permutation puts the quarters back in order.
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), _MM_SHUFFLE(3, 1, 2, 0));
  }
  static void add_squares4(__m256d& sum, __m128 x) {
    const __m256d wide = _mm256_cvtps_pd(x);
    sum = _mm256_fmadd_pd(wide, wide, sum);  // exact product: the same as a multiplication and an addition
  }
};

}  // namespace

const KernelTable* avx2_kernels() noexcept {
  static constexpr KernelTable table = make_table<Avx2>("avx2");
  return &table;
}

}  // namespace op_ds

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

namespace op_ds {
const KernelTable* avx2_kernels() noexcept { return nullptr; }
}  // namespace op_ds

#endif
