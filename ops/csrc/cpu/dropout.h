// Dropout on the CPU: what the operators hand to their kernels.
#pragma once

#include <cstdint>

#include "capability.h"

namespace detr_methods {

// A thread takes whole blocks of elements, so that vectors begin at the same places in any case.
constexpr int64_t dropout_block = 4096;

// Rows whose gradients are summed apart, so that threads change no sum's order.
constexpr int64_t summed_rows = 128;

// One pass over `count` elements: output = residual + dropout(values), or dropout(relu(values)).
template <typename T>
struct DropoutPass {
  const T* values;
  const T* residual;  // or null
  T* output;          // may be the values
  int64_t count;
  double probability;
  uint64_t seed;
};

// What a gradient becomes on its way back through dropout(relu(values)), whose result says where
// it passes.
template <typename T>
struct ReLUDropoutGradient {
  const T* grad_output;
  const T* output;
  T* grad_values;  // may be grad_output
  int64_t count;
  double probability;
};

// Blocks [begin, end) of dropout_block elements each.
DETR_METHODS_DECLARE(
    template <typename T> void dropout_pass(const DropoutPass<T>& pass, bool relu, int64_t begin,
                                            int64_t end);
    template <typename T> void relu_dropout_gradient(const ReLUDropoutGradient<T>& pass,
                                                     int64_t begin, int64_t end);
    // Blocks of summed_rows rows, each of which adds its rows up to its own row of `sums`.
    template <typename T> void relu_dropout_gradient_sums(const ReLUDropoutGradient<T>& pass,
                                                          int64_t columns, T* sums, int64_t begin,
                                                          int64_t end);)

}  // namespace detr_methods
