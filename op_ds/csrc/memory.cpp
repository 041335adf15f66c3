#include "memory.h"

#include <algorithm>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace op_ds {
namespace {

constexpr size_t kPageBytes = 4096;
constexpr size_t kLineBytes = 64;

size_t bytes_to_line(const void* p) {
  return (kLineBytes - reinterpret_cast<uintptr_t>(p) % kLineBytes) % kLineBytes;
}

// A zero for a zero: a fresh page is written, and a byte that somebody has put there in the meantime stays.
void touch(char* byte) {
  char expected = 0;
  __atomic_compare_exchange_n(byte, &expected, char{0}, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

}  // namespace

void stream_copy(void* target, const void* source, size_t num_bytes) noexcept {
  auto* to = static_cast<char*>(target);
  auto* from = static_cast<const char*>(source);
  const size_t head = std::min(num_bytes, bytes_to_line(to));
  std::memcpy(to, from, head);
  size_t done = head;
#if defined(__SSE2__)
  for (; done + kLineBytes <= num_bytes; done += kLineBytes) {
    const auto* in = reinterpret_cast<const __m128i*>(from + done);
    auto* out = reinterpret_cast<__m128i*>(to + done);
    const __m128i a = _mm_loadu_si128(in), b = _mm_loadu_si128(in + 1);
    const __m128i c = _mm_loadu_si128(in + 2), d = _mm_loadu_si128(in + 3);
    _mm_stream_si128(out, a);
    _mm_stream_si128(out + 1, b);
    _mm_stream_si128(out + 2, c);
    _mm_stream_si128(out + 3, d);
  }
  _mm_sfence();  // streaming stores are weakly ordered: they must be visible before the block counts as done
#endif
  std::memcpy(to + done, from + done, num_bytes - done);
}

void touch_pages(void* address, size_t num_bytes) noexcept {
  auto* bytes = static_cast<char*>(address);
  for (size_t i = 0; i < num_bytes; i += kPageBytes) touch(bytes + i);
  if (num_bytes > 0) touch(bytes + num_bytes - 1);  // an unaligned range ends in a page of its own
}

void triad(float* a, const float* b, const float* c, float scale, int64_t n) noexcept {
  int64_t i = 0;
#if defined(__SSE2__)
  const auto misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(a) % 16 / sizeof(float));
  for (const int64_t head = std::min(n, (4 - misaligned) % 4); i < head; ++i) a[i] = b[i] + scale * c[i];
  const __m128 factor = _mm_set1_ps(scale);
  for (; i + 4 <= n; i += 4) {
    _mm_stream_ps(a + i, _mm_add_ps(_mm_loadu_ps(b + i), _mm_mul_ps(factor, _mm_loadu_ps(c + i))));
  }
  _mm_sfence();
#endif
  for (; i < n; ++i) a[i] = b[i] + scale * c[i];
}

void rescale(float* a, float scale, int64_t n) noexcept {
  for (int64_t i = 0; i < n; ++i) a[i] *= scale;
}

}  // namespace op_ds
