// The kernels, written once over a vector type V. Included by one source per instruction set, after its target pragma;
// everything sits in an unnamed namespace so that no instantiation for one instruction set can be linked into another.
//
// V supplies: Floats, kWidth, set1, load, load_bf16, load_master, store, store_master, stream, stream_master (stores past
// the caches, to whole vectors), fence (after these), add, sub, mul, div, sqrt, fma;
// Lanes, zero_lanes, add_squares, store_lanes. Each arithmetic function rounds once, to nearest, and the compiler
// contracts nothing (-ffp-contract=off).

namespace op_ds {
namespace {

template <class V>
struct AdamConstants {
  typename V::Floats grad_scale, coefficient, beta2, one_minus_beta2, bias_correction2_sqrt, eps, neg_step_size, decay;
};

template <class V>
AdamConstants<V> broadcast(const AdamScalars& s, float decay) {
  // torch.lerp changes its formula at one half; the coefficient follows it (see adam_vector).
  const float coefficient = s.lerp_weight < 0.5f ? s.lerp_weight : s.lerp_weight - 1.0f;
  return {V::set1(s.grad_scale), V::set1(coefficient),   V::set1(s.beta2), V::set1(s.one_minus_beta2),
          V::set1(s.bias_correction2_sqrt), V::set1(s.eps), V::set1(s.neg_step_size), V::set1(decay)};
}

template <class V, bool kBf16>
inline typename V::Floats load_grad(const void* grad, int64_t i) {
  if constexpr (kBf16) {
    return V::load_bf16(static_cast<const uint16_t*>(grad) + i);
  } else {
    return V::load(static_cast<const float*>(grad) + i);
  }
}

// Runs past the end of the planes, where a prefetch does nothing; hence integers and not pointers.
template <bool kBf16>
inline void prefetch_planes(const AdamPlanes& p, int64_t i) {
  const auto ask = [i](const void* plane, int64_t element_bytes) {
    const auto distance = static_cast<uintptr_t>((i + kPrefetchElements) * element_bytes);
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(plane) + distance));
  };
  ask(p.from.hi, 2);
  ask(p.from.lo, 2);
  ask(p.from.m, 4);
  ask(p.from.v, 4);
  ask(p.grad, kBf16 ? 2 : 4);
}

// One vector of elements: the operations of torch's single-tensor Adam in its order, each rounded where torch rounds.
template <class V, bool kBf16, bool kCoupled, bool kHighWeight, bool kStream>
inline void adam_vector(const AdamPlanes& p, const AdamConstants<V>& k, int64_t i) {
  auto master = V::load_master(p.from.hi + i, p.from.lo + i);
  auto grad = V::mul(load_grad<V, kBf16>(p.grad, i), k.grad_scale);
  if constexpr (kCoupled) {
    grad = V::fma(k.decay, master, grad);
  } else {
    master = V::mul(master, k.decay);
  }
  const auto old_m = V::load(p.from.m + i);
  const auto m = V::fma(k.coefficient, V::sub(grad, old_m), kHighWeight ? grad : old_m);
  const auto decayed_v = V::mul(V::load(p.from.v + i), k.beta2);
  const auto v = V::fma(V::mul(k.one_minus_beta2, grad), grad, decayed_v);
  const auto denominator = V::add(V::div(V::sqrt(v), k.bias_correction2_sqrt), k.eps);
  master = V::add(master, V::div(V::mul(k.neg_step_size, m), denominator));
  if constexpr (kStream) {
    V::stream(p.to.m + i, m);
    V::stream(p.to.v + i, v);
    V::stream_master(p.to.hi + i, p.to.lo + i, master);
  } else {
    V::store(p.to.m + i, m);
    V::store(p.to.v + i, v);
    V::store_master(p.to.hi + i, p.to.lo + i, master);
  }
}

// At most a vector of elements: the same vector code on a padded copy, so that tails round exactly like the rest.
template <class V, bool kBf16, bool kCoupled, bool kHighWeight>
void adam_tail(const AdamPlanes& p, const AdamConstants<V>& k, int64_t begin, int64_t count) {
  uint16_t hi[V::kWidth] = {};
  int16_t lo[V::kWidth] = {};
  float m[V::kWidth] = {}, v[V::kWidth] = {}, grad[V::kWidth] = {};
  const size_t grad_bytes = kBf16 ? sizeof(uint16_t) : sizeof(float);
  std::memcpy(hi, p.from.hi + begin, count * sizeof(uint16_t));
  std::memcpy(lo, p.from.lo + begin, count * sizeof(int16_t));
  std::memcpy(m, p.from.m + begin, count * sizeof(float));
  std::memcpy(v, p.from.v + begin, count * sizeof(float));
  std::memcpy(grad, static_cast<const char*>(p.grad) + begin * grad_bytes, count * grad_bytes);
  const MasterPlanes copy{hi, lo, m, v};
  adam_vector<V, kBf16, kCoupled, kHighWeight, false>({copy, copy, grad, p.grad_type, 0}, k, 0);
  std::memcpy(p.to.hi + begin, hi, count * sizeof(uint16_t));
  std::memcpy(p.to.lo + begin, lo, count * sizeof(int16_t));
  std::memcpy(p.to.m + begin, m, count * sizeof(float));
  std::memcpy(p.to.v + begin, v, count * sizeof(float));
}

