// Winograd convolutions on the CPU: checks, allocation, parallel loops.
#include "winograd.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <torch/library.h>

#include <algorithm>
#include <optional>

namespace detr_methods {
namespace {

// Bytes of a thread's tiles and products, which stay in its core's cache between their transforms,
// of all tiles that a pass of all threads takes, and of transformed filters that are too many to be
// read again for each thread's tiles.
constexpr int64_t bytes_of_thread = 1 << 19, bytes_of_pass = 1 << 24, bytes_of_filters = 1 << 22;

constexpr int64_t rows_of_filters = 4, channels_of_product = 64;  // that a thread takes at least

int64_t divide_up(int64_t x, int64_t by) { return (x + by - 1) / by; }

void check_images(const char* name, const at::Tensor& images) {
  TORCH_CHECK_VALUE(images.dim() == 4, name, " needs four axes, it has ", images.dim());
  TORCH_CHECK_VALUE(images.size(1) % winograd_channels == 0, name, " has ", images.size(1),
                    " channels, expected a multiple of ", winograd_channels);
}

void check_type(const char* name, const at::Tensor& partner, const at::Tensor& input) {
  TORCH_CHECK_VALUE(partner.scalar_type() == input.scalar_type(), name,
                    " needs the input's type");
}

WinogradGrid grid_of(const at::Tensor& images) {
  return {images.size(0), images.size(2), images.size(3)};
}

// Images (B, C, H, W) with their channels last in memory.
at::Tensor laid_out(const at::Tensor& images) {
  return images.contiguous(at::MemoryFormat::ChannelsLast);
}

// Tiles at a time, a multiple of those that a product takes, whose inputs and products have `bytes`.
int64_t tiles_in(int64_t bytes, int64_t channels, int64_t tiles, int64_t element) {
  const int64_t most = bytes / (winograd_frequencies * channels * element);
  const int64_t count = std::max<int64_t>(1, most / winograd_rows) * winograd_rows;
  return std::min(count, divide_up(tiles, winograd_rows) * winograd_rows);
}

// Elements from one frequency to the next: a power of two would put all into the same cache lines.
int64_t stride_of(int64_t tiles, int64_t channels) { return tiles * channels + winograd_channels; }

template <typename T>
at::Tensor transformed_filters(const WinogradFilters<const T>& filters,
                               const at::TensorOptions& options) {
  at::Tensor transformed =
      at::empty({winograd_frequencies, filters.inputs, filters.outputs}, options);
  T* to = transformed.mutable_data_ptr<T>();
  at::parallel_for(0, filters.inputs, rows_of_filters, [&](int64_t begin, int64_t end) {
    DETR_METHODS_DISPATCH(winograd_filters<T>(filters, to, begin, end))
  });
  return transformed;
}

// Room for `count` tiles with their inputs and their products.
template <typename T>
struct TileBuffer {
  TileBuffer(int64_t count, int64_t inputs, int64_t outputs, const at::TensorOptions& options)
      : memory(at::empty({winograd_frequencies *
                          (stride_of(count, inputs) + stride_of(count, outputs))},
                         options)),
        input{memory.mutable_data_ptr<T>(), stride_of(count, inputs), inputs},
        product{input.data + winograd_frequencies * input.stride, stride_of(count, outputs),
                outputs} {}

