// Convolutions of 3 x 3 pixels by Winograd's minimal filtering F(4 x 4, 3 x 3): what the operators
// hand to their kernels.
//
// An image is cut into tiles of 4 x 4 outputs, which need 6 x 6 inputs. Transformed, a convolution
// is 36 products of matrices, one for each of a tile's frequencies, with a quarter of the
// multiplications (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016).
#pragma once

#include <cstdint>

#include "capability.h"

namespace detr_methods {

constexpr int64_t winograd_frequencies = 36;

// Tiles and filters that the products take at a time, and of what numbers of channels are a
// multiple.
constexpr int64_t winograd_rows = 8, winograd_panel = 32, winograd_channels = 16;

// A batch of images with their channels last.
struct WinogradGrid {
  int64_t batch, height, width;

  int64_t rows() const { return (height + 3) / 4; }
  int64_t columns() const { return (width + 3) / 4; }
  int64_t tiles() const { return batch * rows() * columns(); }
};

// Frequencies of some tiles, `stride` elements from one frequency to the next, each of them a
// matrix of tiles by channels.
template <typename T>
struct WinogradTiles {
  T* data;
  int64_t stride, channels;

  WinogradTiles from(int64_t tile) const { return {data + tile * channels, stride, channels}; }
  WinogradTiles<const T> read_only() const { return {data, stride, channels}; }
};

// Filters from C inputs to N outputs, in memory (N, C, 3, 3), or (C, N, 3, 3) and turned by 180
// degrees.
template <typename T>
struct WinogradFilters {
  T* data;
  int64_t inputs, outputs;
  bool turned;

  T* at(int64_t input, int64_t output) const {
    return data + 9 * (turned ? input * outputs + output : output * inputs + input);
  }
};

DETR_METHODS_DECLARE(
    // Transform rows [begin, end) of C of filters to 36 matrices (C, N), each of them in panels of
    // winograd_panel columns, which lie one after the other.
    template <typename T> void winograd_filters(const WinogradFilters<const T>& filters,
                                                T* transformed, int64_t begin, int64_t end);
    // The gradient of filters from that of the transformed ones (36, C, N).
    template <typename T> void winograd_filter_gradients(const T* transformed,
                                                         const WinogradFilters<T>& filters,
                                                         int64_t begin, int64_t end);
    // Inputs of tiles [begin, end) to the first of `tiles`.
    template <typename T> void winograd_inputs(const T* images, const WinogradGrid& grid,
                                               WinogradTiles<T> tiles, int64_t begin, int64_t end);
    // Gradients of the outputs of tiles [begin, end) to those of the products.
    template <typename T> void winograd_output_gradients(const T* images, const WinogradGrid& grid,
                                                         WinogradTiles<T> tiles, int64_t begin,
                                                         int64_t end);
    // Products of the first of `tiles`, with a bias or null, to the outputs of tiles [begin, end).
    template <typename T> void winograd_outputs(WinogradTiles<const T> tiles, const T* bias,
                                                T* images, const WinogradGrid& grid, int64_t begin,
                                                int64_t end);
    // For frequencies [begin, end): products (rows x N) = inputs (rows x C) filters (C x N). Rows
    // are a multiple of winograd_rows.
    template <typename T> void winograd_products(WinogradTiles<const T> inputs, const T* filters,
                                                 WinogradTiles<T> products, int64_t rows,
                                                 int64_t begin, int64_t end);
    // Rows [begin, end) of C of the transformed filters' gradient at one frequency, = or += inputs^T
    // (C x rows) products (rows x N).
    template <typename T> void winograd_filter_products(
        WinogradTiles<const T> inputs, WinogradTiles<const T> products, int64_t rows,
        bool accumulate, int64_t frequency, T* filters, int64_t begin, int64_t end);)

}  // namespace detr_methods
