// The kernels, written once over a vector type V. Included by one source per instruction set, after its target pragma;
// everything sits in an unnamed namespace so that no instantiation for one instruction set can be linked into another.
//
// V supplies: Floats, kWidth, set1, load, load_bf16, load_master, store, store_master, stream, stream_master (stores past
// the caches, to whole vectors), fence (after these), add, sub, mul, div, sqrt, fma;
// Ints (as many of 32 bits as there are Floats), count_from, set1_int, bits, xor_int, add_int, mul_int, and_int,
// shift_right, keep_below (x where another is less, signed, else 0), store_upper, stream_upper (of each its upper 16 bits),
// max_int; to_ints (towards zero), to_floats, abs, min, max (of both the second where one is NaN), largest (one float);
// load_codes, load_signed_codes, store_codes (8 bits each);
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

// 32 random bits for each element from `number` on: MurmurHash3's last steps (Appleby, 2011), with a key before and one
// between its multiplications. Elements 2^32 apart share a draw.
template <class V>
inline typename V::Ints draw(const uint32_t* keys, uint32_t number) {
  auto x = V::xor_int(V::count_from(number), V::set1_int(keys[0]));
  x = V::mul_int(V::xor_int(x, V::template shift_right<16>(x)), V::set1_int(0x85ebca6bu));
  x = V::add_int(x, V::set1_int(keys[1]));
  x = V::mul_int(V::xor_int(x, V::template shift_right<13>(x)), V::set1_int(0xc2b2ae35u));
  return V::xor_int(x, V::template shift_right<16>(x));
}

// What the moments of a vector of elements are in memory. Draws: what they are rounded by.
template <class V>
struct Fp32Moments {
  using Stored = float;
  struct Draws {};
  static Draws draws(const AdamScalars&, uint32_t) { return {}; }
  static typename V::Floats load(const void* p, int64_t i) { return V::load(static_cast<const float*>(p) + i); }
  template <bool kStream, bool kSecond>
  static void store(void* p, int64_t i, typename V::Floats x, Draws) {
    float* to = static_cast<float*>(p) + i;
    kStream ? V::stream(to, x) : V::store(to, x);
  }
  template <bool kStream>
  static void store_second(void* p, int64_t i, typename V::Floats v, typename V::Floats, Draws draws) {
    store<kStream, true>(p, i, v, draws);
  }
};

// Of a block that is being updated: v goes in, and comes out as its square root, which 8-bit codes are made from.
template <class V>
struct BlockMoments : Fp32Moments<V> {
  template <bool kStream>
  static void store_second(void* p, int64_t i, typename V::Floats, typename V::Floats root, typename Fp32Moments<V>::Draws) {
    V::store(static_cast<float*>(p) + i, root);
  }
};

// m takes the lower half of an element's draw, v (kSecond) the upper one. Adding 16 random bits to what is cut off carries
// into what stays with the probability that makes the mean right. A carry must not make an infinity of a finite number, nor
// something else of a NaN: from bf16's largest on, bits are cut off.
template <class V>
struct Bf16Moments {
  using Stored = uint16_t;
  using Draws = typename V::Ints;
  static Draws draws(const AdamScalars& s, uint32_t number) { return draw<V>(s.keys, number); }
  static typename V::Floats load(const void* p, int64_t i) { return V::load_bf16(static_cast<const uint16_t*>(p) + i); }
  template <bool kStream, bool kSecond>
  static void store(void* p, int64_t i, typename V::Floats x, Draws draws) {
    const auto noise = kSecond ? V::template shift_right<16>(draws) : V::and_int(draws, V::set1_int(0xffffu));
    const auto bits = V::bits(x);
    const auto magnitude = V::and_int(bits, V::set1_int(0x7fffffffu));
    const auto sum = V::add_int(bits, V::keep_below(noise, magnitude, V::set1_int(0x7f7f0000u)));
    uint16_t* to = static_cast<uint16_t*>(p) + i;
    kStream ? V::stream_upper(to, sum) : V::store_upper(to, sum);
  }
  template <bool kStream>
  static void store_second(void* p, int64_t i, typename V::Floats v, typename V::Floats, Draws draws) {
    store<kStream, true>(p, i, v, draws);
  }
};

