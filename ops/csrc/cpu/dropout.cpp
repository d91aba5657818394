// Dropout on the CPU: checks, allocation, parallel loops.
#include "dropout.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <torch/library.h>

#include <optional>

namespace detr_methods {
namespace {

constexpr int64_t grain = 8;  // blocks that a thread takes at least: waking it costs as much

int64_t blocks(int64_t count) { return (count + dropout_block - 1) / dropout_block; }

void check_probability(double probability) {
  TORCH_CHECK_VALUE(probability >= 0 && probability < 1, "p is not a probability below 1");
}

void check_partner(const char* name, const at::Tensor& partner, const at::Tensor& values) {
  TORCH_CHECK_VALUE(partner.sizes() == values.sizes() &&
                        partner.scalar_type() == values.scalar_type(),
                    name, " needs the shape and type of what it belongs to");
}

// The last step of SplitMix64. The kernels' hash leaves masks dependent if only the upper halves of
// their seeds differ, as those of seeds that somebody counts may.
uint64_t scrambled(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// All tensors are contiguous and alike; the output may be the values.
void run(const at::Tensor& values, const at::Tensor* residual, at::Tensor& output, double p,
         const at::Tensor& seed, bool relu) {
  check_probability(p);
  TORCH_CHECK_VALUE(seed.numel() == 1 && seed.scalar_type() == at::kLong,
                    "seed needs one element of type int64");
  const uint64_t number = scrambled(static_cast<uint64_t>(seed.item<int64_t>()));
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, values.scalar_type(), "dropout", [&] {
        const DropoutPass<scalar_t> pass{
            values.const_data_ptr<scalar_t>(),
            residual ? residual->const_data_ptr<scalar_t>() : nullptr,
            output.mutable_data_ptr<scalar_t>(), values.numel(), p, number};
        at::parallel_for(0, blocks(pass.count), grain, [&](int64_t begin, int64_t end) {
          DETR_METHODS_DISPATCH(dropout_pass<scalar_t>(pass, relu, begin, end))
        });
      });
}

at::Tensor dropout_add(const at::Tensor& values, const std::optional<at::Tensor>& residual,
                       double p, const at::Tensor& seed) {
  at::Tensor output = at::empty(values.sizes(), values.options());
  if (!residual.has_value()) {
    run(values.contiguous(), nullptr, output, p, seed, false);
    return output;
  }
  check_partner("residual", *residual, values);
  const at::Tensor added = residual->contiguous();
  run(values.contiguous(), &added, output, p, seed, false);
  return output;
}

at::Tensor relu_dropout(const at::Tensor& values, double p, const at::Tensor& seed) {
  at::Tensor output = at::empty(values.sizes(), values.options());
  run(values.contiguous(), nullptr, output, p, seed, true);
  return output;
}

void dropout_in_place(at::Tensor values, double p, const at::Tensor& seed, bool relu) {
  at::Tensor output = values.contiguous();
  run(output, nullptr, output, p, seed, relu);
  if (!output.is_same(values)) values.copy_(output);
}

at::Tensor relu_dropout_backward(const at::Tensor& grad_output, const at::Tensor& output,
                                 double p) {
  check_probability(p);
  check_partner("grad_output", grad_output, output);
  at::Tensor grad_values = at::empty(output.sizes(), output.options());
  const at::Tensor grad = grad_output.contiguous(), result = output.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, output.scalar_type(), "relu_dropout_backward", [&] {
        const ReLUDropoutGradient<scalar_t> pass{
            grad.const_data_ptr<scalar_t>(), result.const_data_ptr<scalar_t>(),
            grad_values.mutable_data_ptr<scalar_t>(), output.numel(), p};
        at::parallel_for(0, blocks(pass.count), grain, [&](int64_t begin, int64_t end) {
          DETR_METHODS_DISPATCH(relu_dropout_gradient<scalar_t>(pass, begin, end))
        });
      });
  return grad_values;
}

// Overwrites the gradient; returns its sum over all axes but the last.
at::Tensor relu_dropout_backward_in_place(at::Tensor grad_output, const at::Tensor& output,
                                          double p) {
  check_probability(p);
  check_partner("grad_output", grad_output, output);
  TORCH_CHECK_VALUE(output.dim() > 0, "output needs an axis to be summed to");
  const at::Tensor result = output.contiguous();
  at::Tensor grad = grad_output.contiguous();
  const int64_t columns = output.size(-1), rows = columns ? output.numel() / columns : 0;
  const int64_t count = (rows + summed_rows - 1) / summed_rows;
  at::Tensor sums = at::zeros({count, columns}, output.options());
  AT_DISPATCH_FLOATING_TYPES(output.scalar_type(), "relu_dropout_backward_", [&] {
    const ReLUDropoutGradient<scalar_t> pass{
        grad.const_data_ptr<scalar_t>(), result.const_data_ptr<scalar_t>(),
        grad.mutable_data_ptr<scalar_t>(), output.numel(), p};
    scalar_t* total = sums.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      DETR_METHODS_DISPATCH(
          relu_dropout_gradient_sums<scalar_t>(pass, columns, total, begin, end))
    });
  });
  if (!grad.is_same(grad_output)) grad_output.copy_(grad);
  return sums.sum(0);
}

}  // namespace

TORCH_LIBRARY_IMPL(detr_methods, CPU, library) {
  library.impl("dropout_add", dropout_add);
  library.impl("dropout_", dropout_in_place);
  library.impl("relu_dropout", relu_dropout);
  library.impl("relu_dropout_backward", relu_dropout_backward);
  library.impl("relu_dropout_backward_", relu_dropout_backward_in_place);
}

}  // namespace detr_methods
