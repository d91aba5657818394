// Gaussian-modulated attention on the CPU: checks, allocation, parallel loop.
#include "gaussian_attention.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

namespace detr_methods {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// What both directions need beside their own tensors: contiguous and in the types of the kernels.
struct Inputs {
  GaussianShape shape;
  at::Tensor query, key, value, centers, precision, padding;
};

at::ScalarType accumulator_of(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

// Centers or precision for every head, in the kernels' type.
at::Tensor per_head(const at::Tensor& given, const GaussianShape& shape, at::ScalarType type) {
  return given.to(type).expand({shape.images, shape.heads, shape.queries, 2}).contiguous();
}

// The Python function explains bad input; here it only must not reach the kernels.
Inputs checked_inputs(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                      int64_t width, const at::Tensor& centers, const at::Tensor& precision,
                      const OptionalTensor& padding, double scale, double dropout,
                      const OptionalTensor& seed) {
  TORCH_CHECK_VALUE(query.dim() == 4 && key.dim() == 4 && value.dim() == 4 && centers.dim() == 4 &&
                        precision.dim() == 4,
                    "query, key, value, centers and precision need 4 dimensions");
  GaussianShape shape{query.size(0), query.size(1), query.size(2), key.size(2), query.size(3),
                      value.size(3), width,         scale,         dropout,     0};
  const auto type = query.scalar_type();
  TORCH_CHECK_TYPE(key.scalar_type() == type && value.scalar_type() == type,
                   "query, key and value differ in their types");
  TORCH_CHECK_VALUE(
      key.sizes() == at::IntArrayRef({shape.images, shape.heads, shape.keys, shape.channels}) &&
          value.sizes().slice(0, 3) == key.sizes().slice(0, 3),
      "shapes of query, key and value do not belong together");
  for (const at::Tensor& given : {centers, precision}) {
    TORCH_CHECK_VALUE(given.size(0) == shape.images && given.size(2) == shape.queries &&
                          given.size(3) == 2 &&
                          (given.size(1) == shape.heads || given.size(1) == 1),
                      "centers and precision need the shape (B, H or 1, N, 2)");
  }
  TORCH_CHECK_VALUE(shape.keys == 0 || (width > 0 && shape.keys % width == 0),
                    "the keys are not a map of the given width");
  TORCH_CHECK_VALUE(dropout >= 0 && dropout < 1, "dropout_p is not a probability below 1");
  TORCH_CHECK_VALUE(dropout == 0 || seed.has_value(), "dropout needs a seed");
  if (dropout > 0) shape.seed = static_cast<uint64_t>(seed->item<int64_t>());
  at::Tensor mask;
  if (padding.has_value()) {
    TORCH_CHECK_VALUE(padding->sizes() == at::IntArrayRef({shape.images, shape.keys}) &&
                          padding->scalar_type() == at::kBool,
                      "key_padding_mask needs the shape (B, S) and type bool");
    mask = padding->contiguous();
  }
  const auto accumulator = accumulator_of(type);
  return {shape,
          query.contiguous(),
          key.contiguous(),
          value.contiguous(),
          per_head(centers, shape, accumulator),
          per_head(precision, shape, accumulator),
          mask};
}

const bool* padding_of(const Inputs& in) {
  return in.padding.defined() ? in.padding.const_data_ptr<bool>() : nullptr;
}

// Products of one query with all keys and values.
int64_t pair_products(const GaussianShape& shape) {
  return shape.keys * (shape.channels + shape.value_channels);
}

// How many units a thread takes at least: waking it costs as much as this many products.
int64_t grain(int64_t products) {
  return std::max<int64_t>(1, 1000000 / std::max<int64_t>(1, products));
}

std::tuple<at::Tensor, at::Tensor> attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t width,
    const at::Tensor& centers, const at::Tensor& precision, const OptionalTensor& padding,
    double scale, double dropout, const OptionalTensor& seed) {
  const Inputs in = checked_inputs(query, key, value, width, centers, precision, padding, scale,
                                   dropout, seed);
  const GaussianShape& shape = in.shape;
  at::Tensor output = at::empty({shape.images, shape.heads, shape.queries, shape.value_channels},
                                query.options());
  at::Tensor logsumexp = at::empty({shape.images, shape.heads, shape.queries},
                                   query.options().dtype(accumulator_of(query.scalar_type())));
  const int64_t heads = shape.images * shape.heads;
  if (logsumexp.numel() == 0) return {output, logsumexp};
  // long chunks reuse what is loaded of the keys, short ones feed all threads
  const int64_t wanted = std::max<int64_t>(1, 2 * at::get_num_threads() / heads);
  const int64_t chunk = std::clamp<int64_t>((shape.queries + wanted - 1) / wanted, 32, 512);
  const int64_t units = heads * ((shape.queries + chunk - 1) / chunk);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, query.scalar_type(), "gaussian_attention", [&] {
        using A = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
        const GaussianForward<scalar_t, A> tensors{
            in.query.const_data_ptr<scalar_t>(),     in.key.const_data_ptr<scalar_t>(),
            in.value.const_data_ptr<scalar_t>(),     in.centers.const_data_ptr<A>(),
            in.precision.const_data_ptr<A>(),        padding_of(in),
            output.mutable_data_ptr<scalar_t>(),     logsumexp.mutable_data_ptr<A>()};
        at::parallel_for(0, units, grain(chunk * pair_products(shape)), [&](int64_t begin, int64_t end) {
          DETR_METHODS_DISPATCH(gaussian_forward<scalar_t, A>(shape, tensors, chunk, begin, end))
        });
      });
  return {output, logsumexp};
}