  at::Tensor memory;
  WinogradTiles<T> input, product;
};

// Rows that a product of `tiles` tiles takes. Those without a tile have products that go nowhere;
// zeros keep what lay there, perhaps slow to multiply, out.
template <typename T>
int64_t filled_rows(const WinogradTiles<T>& input, int64_t tiles) {
  const int64_t rows = divide_up(tiles, winograd_rows) * winograd_rows;
  for (int64_t k = 0; k < winograd_frequencies; ++k) {
    T* frequency = input.data + k * input.stride;
    std::fill(frequency + tiles * input.channels, frequency + rows * input.channels, T(0));
  }
  return rows;
}

template <typename T>
struct Convolution {
  const T* images;
  const T* filters;  // transformed
  const T* bias;     // or null
  T* output;
  WinogradGrid grid;
  int64_t inputs, outputs;
  at::TensorOptions options;
};

// Each thread takes its tiles through all steps in turn, and reads all filters for some of them.
template <typename T>
void convolve_by_tiles(const Convolution<T>& given) {
  const int64_t tiles = given.grid.tiles();
  const int64_t count = tiles_in(bytes_of_thread, given.inputs + given.outputs, tiles, sizeof(T));
  at::parallel_for(0, divide_up(tiles, count), 1, [&](int64_t first, int64_t last) {
    const TileBuffer<T> buffer(count, given.inputs, given.outputs, given.options);
    for (int64_t part = first; part < last; ++part) {
      const int64_t begin = part * count, end = std::min(begin + count, tiles);
      const int64_t rows = filled_rows(buffer.input, end - begin);
      DETR_METHODS_DISPATCH(
          winograd_inputs<T>(given.images, given.grid, buffer.input, begin, end))
      DETR_METHODS_DISPATCH(winograd_products<T>(buffer.input.read_only(), given.filters,
                                                 buffer.product, rows, 0, winograd_frequencies))
      DETR_METHODS_DISPATCH(winograd_outputs<T>(buffer.product.read_only(), given.bias,
                                                given.output, given.grid, begin, end))
    }
  });
}

// All threads take each step together, so that filters larger than the cache are read once.
template <typename T>
void convolve_by_frequencies(const Convolution<T>& given) {
  const int64_t tiles = given.grid.tiles();
  const int64_t count = tiles_in(bytes_of_pass, given.inputs + given.outputs, tiles, sizeof(T));
  const TileBuffer<T> buffer(count, given.inputs, given.outputs, given.options);
  for (int64_t begin = 0; begin < tiles; begin += count) {
    const int64_t end = std::min(begin + count, tiles);
    const int64_t rows = filled_rows(buffer.input, end - begin);
    at::parallel_for(begin, end, winograd_rows, [&](int64_t first, int64_t last) {
      DETR_METHODS_DISPATCH(winograd_inputs<T>(
          given.images, given.grid, buffer.input.from(first - begin), first, last))
    });
    at::parallel_for(0, winograd_frequencies, 1, [&](int64_t first, int64_t last) {
      DETR_METHODS_DISPATCH(winograd_products<T>(buffer.input.read_only(), given.filters,
                                                 buffer.product, rows, first, last))
    });
    at::parallel_for(begin, end, winograd_rows, [&](int64_t first, int64_t last) {
      DETR_METHODS_DISPATCH(winograd_outputs<T>(buffer.product.from(first - begin).read_only(),
                                                given.bias, given.output, given.grid, first, last))
    });
  }
}

// Add the filters' gradients (36, C, N) of tiles [begin, end); the first ones overwrite.
template <typename T>
void add_filter_gradients(const T* images, const T* grad_images, const WinogradGrid& grid,
                          const TileBuffer<T>& buffer, T* gradients, int64_t begin, int64_t end) {
  at::parallel_for(begin, end, winograd_rows, [&](int64_t first, int64_t last) {
    DETR_METHODS_DISPATCH(winograd_inputs<T>(
        images, grid, buffer.input.from(first - begin), first, last))
    DETR_METHODS_DISPATCH(winograd_output_gradients<T>(
        grad_images, grid, buffer.product.from(first - begin), first, last))
  });
  const int64_t channels = buffer.input.channels;
  const int64_t parts = divide_up(channels, channels_of_product);
  at::parallel_for(0, winograd_frequencies * parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      const int64_t from = k % parts * channels_of_product;
      const int64_t to = std::min(from + channels_of_product, channels);
      DETR_METHODS_DISPATCH(
          winograd_filter_products<T>(buffer.input.read_only(), buffer.product.read_only(),
                                      end - begin, begin > 0, k / parts, gradients, from, to))
    }
  });
}