template <class V, bool kBf16, bool kCoupled, bool kHighWeight, bool kStream>
void adam_stored(const AdamPlanes& p, const AdamScalars& s, int64_t begin, int64_t end, float decay) {
  const AdamConstants<V> k = broadcast<V>(s, decay);
  int64_t i = begin;
  if constexpr (kStream) {
    const int64_t line = (begin + kLineElements - 1) / kLineElements * kLineElements;
    while (i < line && i < end) {
      const int64_t past = i + V::kWidth < line ? i + V::kWidth : line;
      const int64_t stop = past < end ? past : end;
      adam_tail<V, kBf16, kCoupled, kHighWeight>(p, k, i, stop - i);
      i = stop;
    }
  }
  for (; i + V::kWidth <= end; i += V::kWidth) {
    if constexpr (V::kWidth > 1) prefetch_planes<kBf16>(p, i);
    adam_vector<V, kBf16, kCoupled, kHighWeight, kStream>(p, k, i);
  }
  if constexpr (kStream) V::fence();  // weakly ordered: they must be visible before the range counts as done
  if (i < end) {
    adam_tail<V, kBf16, kCoupled, kHighWeight>(p, k, i, end - i);
  }
}

template <class V, bool kBf16, bool kCoupled, bool kHighWeight>
void adam_range(const AdamPlanes& p, const AdamScalars& s, int64_t begin, int64_t end, float decay) {
  const AdamFn plain = adam_stored<V, kBf16, kCoupled, kHighWeight, false>;
  const AdamFn streaming = adam_stored<V, kBf16, kCoupled, kHighWeight, true>;
  (p.streams ? streaming : plain)(p, s, begin, end, decay);
}

template <class V, bool kBf16, bool kCoupled>
void adam_weight(const AdamPlanes& p, const AdamScalars& s, int64_t begin, int64_t end, float decay) {
  const AdamFn low = adam_range<V, kBf16, kCoupled, false>, high = adam_range<V, kBf16, kCoupled, true>;
  (s.lerp_weight < 0.5f ? low : high)(p, s, begin, end, decay);
}

template <class V>
void adam(const AdamPlanes& p, const AdamScalars& s, int64_t begin, int64_t end, float decay) {
  // torch leaves out the L2 term where the decay is zero; 0 * master would be NaN for an infinite master.
  const bool coupled = s.coupled && decay != 0.0f;
  const float factor = s.coupled && !coupled ? 1.0f : decay;
  if (p.grad_type == GradType::kBf16) {
    (coupled ? adam_weight<V, true, true> : adam_weight<V, true, false>)(p, s, begin, end, factor);
  } else {
    (coupled ? adam_weight<V, false, true> : adam_weight<V, false, false>)(p, s, begin, end, factor);
  }
}

template <class V>
void split(const float* source, uint16_t* hi, int16_t* lo, int64_t n) {
  int64_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth) {
    V::store_master(hi + i, lo + i, V::load(source + i));
  }
  for (; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, source + i, sizeof bits);
    hi[i] = static_cast<uint16_t>((bits + 0x8000u) >> 16);
    lo[i] = static_cast<int16_t>(bits);
  }
}

template <class V>
void merge(const uint16_t* hi, const int16_t* lo, float* target, int64_t n) {
  int64_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth) {
    V::store(target + i, V::load_master(hi + i, lo + i));
  }
  for (; i < n; ++i) {
    const uint32_t bits = (static_cast<uint32_t>(hi[i]) << 16) + static_cast<uint32_t>(static_cast<int32_t>(lo[i]));
    std::memcpy(target + i, &bits, sizeof bits);
  }
}

template <class V, bool kBf16>
void sum_lanes_typed(const void* values, double* lanes) {
  typename V::Lanes sums = V::zero_lanes();
  for (int64_t i = 0; i < kSumElements; i += kSumLanes) {
    V::template add_squares<kBf16>(sums, values, i);
  }
  V::store_lanes(lanes, sums);
}

template <class V>
void sum_lanes(const void* values, GradType type, double* lanes) {
  (type == GradType::kBf16 ? sum_lanes_typed<V, true> : sum_lanes_typed<V, false>)(values, lanes);
}

template <class V>
constexpr KernelTable make_table(const char* name) {
  return {name, adam<V>, split<V>, merge<V>, sum_lanes<V>};
}

}  // namespace
}  // namespace op_ds
