// The C ABI that op_ds/library.py loads. Every function but the first two returns 0 (or a count) or -errno.
#pragma once

#include <cstdint>

#include "kernels.h"

#define OP_DS_API extern "C" __attribute__((visibility("default")))

namespace op_ds {
struct Pool;
}

OP_DS_API int32_t op_ds_abi_version() noexcept;
OP_DS_API const char* op_ds_pool_isa(const op_ds::Pool* pool) noexcept;

// isa: op_ds::Isa. -ENOTSUP when this processor cannot run it, -EAGAIN when a thread cannot be started.
OP_DS_API int32_t op_ds_pool_create(int32_t num_threads, int32_t isa, op_ds::Pool** pool) noexcept;
OP_DS_API int32_t op_ds_pool_destroy(op_ds::Pool* pool) noexcept;

// planes: `streams` is not read. ends: increasing, the last one n; decays[i] applies below ends[i] and from ends[i - 1].
OP_DS_API int32_t op_ds_adam(op_ds::Pool* pool, const op_ds::AdamPlanes* planes, const op_ds::AdamScalars* scalars,
                             int64_t n, const int64_t* ends, const float* decays, int64_t num_ranges) noexcept;
OP_DS_API int32_t op_ds_split(op_ds::Pool* pool, const float* source, uint16_t* hi, int16_t* lo, int64_t n) noexcept;
OP_DS_API int32_t op_ds_merge(op_ds::Pool* pool, const uint16_t* hi, const int16_t* lo, float* target,
                              int64_t n) noexcept;
OP_DS_API int32_t op_ds_sum_squares(op_ds::Pool* pool, const void* values, int32_t type, int64_t n, double* sum,
                                    int64_t* num_nonfinite) noexcept;
// sums[i] is the CRC-32 of piece i: `piece_bytes` of memory, the last piece what is left.
OP_DS_API int32_t op_ds_crc32(op_ds::Pool* pool, const void* address, int64_t num_bytes, int64_t piece_bytes,
                              uint32_t* sums) noexcept;
OP_DS_API int32_t op_ds_touch(op_ds::Pool* pool, void* address, int64_t num_bytes) noexcept;
OP_DS_API int32_t op_ds_fill(op_ds::Pool* pool, void* address, int32_t byte, int64_t num_bytes) noexcept;
OP_DS_API int32_t op_ds_copy(op_ds::Pool* pool, void* target, const void* source, int64_t num_bytes) noexcept;
OP_DS_API int32_t op_ds_triad(op_ds::Pool* pool, float* a, const float* b, const float* c, float scale,
                              int64_t n) noexcept;
OP_DS_API int32_t op_ds_rescale(op_ds::Pool* pool, float* a, float scale, int64_t n) noexcept;