template <typename T>
at::Tensor filter_gradients(const at::Tensor& images, const at::Tensor& grad_images) {
  const WinogradGrid grid = grid_of(images);
  const int64_t inputs = images.size(1), outputs = grad_images.size(1), tiles = grid.tiles();
  const int64_t count = tiles_in(bytes_of_pass, inputs + outputs, tiles, sizeof(T));
  const TileBuffer<T> buffer(count, inputs, outputs, images.options());
  at::Tensor total = at::empty({winograd_frequencies, inputs, outputs}, images.options());
  at::Tensor gradient = at::empty({outputs, inputs, 3, 3}, images.options());
  T* sums = total.mutable_data_ptr<T>();
  for (int64_t begin = 0; begin < tiles; begin += count) {
    add_filter_gradients<T>(images.const_data_ptr<T>(), grad_images.const_data_ptr<T>(), grid,
                            buffer, sums, begin, std::min(begin + count, tiles));
  }
  const WinogradFilters<T> filters{gradient.mutable_data_ptr<T>(), inputs, outputs, false};
  at::parallel_for(0, inputs, rows_of_filters, [&](int64_t begin, int64_t end) {
    DETR_METHODS_DISPATCH(winograd_filter_gradients<T>(sums, filters, begin, end))
  });
  return gradient;
}

at::Tensor convolution_3x3(const at::Tensor& input, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias, bool turned) {
  check_images("input", input);
  check_type("weight", weight, input);
  const int64_t axis = turned ? 1 : 0;  // of the outputs
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(1 - axis) == input.size(1) &&
                        weight.size(axis) % winograd_channels == 0 && weight.size(2) == 3 &&
                        weight.size(3) == 3,
                    "weight has shape ", weight.sizes(), ", expected ", input.size(1), " and a ",
                    "multiple of ", winograd_channels, " channels and 3 x 3 pixels");
  const int64_t outputs = weight.size(axis);
  at::Tensor added;
  if (bias.has_value()) {
    check_type("bias", *bias, input);
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == outputs,
                      "bias needs one element for each filter");
    added = bias->contiguous();
  }
  at::Tensor output = at::empty({input.size(0), outputs, input.size(2), input.size(3)},
                                input.options(), at::MemoryFormat::ChannelsLast);
  if (output.numel() == 0) return output;
  const at::Tensor images = laid_out(input), filters = weight.contiguous();
  AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "convolution_3x3", [&] {
    const at::Tensor transformed = transformed_filters<scalar_t>(
        {filters.const_data_ptr<scalar_t>(), input.size(1), outputs, turned}, filters.options());
    const Convolution<scalar_t> given{
        images.const_data_ptr<scalar_t>(), transformed.const_data_ptr<scalar_t>(),
        added.defined() ? added.const_data_ptr<scalar_t>() : nullptr,
        output.mutable_data_ptr<scalar_t>(), grid_of(images), input.size(1), outputs,
        transformed.options()};
    if (static_cast<int64_t>(transformed.nbytes()) <= bytes_of_filters) {
      convolve_by_tiles(given);
    } else {
      convolve_by_frequencies(given);
    }
  });
  return output;
}

at::Tensor convolution_3x3_weight_gradient(const at::Tensor& input,
                                           const at::Tensor& grad_output) {
  check_images("input", input);
  check_images("grad_output", grad_output);
  check_type("grad_output", grad_output, input);
  TORCH_CHECK_VALUE(input.size(0) == grad_output.size(0) && input.size(2) == grad_output.size(2) &&
                        input.size(3) == grad_output.size(3),
                    "grad_output has shape ", grad_output.sizes(), ", expected images like ",
                    input.sizes());
  if (input.numel() == 0 || grad_output.numel() == 0) {
    return at::zeros({grad_output.size(1), input.size(1), 3, 3}, input.options());
  }
  at::Tensor gradient;
  AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "convolution_3x3_weight_gradient", [&] {
    gradient = filter_gradients<scalar_t>(laid_out(input), laid_out(grad_output));
  });
  return gradient;
}

}  // namespace

TORCH_LIBRARY_IMPL(detr_methods, CPU, library) {
  library.impl("convolution_3x3", convolution_3x3);
  library.impl("convolution_3x3_weight_gradient", convolution_3x3_weight_gradient);
}

}  // namespace detr_methods