template <class V, bool kBf16>
inline typename V::Floats load_grad(const void* grad, int64_t i) {
  if constexpr (kBf16) {
    return V::load_bf16(static_cast<const uint16_t*>(grad) + i);
  } else {
    return V::load(static_cast<const float*>(grad) + i);
  }
}

// Runs past the end of the planes, where a prefetch does nothing; hence integers and not pointers.
template <bool kBf16, int64_t kMomentBytes>
inline void prefetch_planes(const AdamPlanes& p, int64_t i) {
  const auto ask = [i](const void* plane, int64_t element_bytes) {
    const auto distance = static_cast<uintptr_t>((i + kPrefetchElements) * element_bytes);
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(plane) + distance));
  };
  ask(p.from.hi, 2);
  ask(p.from.lo, 2);
  ask(p.from.m, kMomentBytes);
  ask(p.from.v, kMomentBytes);
  ask(p.grad, kBf16 ? 2 : 4);
}

// One vector of elements: the operations of torch's single-tensor Adam in its order, each rounded where torch rounds.
template <class V, class M, bool kBf16, bool kCoupled, bool kHighWeight, bool kStream>
inline void adam_vector(const AdamPlanes& p, const AdamConstants<V>& k, typename M::Draws draws, int64_t i) {
  auto master = V::load_master(p.from.hi + i, p.from.lo + i);
  auto grad = V::mul(load_grad<V, kBf16>(p.grad, i), k.grad_scale);
  if constexpr (kCoupled) {
    grad = V::fma(k.decay, master, grad);
  } else {
    master = V::mul(master, k.decay);
  }
  const auto old_m = M::load(p.from.m, i);
  const auto m = V::fma(k.coefficient, V::sub(grad, old_m), kHighWeight ? grad : old_m);
  const auto decayed_v = V::mul(M::load(p.from.v, i), k.beta2);
  const auto v = V::fma(V::mul(k.one_minus_beta2, grad), grad, decayed_v);
  const auto root = V::sqrt(v);
  const auto denominator = V::add(V::div(root, k.bias_correction2_sqrt), k.eps);
  master = V::add(master, V::div(V::mul(k.neg_step_size, m), denominator));
  M::template store<kStream, false>(p.to.m, i, m, draws);
  M::template store_second<kStream>(p.to.v, i, v, root, draws);
  kStream ? V::stream_master(p.to.hi + i, p.to.lo + i, master) : V::store_master(p.to.hi + i, p.to.lo + i, master);
}

// At most a vector of elements: the same vector code on a padded copy, so that tails round exactly like the rest.
template <class V, class M, bool kBf16, bool kCoupled, bool kHighWeight>
void adam_tail(const AdamPlanes& p, const AdamConstants<V>& k, typename M::Draws draws, int64_t begin, int64_t count) {
  using Moment = typename M::Stored;
  uint16_t hi[V::kWidth] = {};
  int16_t lo[V::kWidth] = {};
  Moment m[V::kWidth] = {}, v[V::kWidth] = {};
  float grad[V::kWidth] = {};
  const size_t grad_bytes = kBf16 ? sizeof(uint16_t) : sizeof(float);
  std::memcpy(hi, p.from.hi + begin, count * sizeof(uint16_t));
  std::memcpy(lo, p.from.lo + begin, count * sizeof(int16_t));
  std::memcpy(m, static_cast<const Moment*>(p.from.m) + begin, count * sizeof(Moment));
  std::memcpy(v, static_cast<const Moment*>(p.from.v) + begin, count * sizeof(Moment));
  std::memcpy(grad, static_cast<const char*>(p.grad) + begin * grad_bytes, count * grad_bytes);
  const MasterPlanes copy{hi, lo, m, v};
  adam_vector<V, M, kBf16, kCoupled, kHighWeight, false>({copy, copy, grad, p.grad_type, p.moment_type, 0, 0}, k, draws, 0);
  std::memcpy(p.to.hi + begin, hi, count * sizeof(uint16_t));
  std::memcpy(p.to.lo + begin, lo, count * sizeof(int16_t));
  std::memcpy(static_cast<Moment*>(p.to.m) + begin, m, count * sizeof(Moment));
  std::memcpy(static_cast<Moment*>(p.to.v) + begin, v, count * sizeof(Moment));
}

