// Kernels of dropout, compiled once for each target: one pass, which makes its random bits.
#include "dropout.h"

namespace detr_methods {
namespace DETR_METHODS_CAPABILITY {

// Call `whole(i)` for each vector of a block and `part(i, elements)` for what is left of the last.
template <typename A, typename Whole, typename Part>
DETR_METHODS_INLINE void each_vector(int64_t first, int64_t end, Whole whole, Part part) {
  for (; first + lanes<A> <= end; first += lanes<A>) whole(first);
  if (first < end) part(first, end - first);
}

// ReLU lets NaN through, as PyTorch's does. What is dropped is zero, whatever it was.
template <bool relu, typename A>
DETR_METHODS_INLINE Vector<A> drop(Vector<A> x, const Dropout<A>& dropout, const DropoutRow& row,
                                   int64_t element) {
  Vector<IntegerOf<A>> zero = dropout.dropped(row, element);
  if constexpr (relu) zero |= x <= A(0);
  return select<A>(zero, Vector<A>{}, x * dropout.kept);
}

template <typename T, bool relu, bool adds>
void pass_over_block(const DropoutPass<T>& pass, int64_t block) {
  using A = AccumulatorOf<T>;
  const Dropout<A> dropout(pass.probability, pass.seed);
  const int64_t first = block * dropout_block, end = std::min(first + dropout_block, pass.count);
  const DropoutRow row(pass.seed, first >> 32);
  each_vector<A>(
      first, end,
      [&](int64_t i) {
        Vector<A> x = drop<relu, A>(load(pass.values + i), dropout, row, i);
        if constexpr (adds) x += load(pass.residual + i);
        store(pass.output + i, x);
      },
      [&](int64_t i, int64_t count) {
        Vector<A> x = drop<relu, A>(load_partial(pass.values + i, count), dropout, row, i);
        if constexpr (adds) x += load_partial(pass.residual + i, count);
        store_partial(pass.output + i, x, count);
      });
}

template <typename T>
void dropout_pass(const DropoutPass<T>& pass, bool relu, int64_t begin, int64_t end) {
  const auto over_block = relu            ? pass_over_block<T, true, false>
                          : pass.residual ? pass_over_block<T, false, true>
                                          : pass_over_block<T, false, false>;
  for (int64_t block = begin; block < end; ++block) over_block(pass, block);
}

// Gradients of elements [begin, end), each of which `use(i, gradient, count)` sees on its way.
template <typename T, typename Use>
DETR_METHODS_INLINE void pass_gradients(const ReLUDropoutGradient<T>& pass, int64_t begin,
                                        int64_t end, Use use) {
  using A = AccumulatorOf<T>;
  const A kept = static_cast<A>(1 / (1 - pass.probability));
  const auto gradient = [&](Vector<A> output, Vector<A> grad) {
    return select<A>(output <= A(0), Vector<A>{}, grad * kept);
  };
  each_vector<A>(
      begin, end,
      [&](int64_t i) {
        const auto x = gradient(load(pass.output + i), load(pass.grad_output + i));
        store(pass.grad_values + i, x);
        use(i, x, lanes<A>);
      },
      [&](int64_t i, int64_t count) {
        const auto x = gradient(load_partial(pass.output + i, count),
                                load_partial(pass.grad_output + i, count));
        store_partial(pass.grad_values + i, x, count);
        use(i, x, count);
      });
}

template <typename T>
void relu_dropout_gradient(const ReLUDropoutGradient<T>& pass, int64_t begin, int64_t end) {
  pass_gradients(pass, begin * dropout_block, std::min(end * dropout_block, pass.count),
                 [](int64_t, Vector<AccumulatorOf<T>>, int64_t) {});
}

template <typename T>
void relu_dropout_gradient_sums(const ReLUDropoutGradient<T>& pass, int64_t columns, T* sums,
                                int64_t begin, int64_t end) {
  const int64_t rows = pass.count / columns;
  for (int64_t block = begin; block < end; ++block) {
    T* total = sums + block * columns;
    const int64_t last = std::min((block + 1) * summed_rows, rows);
    for (int64_t row = block * summed_rows; row < last; ++row) {
      const int64_t first = row * columns;
      pass_gradients(pass, first, first + columns, [&](int64_t i, Vector<T> x, int64_t count) {
        T* to = total + (i - first);
        if (count == lanes<T>) {
          store(to, load(to) + x);
        } else {
          store_partial(to, load_partial(to, count) + x, count);
        }
      });
    }
  }
}

#define DETR_METHODS_INSTANTIATE(T)                                                    \
  template void dropout_pass<T>(const DropoutPass<T>&, bool, int64_t, int64_t);        \
  template void relu_dropout_gradient<T>(const ReLUDropoutGradient<T>&, int64_t, int64_t);
DETR_METHODS_INSTANTIATE(float)
DETR_METHODS_INSTANTIATE(double)
DETR_METHODS_INSTANTIATE(c10::BFloat16)
DETR_METHODS_INSTANTIATE(c10::Half)
#undef DETR_METHODS_INSTANTIATE

#define DETR_METHODS_INSTANTIATE(T)                                                              \
  template void relu_dropout_gradient_sums<T>(const ReLUDropoutGradient<T>&, int64_t, T*, int64_t, \
                                              int64_t);
DETR_METHODS_INSTANTIATE(float)
DETR_METHODS_INSTANTIATE(double)
#undef DETR_METHODS_INSTANTIATE

}  // namespace DETR_METHODS_CAPABILITY
}  // namespace detr_methods
