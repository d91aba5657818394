// Multi-scale deformable attention on the CPU: checks, allocation, parallel loop.
#include "deformable_attention.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>

namespace detr_methods {
namespace {

// The Python function explains bad input; here it only must not reach the kernels.
DeformableShape checked_shape(const at::Tensor& value, at::IntArrayRef spatial_shapes,
                              const at::Tensor& locations, const at::Tensor& weights) {
  TORCH_CHECK_VALUE(value.dim() == 4 && locations.dim() == 6 && weights.dim() == 5,
                    "value, sampling_locations and attention_weights need 4, 6 and 5 dimensions");
  DeformableShape shape{value.size(0),   value.size(1),   value.size(2),     value.size(3),
                        weights.size(1), weights.size(3), weights.size(4),   {}, {}, {}, false};
  TORCH_CHECK_VALUE(locations.size(5) == 2 && locations.sizes().slice(0, 5) == weights.sizes() &&
                        weights.size(0) == shape.images && weights.size(2) == shape.heads &&
                        static_cast<int64_t>(spatial_shapes.size()) == 2 * shape.levels,
                    "shapes of value, spatial_shapes, sampling_locations and attention_weights "
                    "do not belong together");
  int64_t token = 0;
  for (int64_t level = 0; level < shape.levels; ++level) {
    const int64_t height = spatial_shapes[2 * level], width = spatial_shapes[2 * level + 1];
    const int64_t most = std::numeric_limits<int32_t>::max();
    TORCH_CHECK_VALUE(height >= 0 && width >= 0 && height < most && width < most &&
                          (height == 0 || width == 0 || height <= shape.tokens / width),
                      "spatial_shapes has a level that value has no tokens for");
    shape.height.push_back(height);
    shape.width.push_back(width);
    shape.start.push_back(token);
    token += height * width;
  }
  TORCH_CHECK_VALUE(token == shape.tokens, "spatial_shapes and value differ in their tokens");
  TORCH_CHECK_VALUE(token < std::numeric_limits<int32_t>::max(), "value has too many tokens");
  const int64_t samples = shape.queries * shape.levels * shape.points;
  shape.copies_values = shape.heads > 1 && samples >= 4 * shape.tokens;
  return shape;
}

// How many pieces of work a thread takes at least: waking it costs as much as this many products.
int64_t grain(int64_t products) {
  return std::max<int64_t>(1, 250000 / std::max<int64_t>(1, products));
}

template <typename T, typename C>
void forward(const DeformableShape& shape, const at::Tensor& value, const at::Tensor& locations,
             const at::Tensor& weights, at::Tensor& output) {
  const int64_t products = shape.levels * shape.points * 4 * shape.channels;
  const int64_t pairs = shape.images * shape.heads, apart = shape.heads * shape.channels;
  DeformableForward<T, C> tensors{
      {value.const_data_ptr<T>(), shape.tokens * apart, shape.channels, apart},
      locations.const_data_ptr<C>(), weights.const_data_ptr<C>(), output.mutable_data_ptr<T>()};
  const auto sample = [&](int64_t first, int64_t last) {
    at::parallel_for(first, last, grain(products), [&](int64_t begin, int64_t end) {
      DETR_METHODS_DISPATCH(deformable_forward<T, C>(shape, tensors, begin, end))
    });
  };
  if (!shape.copies_values) return sample(0, pairs * shape.queries);
  // one copy at a time, which all threads share: 1 / heads of the output's memory
  const at::Tensor copy = at::empty({shape.tokens, shape.channels}, value.options());
  T* own = copy.mutable_data_ptr<T>();
  tensors.value = {own, 0, 0, shape.channels};
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const T* from = value.const_data_ptr<T>() + pair / shape.heads * shape.tokens * apart +
                    pair % shape.heads * shape.channels;
    at::parallel_for(0, shape.tokens, grain(shape.channels), [&](int64_t begin, int64_t end) {
      DETR_METHODS_DISPATCH(copy_values<T>(shape, from, begin, end, own))
    });
    sample(pair * shape.queries, (pair + 1) * shape.queries);
  }
}

template <typename T, typename C>
void backward(const DeformableShape& shape, const at::Tensor& grad_output, const at::Tensor& value,
              const at::Tensor& locations, const at::Tensor& weights, at::Tensor& grad_value,
              at::Tensor& grad_locations, at::Tensor& grad_weights) {
  const DeformableBackward<T, C> tensors{
      grad_output.const_data_ptr<T>(),       value.const_data_ptr<T>(),
      locations.const_data_ptr<C>(),         weights.const_data_ptr<C>(),
      grad_value.mutable_data_ptr<T>(),      grad_locations.mutable_data_ptr<C>(),
      grad_weights.mutable_data_ptr<C>()};
  const int64_t pairs = shape.images * shape.heads;
  // levels apart only where that feeds more threads: each group walks over all queries
  const int64_t groups = pairs >= 2 * at::get_num_threads() ? 1 : shape.levels;
  const int64_t products =
      shape.queries * shape.levels * shape.points * 8 * shape.channels / groups;
  at::parallel_for(0, pairs * groups, grain(products), [&](int64_t begin, int64_t end) {
    DETR_METHODS_DISPATCH(deformable_backward<T, C>(shape, tensors, groups, begin, end))
  });
}

// Run `call<value type, coordinate type>`; coordinates have the value's type or, beside a low
// precision, float.
#define DISPATCH_TYPES(value_type, coordinate_type, call)                                       \
  switch (value_type) {                                                                         \
    case at::kFloat: call(float, float) break;                                                  \
    case at::kDouble: call(double, double) break;                                               \
    case at::kBFloat16:                                                                         \
      if (coordinate_type == at::kFloat) call(c10::BFloat16, float)                             \
      else call(c10::BFloat16, c10::BFloat16)                                                   \
      break;                                                                                    \
    default:                                                                                    \
      if (coordinate_type == at::kFloat) call(c10::Half, float)                                 \
      else call(c10::Half, c10::Half)                                                           \
  }

void check_types(const at::Tensor& value, const at::Tensor& locations, const at::Tensor& weights) {
  const auto type = value.scalar_type(), coordinates = locations.scalar_type();
  const bool low = type == at::kBFloat16 || type == at::kHalf;
  TORCH_CHECK_TYPE((low || type == at::kFloat || type == at::kDouble) &&
                       weights.scalar_type() == coordinates &&
                       (coordinates == type || (low && coordinates == at::kFloat)),
                   "value, sampling_locations and attention_weights have types ", type, ", ",
                   coordinates, ", ", weights.scalar_type());
}

at::Tensor attention(const at::Tensor& value, at::IntArrayRef spatial_shapes,
                     const at::Tensor& locations, const at::Tensor& weights) {
  const DeformableShape shape = checked_shape(value, spatial_shapes, locations, weights);
  check_types(value, locations, weights);
  at::Tensor output =
      at::empty({shape.images, shape.queries, shape.heads * shape.channels}, value.options());
  if (output.numel() == 0) return output;
  const at::Tensor v = value.contiguous(), x = locations.contiguous(), w = weights.contiguous();
#define FORWARD(T, C) forward<T, C>(shape, v, x, w, output);
  DISPATCH_TYPES(value.scalar_type(), locations.scalar_type(), FORWARD)
#undef FORWARD
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& grad_output, const at::Tensor& value, at::IntArrayRef spatial_shapes,
    const at::Tensor& locations, const at::Tensor& weights) {
  const DeformableShape shape = checked_shape(value, spatial_shapes, locations, weights);
  check_types(value, locations, weights);
  TORCH_CHECK_VALUE(grad_output.sizes() == at::IntArrayRef({shape.images, shape.queries,
                                                            shape.heads * shape.channels}) &&
                        grad_output.scalar_type() == value.scalar_type(),
                    "grad_output does not have the output's shape and type");
  at::Tensor grad_value = at::empty(value.sizes(), value.options());
  at::Tensor grad_locations = at::empty(locations.sizes(), locations.options());
  at::Tensor grad_weights = at::empty(weights.sizes(), weights.options());
  if (value.numel() == 0 || weights.numel() == 0) {
    return {grad_value.zero_(), grad_locations.zero_(), grad_weights.zero_()};
  }
  const at::Tensor g = grad_output.contiguous(), v = value.contiguous();
  const at::Tensor x = locations.contiguous(), w = weights.contiguous();
#define BACKWARD(T, C) \
  backward<T, C>(shape, g, v, x, w, grad_value, grad_locations, grad_weights);
  DISPATCH_TYPES(value.scalar_type(), locations.scalar_type(), BACKWARD)
#undef BACKWARD
  return {grad_value, grad_locations, grad_weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(detr_methods, CPU, library) {
  library.impl("multi_scale_deformable_attention", attention);
  library.impl("multi_scale_deformable_attention_backward", attention_backward);
}

}  // namespace detr_methods