template <class V, class M, bool kBf16, bool kCoupled, bool kHighWeight, bool kStream>
void adam_stored(const AdamPlanes& p, const AdamScalars& s, int64_t begin, int64_t end, float decay) {
  const AdamConstants<V> k = broadcast<V>(s, decay);
  const auto draws = [&](int64_t element) { return M::draws(s, p.first + static_cast<uint32_t>(element)); };
  int64_t i = begin;
  if constexpr (kStream) {
    const int64_t line = (begin + kLineElements - 1) / kLineElements * kLineElements;
    while (i < line && i < end) {
      const int64_t past = i + V::kWidth < line ? i + V::kWidth : line;
      const int64_t stop = past < end ? past : end;
      adam_tail<V, M, kBf16, kCoupled, kHighWeight>(p, k, draws(i), i, stop - i);
      i = stop;
    }
  }
  for (; i + V::kWidth <= end; i += V::kWidth) {
    if constexpr (V::kWidth > 1) prefetch_planes<kBf16, sizeof(typename M::Stored)>(p, i);
    adam_vector<V, M, kBf16, kCoupled, kHighWeight, kStream>(p, k, draws(i), i);
  }
  if constexpr (kStream) V::fence();  // weakly ordered: they must be visible before the range counts as done
  if (i < end) {
    adam_tail<V, M, kBf16, kCoupled, kHighWeight>(p, k, draws(i), i, end - i);
  }
}

struct BlockStep {
  float step, inverse;
};

// What one step of the codes is where the largest number has the code `most`. Below the normal numbers there is none, and
// all are zero.
inline BlockStep block_step(float largest, float limit, float most) {
  const float step = (largest < limit ? largest : limit) / most;
  if (step < FLT_MIN) return {0.0f, 0.0f};
  return {step, 1.0f / step};
}

inline float stored_step(const uint8_t* block) {
  float step;
  std::memcpy(&step, block + kMomentBlock, sizeof step);
  return step;
}

template <class V>
void decode_blocks(const uint8_t* m_block, const uint8_t* v_block, float* m, float* v) {
  const auto m_step = V::set1(stored_step(m_block)), v_step = V::set1(stored_step(v_block));
  for (int64_t i = 0; i < kMomentBlock; i += V::kWidth) {
    const auto root = V::mul(V::load_codes(v_block + i), v_step);
    V::store(m + i, V::mul(V::load_signed_codes(m_block + i), m_step));
    V::store(v + i, V::mul(root, root));
  }
}

// m on a linear scale from -127 to 127, the root of v on one from 0 to 255. A root that is not zero has the code 1 at least:
// v is divided by.
template <class V>
void encode_blocks(const float* m, const float* root, const AdamScalars& s, uint32_t number, uint8_t* m_block, uint8_t* v_block) {
  auto m_most = V::set1(0.0f), root_most = m_most;
  for (int64_t i = 0; i < kMomentBlock; i += V::kWidth) {
    m_most = V::max(m_most, V::abs(V::load(m + i)));
    root_most = V::max(root_most, V::load(root + i));
  }
  const BlockStep m_step = block_step(V::largest(m_most), kLargestMoment, 127.0f);
  const BlockStep v_step = block_step(V::largest(root_most), kLargestRoot, 255.0f);
  const auto m_inverse = V::set1(m_step.inverse), v_inverse = V::set1(v_step.inverse);
  const auto unit = V::set1(1.0f / 65536), low = V::set1(-127.0f), high = V::set1(127.0f), top = V::set1(255.0f);
  for (int64_t i = 0; i < kMomentBlock; i += V::kWidth) {
    const auto draws = draw<V>(s.keys, number + static_cast<uint32_t>(i));
    const auto m_noise = V::mul(V::to_floats(V::and_int(draws, V::set1_int(0xffffu))), unit);
    const auto v_noise = V::mul(V::to_floats(V::template shift_right<16>(draws)), unit);
    const auto scaled = V::min(V::max(V::mul(V::load(m + i), m_inverse), low), high);
    const auto m_code = V::to_ints(V::add(scaled, V::add(m_noise, high)));
    V::store_codes(m_block + i, V::add_int(m_code, V::set1_int(static_cast<uint32_t>(-127))));
    const auto roots = V::load(root + i);
    const auto v_code = V::to_ints(V::add(V::min(V::mul(roots, v_inverse), top), v_noise));
    const auto least = V::keep_below(V::set1_int(1), V::set1_int(0), V::bits(roots));
    V::store_codes(v_block + i, V::max_int(v_code, least));
  }
  std::memcpy(m_block + kMomentBlock, &m_step.step, sizeof m_step.step);
  std::memcpy(v_block + kMomentBlock, &v_step.step, sizeof v_step.step);
}

