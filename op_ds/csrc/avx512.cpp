// AVX-512 (foundation only): sixteen elements in one register; hi and lo narrow with a single truncating store.
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f"))), apply_to = function)
#else
#pragma GCC target("avx512f")
#endif

#include "kernels_inl.h"

namespace op_ds {
namespace {

struct Avx512 {
  using Floats = __m512;
  using Ints = __m512i;
  struct Lanes {
    __m512d sum[kSumLanes / 8];
  };
  static constexpr int64_t kWidth = 16;

  static __m512 set1(float x) { return _mm512_set1_ps(x); }
  static __m512 load(const float* p) { return _mm512_loadu_ps(p); }
  static __m512 load_bf16(const uint16_t* p) { return _mm512_castsi512_ps(upper(p)); }
  static __m512 load_master(const uint16_t* hi, const int16_t* lo) {
    return _mm512_castsi512_ps(_mm512_add_epi32(upper(hi), _mm512_cvtepi16_epi32(load16(lo))));
  }
  static void store(float* p, __m512 x) { _mm512_storeu_ps(p, x); }
  static void store_master(uint16_t* hi, int16_t* lo, __m512 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(hi), rounded_bits(x));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lo), _mm512_cvtepi32_epi16(_mm512_castps_si512(x)));
  }
  static void stream(float* p, __m512 x) { _mm512_stream_ps(p, x); }
  static void stream_master(uint16_t* hi, int16_t* lo, __m512 x) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(hi), rounded_bits(x));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(lo), _mm512_cvtepi32_epi16(_mm512_castps_si512(x)));
  }
  static void fence() { _mm_sfence(); }
  static __m512 add(__m512 x, __m512 y) { return _mm512_add_ps(x, y); }
  static __m512 sub(__m512 x, __m512 y) { return _mm512_sub_ps(x, y); }
  static __m512 mul(__m512 x, __m512 y) { return _mm512_mul_ps(x, y); }
  static __m512 div(__m512 x, __m512 y) { return _mm512_div_ps(x, y); }
  static __m512 sqrt(__m512 x) { return _mm512_sqrt_ps(x); }
  static __m512 fma(__m512 x, __m512 y, __m512 z) { return _mm512_fmadd_ps(x, y, z); }

  static __m512i count_from(uint32_t first) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)), lanes);
  }
  static __m512i set1_int(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static __m512i bits(__m512 x) { return _mm512_castps_si512(x); }
  static __m512i xor_int(__m512i x, __m512i y) { return _mm512_xor_si512(x, y); }
  static __m512i add_int(__m512i x, __m512i y) { return _mm512_add_epi32(x, y); }
  static __m512i mul_int(__m512i x, __m512i y) { return _mm512_mullo_epi32(x, y); }
  static __m512i and_int(__m512i x, __m512i y) { return _mm512_and_si512(x, y); }
  template <int kBits>
  static __m512i shift_right(__m512i x) { return _mm512_srli_epi32(x, kBits); }
  static __m512i keep_below(__m512i x, __m512i value, __m512i limit) {
    return _mm512_maskz_mov_epi32(_mm512_cmplt_epi32_mask(value, limit), x);
  }
  static void store_upper(uint16_t* p, __m512i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), upper_halves(x)); }
  static void stream_upper(uint16_t* p, __m512i x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), upper_halves(x)); }
  static __m512i max_int(__m512i x, __m512i y) { return _mm512_max_epi32(x, y); }
  static __m512i to_ints(__m512 x) { return _mm512_cvttps_epi32(x); }
  static __m512 to_floats(__m512i x) { return _mm512_cvtepi32_ps(x); }
  static __m512 abs(__m512 x) { return _mm512_abs_ps(x); }
  static __m512 min(__m512 x, __m512 y) { return _mm512_min_ps(x, y); }
  static __m512 max(__m512 x, __m512 y) { return _mm512_max_ps(x, y); }
  static float largest(__m512 x) { return _mm512_reduce_max_ps(x); }
  static __m512 load_codes(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes(p))); }
  static __m512 load_signed_codes(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes(p))); }
  static void store_codes(uint8_t* p, __m512i x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
  }

  static Lanes zero_lanes() {
    Lanes lanes;
    for (__m512d& sum : lanes.sum) sum = _mm512_setzero_pd();
    return lanes;
  }
  template <bool kBf16>
  static void add_squares(Lanes& lanes, const void* values, int64_t i) {
    for (int half = 0; half < 2; ++half) {
      const __m512 x = load_grad<Avx512, kBf16>(values, i + 16 * half);
      add_squares8(lanes.sum[2 * half], _mm512_castps512_ps256(x));
      add_squares8(lanes.sum[2 * half + 1], upper_half(x));
    }
  }
  static void store_lanes(double* target, const Lanes& lanes) {
    for (int i = 0; i < kSumLanes / 8; ++i) _mm512_storeu_pd(target + 8 * i, lanes.sum[i]);
  }

 private:
  static __m128i codes(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static __m256i load16(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static __m512i upper(const uint16_t* p) { return _mm512_slli_epi32(_mm512_cvtepu16_epi32(load16(p)), 16); }
  // Of each element's bits, rounded half up.
  static __m256i rounded_bits(__m512 x) {
    return upper_halves(_mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000)));
  }
  static __m256i upper_halves(__m512i x) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(x, 16)); }
  static __m256 upper_half(__m512 x) {
    return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1));
  }
  static void add_squares8(__m512d& sum, __m256 x) {
    const __m512d wide = _mm512_cvtps_pd(x);
    sum = _mm512_fmadd_pd(wide, wide, sum);  // exact product: the same as a multiplication and an addition
  }
};

}  // namespace

const KernelTable* avx512_kernels() noexcept {
  static constexpr KernelTable table = make_table<Avx512>("avx512");
  return &table;
}

}  // namespace op_ds

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

namespace op_ds {
const KernelTable* avx512_kernels() noexcept { return nullptr; }
}  // namespace op_ds

#endif
