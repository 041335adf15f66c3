#include "api.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <system_error>
#include <vector>

#include "crc32.h"
#include "memory.h"
#include "norm.h"
#include "pool.h"

namespace op_ds {

struct Pool {
  ThreadPool threads;
  const KernelTable* kernels;
  Crc32Fn crc32;
};

namespace {

constexpr int32_t kAbiVersion = 5;
constexpr int64_t kGroupsPerBlock = 64;  // 64 Ki elements of a sum: reading only, so a block may be larger

// 256 KiB are some 10 us of a sum: large enough that the claim costs nothing.
constexpr int64_t kCrcBlockBytes = int64_t{1} << 18;

int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// Nothing may leave through the C ABI.
template <class Body>
int32_t guarded(Body&& body) noexcept {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return -ENOMEM;
  } catch (const std::system_error& error) {
    return error.code().value() > 0 ? -error.code().value() : -EIO;
  } catch (...) {
    return -EIO;
  }
}

// Splits [0, n) into blocks of `size` and calls body(begin, end) for each on the pool.
template <class Body>
int32_t for_blocks(Pool* pool, int64_t n, int64_t size, Body body) noexcept {
  if (pool == nullptr || n < 0) return -EINVAL;
  return guarded([&] {
    pool->threads.run(ceil_div(n, size), [&](int64_t block) { body(block * size, std::min(n, (block + 1) * size)); });
    return 0;
  });
}

// Streaming stores spare the reads of what they overwrite, 8 to 12 bytes a parameter. They need places that the update does not
// read and that begin at a cache line.
bool can_stream(const MasterPlanes& from, const MasterPlanes& to) {
  const auto fits = [](const void* source, const void* target) {
    return source != target && reinterpret_cast<uintptr_t>(target) % 64 == 0;
  };
  return fits(from.hi, to.hi) && fits(from.lo, to.lo) && fits(from.m, to.m) && fits(from.v, to.v);
}

struct DecayRanges {
  const int64_t* ends;
  const float* decays;
  int64_t count;

  bool covers(int64_t n, int64_t multiple) const {
    if (count < 1 || ends[count - 1] != n) return false;
    for (int64_t i = 0; i < count; ++i) {
      if (ends[i] < (i ? ends[i - 1] : 0) || ends[i] % multiple) return false;
    }
    return true;
  }

  // Calls body(begin, end, decay) for the parts of [begin, end), each within one range.
  template <class Body>
  void visit(int64_t begin, int64_t end, Body body) const {
    int64_t range = std::upper_bound(ends, ends + count, begin) - ends;
    for (; begin < end; ++range) {
      const int64_t stop = std::min(end, ends[range]);
      if (begin < stop) body(begin, stop, decays[range]);
      begin = stop;
    }
  }
};

}  // namespace
}  // namespace op_ds

using op_ds::Pool;

int32_t op_ds_abi_version() noexcept { return op_ds::kAbiVersion; }

const char* op_ds_pool_isa(const Pool* pool) noexcept { return pool->kernels->name; }

int32_t op_ds_pool_create(int32_t num_threads, int32_t isa, Pool** pool) noexcept {
  if (num_threads < 1 || pool == nullptr) return -EINVAL;
  const op_ds::KernelTable* kernels = op_ds::find_kernels(static_cast<op_ds::Isa>(isa));
  if (kernels == nullptr) return -ENOTSUP;
  return op_ds::guarded([&] {
    *pool = new Pool{op_ds::ThreadPool(num_threads), kernels, op_ds::find_crc32(static_cast<op_ds::Isa>(isa))};
    return 0;
  });
}

int32_t op_ds_pool_destroy(Pool* pool) noexcept {
  return op_ds::guarded([&] {
    delete pool;
    return 0;
  });
}

int32_t op_ds_adam(Pool* pool, const op_ds::AdamPlanes* planes, const op_ds::AdamScalars* scalars, int64_t n,
                   const int64_t* ends, const float* decays, int64_t num_ranges) noexcept {
  const op_ds::DecayRanges ranges{ends, decays, num_ranges};
  const bool in_blocks = planes->moment_type == op_ds::MomentType::kBlocks;
  if (!ranges.covers(n, in_blocks ? op_ds::kMomentBlock : 1)) return -EINVAL;
  op_ds::AdamPlanes all = *planes;
  all.streams = !in_blocks && op_ds::can_stream(all.from, all.to);
  return op_ds::for_blocks(pool, n, op_ds::kBlockElements, [&](int64_t begin, int64_t end) {
    ranges.visit(begin, end, [&](int64_t first, int64_t stop, float decay) {
      pool->kernels->adam(all, *scalars, first, stop, decay);
    });
  });
}

