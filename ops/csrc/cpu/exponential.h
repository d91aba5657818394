// exp on vectors, for arguments that a softmax has.

namespace detr_methods {
namespace DETR_METHODS_CAPABILITY {

template <typename T>
struct ExponentialFacts;

template <>
struct ExponentialFacts<float> {
  static constexpr int degree = 7, mantissa = 23, bias = 127;
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to integers
  static constexpr float lowest = -87.0f;      // below, the result counts as zero
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
};

template <>
struct ExponentialFacts<double> {
  static constexpr int degree = 13, mantissa = 52, bias = 1023;
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double lowest = -708.0;
  static constexpr double ln2_high = 0.693145751953125, ln2_low = 1.42860682030941723212e-6;
};

// exp(x) for x <= 0 and NaN: 2^n times the Taylor polynomial of the rest, which is at most ln(2)/2.
template <typename T>
DETR_METHODS_INLINE Vector<T> exponential(Vector<T> x) {
  using Facts = ExponentialFacts<T>;
  using Int = IntegerOf<T>;
  const Vector<Int> vanishes = x < Facts::lowest;
  const Vector<T> safe = select<T>(vanishes, Vector<T>{}, x);
  const Vector<T> shifted = safe * T(1.4426950408889634) + Facts::round;
  const Vector<T> n = shifted - Facts::round;
  const Vector<T> rest = (safe - n * Facts::ln2_high) - n * Facts::ln2_low;
  T inverse_factorial[Facts::degree + 1] = {1};
  for (int k = 1; k <= Facts::degree; ++k) inverse_factorial[k] = inverse_factorial[k - 1] / k;
  Vector<T> series = splat(inverse_factorial[Facts::degree]);
  for (int k = Facts::degree - 1; k >= 0; --k) series = series * rest + inverse_factorial[k];
  // the low bits of `shifted` hold n; those of `round` are zero
  const Vector<Int> exponent = (Vector<Int>)shifted - (Vector<Int>)splat(Facts::round);
  const Vector<T> power = (Vector<T>)((exponent + Facts::bias) << Facts::mantissa);
  return select<T>(vanishes, Vector<T>{}, series * power);
}

}  // namespace DETR_METHODS_CAPABILITY
}  // namespace detr_methods
