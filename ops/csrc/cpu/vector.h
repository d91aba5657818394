// Vectors of the width that the current target has, in GCC's and Clang's portable notation.
//
// Included once per target, inside its pragma: DETR_METHODS_CAPABILITY names the namespace,
// DETR_METHODS_VECTOR_BYTES the width. What needs intrinsics is only the conversion from half.
#include "vector_includes.h"

namespace detr_methods {
namespace DETR_METHODS_CAPABILITY {

#define DETR_METHODS_INLINE inline __attribute__((always_inline))

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(DETR_METHODS_VECTOR_BYTES)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
constexpr int lanes = DETR_METHODS_VECTOR_BYTES / sizeof(T);

// The integer that comparisons of T's vectors yield.
template <typename T>
using IntegerOf = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

// What is computed in: float for the low precisions.
template <typename T>
using AccumulatorOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
DETR_METHODS_INLINE Vector<T> splat(T x) {
  return Vector<T>{} + x;
}

DETR_METHODS_INLINE Vector<float> load(const float* from) {
  Vector<float> result;
  std::memcpy(&result, from, sizeof(result));
  return result;
}

DETR_METHODS_INLINE Vector<double> load(const double* from) {
  Vector<double> result;
  std::memcpy(&result, from, sizeof(result));
  return result;
}

DETR_METHODS_INLINE Vector<float> load(const c10::BFloat16* from) {
  typedef uint16_t Narrow __attribute__((vector_size(DETR_METHODS_VECTOR_BYTES / 2)));
  Narrow bits;
  std::memcpy(&bits, from, sizeof(bits));
  return (Vector<float>)(__builtin_convertvector(bits, Vector<uint32_t>) << 16);
}

DETR_METHODS_INLINE Vector<float> load(const c10::Half* from) {
#if DETR_METHODS_VECTOR_BYTES == 64
  return (Vector<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif DETR_METHODS_VECTOR_BYTES == 32
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
  Vector<float> result;
  for (int i = 0; i < lanes<float>; ++i) result[i] = from[i];
  return result;
#endif
}

DETR_METHODS_INLINE void store(float* to, Vector<float> x) { std::memcpy(to, &x, sizeof(x)); }

DETR_METHODS_INLINE void store(double* to, Vector<double> x) { std::memcpy(to, &x, sizeof(x)); }

template <typename Low>
DETR_METHODS_INLINE void store(Low* to, Vector<float> x) {
  for (int i = 0; i < lanes<float>; ++i) to[i] = static_cast<Low>(x[i]);
}

// The first `count` lanes; the others are zero, and memory behind them is not touched.
template <typename T>
DETR_METHODS_INLINE auto load_partial(const T* from, int64_t count) {
  T buffer[lanes<AccumulatorOf<T>>] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = from[i];
  return load(buffer);
}

template <typename T>
DETR_METHODS_INLINE void store_partial(T* to, Vector<AccumulatorOf<T>> x, int64_t count) {
  T buffer[lanes<AccumulatorOf<T>>];
  store(buffer, x);
  for (int64_t i = 0; i < count; ++i) to[i] = buffer[i];
}

// Sum of all lanes, in an order that depends on the vector's width only.
template <typename T>
DETR_METHODS_INLINE T sum(Vector<T> x) {
  T buffer[lanes<T>];
  store(buffer, x);
  for (int width = lanes<T> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) buffer[i] += buffer[i + width];
  }
  return buffer[0];
}

// The sums of four vectors side by side; the order of additions depends on the width only.
template <typename T>
DETR_METHODS_INLINE void four_sums(const Vector<T> (&x)[4], T* to) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, float>) {
    __m128 quarter[4];
    for (int k = 0; k < 4; ++k) {
#if DETR_METHODS_VECTOR_BYTES == 64
      const __m512 whole = (__m512)x[k];
      const __m256 half =
          _mm256_add_ps(_mm512_castps512_ps256(whole), _mm512_extractf32x8_ps(whole, 1));
      quarter[k] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif DETR_METHODS_VECTOR_BYTES == 32
      const __m256 half = (__m256)x[k];
      quarter[k] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#else
      quarter[k] = (__m128)x[k];
#endif
    }
    const __m128 a = _mm_add_ps(_mm_unpacklo_ps(quarter[0], quarter[1]),
                                _mm_unpackhi_ps(quarter[0], quarter[1]));
    const __m128 b = _mm_add_ps(_mm_unpacklo_ps(quarter[2], quarter[3]),
                                _mm_unpackhi_ps(quarter[2], quarter[3]));
    _mm_storeu_ps(to, _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a)));
    return;
  }
#endif
  for (int k = 0; k < 4; ++k) to[k] = sum<T>(x[k]);
}

// Lane by lane: a where the mask is set, else b.
template <typename T>
DETR_METHODS_INLINE Vector<T> select(Vector<IntegerOf<T>> mask, Vector<T> a, Vector<T> b) {
  return (Vector<T>)((mask & (Vector<IntegerOf<T>>)a) | (~mask & (Vector<IntegerOf<T>>)b));
}

}  // namespace DETR_METHODS_CAPABILITY
}  // namespace detr_methods