// Moments are decoded into the first-level cache, updated there, and encoded.
template <class V, bool kBf16, bool kCoupled, bool kHighWeight>
void adam_blocks(const AdamPlanes& p, const AdamScalars& s, int64_t begin, int64_t end, float decay) {
  const AdamConstants<V> k = broadcast<V>(s, decay);
  const auto block_of = [](void* plane, int64_t i) { return static_cast<uint8_t*>(plane) + i / kMomentBlock * kMomentBlockBytes; };
  alignas(64) float m[kMomentBlock], v[kMomentBlock];
  for (int64_t i = begin; i < end; i += kMomentBlock) {
    decode_blocks<V>(block_of(p.from.m, i), block_of(p.from.v, i), m, v);
    const void* grad = static_cast<const char*>(p.grad) + i * (kBf16 ? sizeof(uint16_t) : sizeof(float));
    const AdamPlanes block{{p.from.hi + i, p.from.lo + i, m, v}, {p.to.hi + i, p.to.lo + i, m, v}, grad, p.grad_type,
                           p.moment_type, 0, 0};
    for (int64_t j = 0; j < kMomentBlock; j += V::kWidth) {
      adam_vector<V, BlockMoments<V>, kBf16, kCoupled, kHighWeight, false>(block, k, {}, j);
    }
    encode_blocks<V>(m, v, s, p.first + static_cast<uint32_t>(i), block_of(p.to.m, i), block_of(p.to.v, i));
  }
}

template <class V, class M, bool kBf16, bool kCoupled, bool kHighWeight>
void adam_range(const AdamPlanes& p, const AdamScalars& s, int64_t begin, int64_t end, float decay) {
  if (p.moment_type == MomentType::kBlocks) return adam_blocks<V, kBf16, kCoupled, kHighWeight>(p, s, begin, end, decay);
  const AdamFn plain = adam_stored<V, M, kBf16, kCoupled, kHighWeight, false>;
  const AdamFn streaming = adam_stored<V, M, kBf16, kCoupled, kHighWeight, true>;
  (p.streams ? streaming : plain)(p, s, begin, end, decay);
}

template <class V, class M, bool kBf16, bool kCoupled>
void adam_weight(const AdamPlanes& p, const AdamScalars& s, int64_t begin, int64_t end, float decay) {
  const AdamFn low = adam_range<V, M, kBf16, kCoupled, false>, high = adam_range<V, M, kBf16, kCoupled, true>;
  (s.lerp_weight < 0.5f ? low : high)(p, s, begin, end, decay);
}

template <class V, class M>
void adam_moments(const AdamPlanes& p, const AdamScalars& s, int64_t begin, int64_t end, float decay) {
  // torch leaves out the L2 term where the decay is zero; 0 * master would be NaN for an infinite master.
  const bool coupled = s.coupled && decay != 0.0f;
  const float factor = s.coupled && !coupled ? 1.0f : decay;
  if (p.grad_type == GradType::kBf16) {
    (coupled ? adam_weight<V, M, true, true> : adam_weight<V, M, true, false>)(p, s, begin, end, factor);
  } else {
    (coupled ? adam_weight<V, M, false, true> : adam_weight<V, M, false, false>)(p, s, begin, end, factor);
  }
}

template <class V>
void adam(const AdamPlanes& p, const AdamScalars& s, int64_t begin, int64_t end, float decay) {
  const bool is_short = p.moment_type == MomentType::kBf16;
  (is_short ? adam_moments<V, Bf16Moments<V>> : adam_moments<V, Fp32Moments<V>>)(p, s, begin, end, decay);
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