int32_t op_ds_split(Pool* pool, const float* source, uint16_t* hi, int16_t* lo, int64_t n) noexcept {
  return op_ds::for_blocks(pool, n, op_ds::kBlockElements, [=](int64_t begin, int64_t end) {
    pool->kernels->split(source + begin, hi + begin, lo + begin, end - begin);
  });
}

int32_t op_ds_merge(Pool* pool, const uint16_t* hi, const int16_t* lo, float* target, int64_t n) noexcept {
  return op_ds::for_blocks(pool, n, op_ds::kBlockElements, [=](int64_t begin, int64_t end) {
    pool->kernels->merge(hi + begin, lo + begin, target + begin, end - begin);
  });
}

int32_t op_ds_sum_squares(Pool* pool, const void* values, int32_t type, int64_t n, double* sum,
                          int64_t* num_nonfinite) noexcept {
  if (pool == nullptr || n < 0) return -EINVAL;
  const auto grad_type = static_cast<op_ds::GradType>(type);
  const int64_t element_bytes = grad_type == op_ds::GradType::kBf16 ? 2 : 4;
  return op_ds::guarded([&] {
    std::vector<double> sums(static_cast<size_t>(op_ds::ceil_div(n, op_ds::kSumElements)));
    std::atomic<int64_t> nonfinite{0};
    const int64_t num_groups = static_cast<int64_t>(sums.size());
    pool->threads.run(op_ds::ceil_div(num_groups, op_ds::kGroupsPerBlock), [&](int64_t block) {
      const int64_t first = block * op_ds::kGroupsPerBlock;
      for (int64_t group = first; group < std::min(num_groups, first + op_ds::kGroupsPerBlock); ++group) {
        const int64_t begin = group * op_ds::kSumElements;
        const int64_t count = std::min(op_ds::kSumElements, n - begin);
        const void* start = static_cast<const char*>(values) + begin * element_bytes;
        sums[group] = op_ds::group_sum(*pool->kernels, start, grad_type, count);
        // Squares of finite floats cannot overflow a double, so only a group that holds a non-finite value gets here.
        if (!std::isfinite(sums[group])) nonfinite += op_ds::count_nonfinite(start, grad_type, count);
      }
    });
    *sum = op_ds::add_pairwise(sums.data(), num_groups);
    *num_nonfinite = nonfinite;
    return 0;
  });
}

int32_t op_ds_crc32(Pool* pool, const void* address, int64_t num_bytes, int64_t piece_bytes, uint32_t* sums) noexcept {
  if (num_bytes < 0 || piece_bytes < 1) return -EINVAL;
  const auto* bytes = static_cast<const uint8_t*>(address);
  const int64_t pieces_per_block = std::max<int64_t>(1, op_ds::kCrcBlockBytes / piece_bytes);
  const int64_t num_pieces = op_ds::ceil_div(num_bytes, piece_bytes);
  return op_ds::for_blocks(pool, num_pieces, pieces_per_block, [=](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t offset = piece * piece_bytes, count = std::min(piece_bytes, num_bytes - offset);
      sums[piece] = ~pool->crc32(~uint32_t{0}, bytes + offset, count);
    }
  });
}

int32_t op_ds_touch(Pool* pool, void* address, int64_t num_bytes) noexcept {
  return op_ds::for_blocks(pool, num_bytes, op_ds::kMemoryBlockBytes * 16, [=](int64_t begin, int64_t end) {
    op_ds::touch_pages(static_cast<char*>(address) + begin, static_cast<size_t>(end - begin));
  });
}

int32_t op_ds_fill(Pool* pool, void* address, int32_t byte, int64_t num_bytes) noexcept {
  return op_ds::for_blocks(pool, num_bytes, op_ds::kMemoryBlockBytes, [=](int64_t begin, int64_t end) {
    std::memset(static_cast<char*>(address) + begin, byte, static_cast<size_t>(end - begin));
  });
}

int32_t op_ds_copy(Pool* pool, void* target, const void* source, int64_t num_bytes) noexcept {
  return op_ds::for_blocks(pool, num_bytes, op_ds::kMemoryBlockBytes, [=](int64_t begin, int64_t end) {
    op_ds::stream_copy(static_cast<char*>(target) + begin, static_cast<const char*>(source) + begin,
                       static_cast<size_t>(end - begin));
  });
}

int32_t op_ds_triad(Pool* pool, float* a, const float* b, const float* c, float scale, int64_t n) noexcept {
  return op_ds::for_blocks(pool, n, op_ds::kBlockElements * 4, [=](int64_t begin, int64_t end) {
    op_ds::triad(a + begin, b + begin, c + begin, scale, end - begin);
  });
}

int32_t op_ds_rescale(Pool* pool, float* a, float scale, int64_t n) noexcept {
  return op_ds::for_blocks(pool, n, op_ds::kBlockElements * 4, [=](int64_t begin, int64_t end) {
    op_ds::rescale(a + begin, scale, end - begin);
  });
}
