// What each instruction set provides, and the element rules all of them share.
#pragma once

#include <cstdint>

namespace op_ds {

// Unit of dynamic claiming: 16 Ki elements are 416 KiB of Adam traffic, some 50 us of one core. Small enough that
// sixteen threads finish together on a chunk of a few million elements, large enough that the claim costs nothing.
constexpr int64_t kBlockElements = int64_t{1} << 14;

// How far ahead of the arithmetic the planes are asked for: five streams are more than a hardware prefetcher follows
// well. Measured 5-15% over none on AVX-512 and 20% on AVX2 (Zen 4, one and two threads); 256 and more gave less.
constexpr int64_t kPrefetchElements = 128;

// sum_squares is defined by these two numbers (see docs/optimizer.md), not by the vector width that computes it.
constexpr int kSumLanes = 32;
constexpr int64_t kSumElements = 1024;

// Elements of hi, lo and bf16 moments that fill a cache line, and of fp32 moments that fill two. From a multiple of it on,
// streaming stores write whole lines.
constexpr int64_t kLineElements = 32;

enum class GradType : int32_t { kBf16 = 0, kFp32 = 1 };

// How m and v are stored. All but fp32 ones are rounded stochastically, with the draws that AdamScalars and AdamPlanes
// speak of.
enum class MomentType : int32_t { kFp32 = 0, kBf16 = 1, kBlocks = 2 };

// A block of 8-bit moments: a code for each element, and then what one step of the codes is, as fp32. An update takes whole
// blocks, and no range of decay ends within one.
constexpr int64_t kMomentBlock = 128;
constexpr int64_t kMomentBlockBytes = kMomentBlock + 4;

// What the largest numbers of a block are taken to be at most. The square of a root is then finite, rounded up, too.
constexpr float kLargestMoment = 3.4e38f, kLargestRoot = 1.8e19f;

// Scalars of one Adam step, rounded to fp32 on the caller's side from doubles, as torch does. C ABI: ctypes mirrors it.
struct AdamScalars {
  float grad_scale;
  float lerp_weight;  // 1 - beta1
  float beta2;
  float one_minus_beta2;
  float bias_correction2_sqrt;
  float eps;
  float neg_step_size;  // -lr / bias_correction1
  int32_t coupled;      // 1: L2 decay added to the gradient (Adam); 0: decoupled (AdamW)
  uint32_t keys[2];     // of the draws by which moments are rounded
};

struct MasterPlanes {
  uint16_t* hi;
  int16_t* lo;
  void* m;
  void* v;
};

// What is read, and where what becomes of it is written: the same address plane by plane, or one that overlaps none.
struct AdamPlanes {
  MasterPlanes from;
  MasterPlanes to;
  const void* grad;
  GradType grad_type;
  MomentType moment_type;
  int32_t streams;  // set by op_ds_adam: past the caches, into planes that nothing reads soon
  uint32_t first;   // the number of element 0 among those of its vector: an element has one draw, however it is cut
};

// `decay` is what multiplies the master (AdamW: 1 - lr * weight_decay) or weighs it into the gradient (Adam).
using AdamFn = void (*)(const AdamPlanes&, const AdamScalars&, int64_t begin, int64_t end, float decay);
using SplitFn = void (*)(const float* source, uint16_t* hi, int16_t* lo, int64_t n);
using MergeFn = void (*)(const uint16_t* hi, const int16_t* lo, float* target, int64_t n);
// Sums squares of kSumElements values into kSumLanes lanes: lane l takes elements l, l + 32, l + 64, ... in order.
using SumLanesFn = void (*)(const void* values, GradType type, double* lanes);

struct KernelTable {
  const char* name;
  AdamFn adam;
  SplitFn split;
  MergeFn merge;
  SumLanesFn sum_lanes;
};

const KernelTable* scalar_kernels() noexcept;
const KernelTable* avx2_kernels() noexcept;    // nullptr where the compiler does not target x86
const KernelTable* avx512_kernels() noexcept;  // the same

enum class Isa : int32_t { kAuto = 0, kScalar = 1, kAvx2 = 2, kAvx512 = 3 };

// The table for `isa`, or nullptr when this processor or this build cannot run it.
const KernelTable* find_kernels(Isa isa) noexcept;

}  // namespace op_ds
