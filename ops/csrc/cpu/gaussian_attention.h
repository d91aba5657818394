// Gaussian-modulated attention on the CPU: what the operator hands to its kernels.
#pragma once

#include <cstdint>

#include "capability.h"

namespace detr_methods {

// Sizes and scalars of one call. Images B, heads H, queries N, keys S = rows of `width` cells,
// channels D of queries and keys, Dv of values.
struct GaussianShape {
  int64_t images, heads, queries, keys, channels, value_channels, width;
  double scale;
  double dropout;  // probability; the mask is a function of seed, row and key
  uint64_t seed;
};

// query (B, H, N, D), key (B, H, S, D), value and output (B, H, S or N, Dv), centers and precision
// (B, H, N, 2), padding (B, S) or null, logsumexp (B, H, N); all contiguous. A is what is computed
// in: float for the low precisions.
template <typename T, typename A>
struct GaussianForward {
  const T *query, *key, *value;
  const A *centers, *precision;
  const bool* padding;
  T* output;
  A* logsumexp;
};

template <typename T, typename A>
struct GaussianBackward {
  const T *grad_output, *query, *key, *value, *output;
  const A *logsumexp, *centers, *precision;
  const bool* padding;
  T *grad_query, *grad_key, *grad_value;
  A *grad_centers, *grad_precision;
};

// Forward: units [begin, end) of B * H * chunks, where a chunk is `chunk` queries.
// Backward: units [begin, end) of B * H. A unit owns all that it writes.
DETR_METHODS_DECLARE(
    template <typename T, typename A> void gaussian_forward(
        const GaussianShape& shape, const GaussianForward<T, A>& tensors, int64_t chunk,
        int64_t begin, int64_t end);
    template <typename T, typename A> void gaussian_backward(
        const GaussianShape& shape, const GaussianBackward<T, A>& tensors, int64_t begin,
        int64_t end);)

}  // namespace detr_methods