// A gradient for every head, in the shape and type of what it belongs to.
at::Tensor as_given(const at::Tensor& grad, const at::Tensor& given) {
  return grad.sum_to_size(given.sizes()).to(given.scalar_type());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& grad_output, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const at::Tensor& output, const at::Tensor& logsumexp, int64_t width,
    const at::Tensor& centers, const at::Tensor& precision, const OptionalTensor& padding,
    double scale, double dropout, const OptionalTensor& seed) {
  const Inputs in = checked_inputs(query, key, value, width, centers, precision, padding, scale,
                                   dropout, seed);
  const GaussianShape& shape = in.shape;
  const auto type = query.scalar_type();
  TORCH_CHECK_VALUE(
      output.sizes() ==
              at::IntArrayRef({shape.images, shape.heads, shape.queries, shape.value_channels}) &&
          grad_output.sizes() == output.sizes() &&
          logsumexp.sizes() == at::IntArrayRef({shape.images, shape.heads, shape.queries}) &&
          output.scalar_type() == type && grad_output.scalar_type() == type &&
          logsumexp.scalar_type() == accumulator_of(type),
      "grad_output, output and logsumexp do not belong to query, key and value");
  at::Tensor grad_query = at::zeros(in.query.sizes(), in.query.options());
  at::Tensor grad_key = at::zeros(in.key.sizes(), in.key.options());
  at::Tensor grad_value = at::zeros(in.value.sizes(), in.value.options());
  at::Tensor grad_centers = at::zeros(in.centers.sizes(), in.centers.options());
  at::Tensor grad_precision = at::zeros(in.precision.sizes(), in.precision.options());
  const at::Tensor grad = grad_output.contiguous(), out = output.contiguous();
  const at::Tensor sums = logsumexp.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, type, "gaussian_attention_backward", [&] {
        using A = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
        const GaussianBackward<scalar_t, A> tensors{
            grad.const_data_ptr<scalar_t>(),           in.query.const_data_ptr<scalar_t>(),
            in.key.const_data_ptr<scalar_t>(),         in.value.const_data_ptr<scalar_t>(),
            out.const_data_ptr<scalar_t>(),            sums.const_data_ptr<A>(),
            in.centers.const_data_ptr<A>(),            in.precision.const_data_ptr<A>(),
            padding_of(in),                            grad_query.mutable_data_ptr<scalar_t>(),
            grad_key.mutable_data_ptr<scalar_t>(),     grad_value.mutable_data_ptr<scalar_t>(),
            grad_centers.mutable_data_ptr<A>(),        grad_precision.mutable_data_ptr<A>()};
        const int64_t products = 3 * shape.queries * pair_products(shape);
        at::parallel_for(0, shape.images * shape.heads, grain(products), [&](int64_t begin, int64_t end) {
          DETR_METHODS_DISPATCH(gaussian_backward<scalar_t, A>(shape, tensors, begin, end))
        });
      });
  return {grad_query, grad_key, grad_value, as_given(grad_centers, centers),
          as_given(grad_precision, precision)};
}

}  // namespace

TORCH_LIBRARY_IMPL(detr_methods, CPU, library) {
  library.impl("gaussian_attention", attention);
  library.impl("gaussian_attention_backward", attention_backward);
}

}  // namespace detr_methods
