// Work on plain memory: block bodies for the pool.
#pragma once

#include <cstddef>
#include <cstdint>

namespace op_ds {

constexpr int64_t kMemoryBlockBytes = int64_t{1} << 18;

// Copies past the cache: the target is read next by a device or much later, and a line that is not read first saves a
// third of the traffic. Falls back to memcpy where there are no streaming stores.
void stream_copy(void* target, const void* source, size_t num_bytes) noexcept;

// A write to each page, which is what makes the kernel map it, that leaves what is there: others may use the memory meanwhile.
void touch_pages(void* address, size_t num_bytes) noexcept;

// a = b + scale * c with streaming stores (12 bytes an element): the usual measure of memory bandwidth.
void triad(float* a, const float* b, const float* c, float scale, int64_t n) noexcept;

// a = scale * a (8 bytes an element): every line is read before it is written, as in an optimizer.
void rescale(float* a, float scale, int64_t n) noexcept;

}  // namespace op_ds
