// Which elements dropout keeps: a function of a seed and of where they are, not of the threads.

namespace detr_methods {
namespace DETR_METHODS_CAPABILITY {

// 32 random bits for each key of a row, the same in the Triton kernels and the PyTorch reference: a
// hash of the seed, the row and the key. In attention a row is image, head and query counted as
// one; in a plain tensor it is the high half of an element's number, and the key the low one.
struct DropoutRow {
  uint32_t first, second;

  DropoutRow(uint64_t seed, int64_t row) {
    first = mix(static_cast<uint32_t>(row) ^ static_cast<uint32_t>(seed));
    second = mix(first + static_cast<uint32_t>(seed >> 32) + 0x9E3779B9u);
  }

  template <typename Bits>
  DETR_METHODS_INLINE Bits bits(Bits key) const {
    Bits x = (key * 0x9E3779B9u) ^ first;
    x = x ^ (x >> 16);
    x = x * 0x7FEB352Du;
    x = x ^ (x >> 15);
    x = x + second;
    x = x * 0x846CA68Bu;
    return x ^ (x >> 16);
  }

 private:
  static uint32_t mix(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7FEB352Du;
    x ^= x >> 15;
    x *= 0x846CA68Bu;
    return x ^ (x >> 16);
  }
};

// Factor of each dropped or kept element: 0 or 1 / (1 - p).
template <typename A>
struct Dropout {
  typedef uint32_t HalfOfVector __attribute__((vector_size(DETR_METHODS_VECTOR_BYTES / 2)));
  using Bits = std::conditional_t<sizeof(A) == 8, HalfOfVector, Vector<uint32_t>>;

  bool active;
  uint64_t seed;
  uint32_t threshold;
  A kept;

  Dropout(double probability, uint64_t seed)
      : active(probability > 0),
        seed(seed),
        threshold(static_cast<uint32_t>(probability * 4294967296.0)),
        kept(static_cast<A>(1 / (1 - probability))) {}

  // All bits of a lane set where the element is dropped.
  DETR_METHODS_INLINE Vector<IntegerOf<A>> dropped(const DropoutRow& row, int64_t first_key) const {
    Bits key;
    uint32_t offsets[lanes<A>];
    for (int i = 0; i < lanes<A>; ++i) offsets[i] = i;
    std::memcpy(&key, offsets, sizeof(key));
    const auto below = row.bits(key + static_cast<uint32_t>(first_key)) < threshold;
    return __builtin_convertvector(below, Vector<IntegerOf<A>>);
  }

  DETR_METHODS_INLINE Vector<A> factors(const DropoutRow& row, int64_t first_key) const {
    return select<A>(dropped(row, first_key), Vector<A>{}, splat(kept));
  }
};

}  // namespace DETR_METHODS_CAPABILITY
}  // namespace detr_methods
