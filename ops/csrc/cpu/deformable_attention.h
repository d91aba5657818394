// Multi-scale deformable attention on the CPU: what the operator hands to its kernels.
#pragma once

#include <cstdint>
#include <vector>

#include "capability.h"

namespace detr_methods {

// Sizes and levels of one call. Images B, tokens S, heads H, channels D, queries N, levels V,
// points P; all tensors are contiguous.
struct DeformableShape {
  int64_t images, tokens, heads, channels, queries, levels, points;
  std::vector<int64_t> height, width, start;  // per level; start is its first token
  // Whether samples are so many that a head's values are better copied first: between other heads'
  // values, apart by a power of two as a rule, they share few places of a cache.
  bool copies_values;
};

// Values of all images and heads, with what lies between two images, heads and tokens.
template <typename T>
struct DeformableValues {
  const T* first;
  int64_t image, head, token;
};

// locations (B, N, H, V, P, 2), weights (B, N, H, V, P), output (B, N, H, D).
template <typename T, typename C>
struct DeformableForward {
  DeformableValues<T> value;
  const C* locations;
  const C* weights;
  T* output;
};

// The same with value (B, S, H, D).
template <typename T, typename C>
struct DeformableBackward {
  const T* grad_output;
  const T* value;
  const C* locations;
  const C* weights;
  T* grad_value;
  C* grad_locations;
  C* grad_weights;
};

// Copy: tokens [begin, end) of one image and head, of which `first` is the first token's value.
// Forward: rows [begin, end) of the B * H * N (image, head, query) triples.
// Backward: the units [begin, end) of B * H * level groups. A unit owns its part of every gradient,
// so that nothing is shared between threads and sums have one order.
DETR_METHODS_DECLARE(
    template <typename T> void copy_values(
        const DeformableShape& shape, const T* first, int64_t begin, int64_t end, T* copy);
    template <typename T, typename C> void deformable_forward(
        const DeformableShape& shape, const DeformableForward<T, C>& tensors, int64_t begin,
        int64_t end);
    template <typename T, typename C> void deformable_backward(
        const DeformableShape& shape, const DeformableBackward<T, C>& tensors, int64_t groups,
        int64_t begin, int64_t end);)

}  // namespace detr_methods
