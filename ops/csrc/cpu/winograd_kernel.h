// Kernels of Winograd convolutions, compiled once for each target. Each transform is one of a
// tile's rows and one of its columns, for a vector of channels.
#include "winograd.h"

namespace detr_methods {
namespace DETR_METHODS_CAPABILITY {

// B^T of F(4, 3), with the points 0, 1, -1, 2, -2 and infinity.
struct InputTransform {
  static constexpr int from = 6, to = 6;
  template <typename V, typename T>
  static DETR_METHODS_INLINE void apply(const V (&d)[6], V (&x)[6], T) {
    const V even = d[4] - T(4) * d[2], odd = d[3] - T(4) * d[1];
    const V far = d[4] - d[2], twice = T(2) * (d[3] - d[1]);
    x[0] = T(4) * d[0] - T(5) * d[2] + d[4];
    x[1] = even + odd;
    x[2] = even - odd;
    x[3] = far + twice;
    x[4] = far - twice;
    x[5] = T(4) * d[1] - T(5) * d[3] + d[5];
  }
};

// A^T.
struct OutputTransform {
  static constexpr int from = 6, to = 4;
  template <typename V, typename T>
  static DETR_METHODS_INLINE void apply(const V (&m)[6], V (&y)[4], T) {
    const V near = m[1] + m[2], near_odd = m[1] - m[2];
    const V far = m[3] + m[4], far_odd = m[3] - m[4];
    y[0] = m[0] + near + far;
    y[1] = near_odd + T(2) * far_odd;
    y[2] = near + T(4) * far;
    y[3] = near_odd + T(8) * far_odd + m[5];
  }
};

// A.
struct OutputGradient {
  static constexpr int from = 4, to = 6;
  template <typename V, typename T>
  static DETR_METHODS_INLINE void apply(const V (&y)[4], V (&m)[6], T) {
    const V even = y[0] + y[2], odd = y[1] + y[3];
    const V far_even = y[0] + T(4) * y[2], far_odd = T(2) * y[1] + T(8) * y[3];
    m[0] = y[0];
    m[1] = even + odd;
    m[2] = even - odd;
    m[3] = far_even + far_odd;
    m[4] = far_even - far_odd;
    m[5] = y[3];
  }
};

// G.
struct FilterTransform {
  static constexpr int from = 3, to = 6;
  template <typename V, typename T>
  static DETR_METHODS_INLINE void apply(const V (&g)[3], V (&u)[6], T) {
    const V even = T(-1. / 6) * (g[0] + g[2]), odd = T(1. / 6) * g[1];
    const V far_even = T(1. / 24) * g[0] + T(1. / 6) * g[2], far_odd = T(1. / 12) * g[1];
    u[0] = T(1. / 4) * g[0];
    u[1] = even - odd;
    u[2] = even + odd;
    u[3] = far_even + far_odd;
    u[4] = far_even - far_odd;
    u[5] = g[2];
  }
};

// G^T.
struct FilterGradient {
  static constexpr int from = 6, to = 3;
  template <typename V, typename T>
  static DETR_METHODS_INLINE void apply(const V (&u)[6], V (&g)[3], T) {
    const V near = T(-1. / 6) * (u[1] + u[2]), far = u[3] + u[4];
    g[0] = T(1. / 4) * u[0] + near + T(1. / 24) * far;
    g[1] = T(1. / 6) * (u[2] - u[1]) + T(1. / 12) * (u[3] - u[4]);
    g[2] = near + T(1. / 6) * far + u[5];
  }
};

// `read(i, j)` each vector of a square, transform rows and columns, `write(i, j, vector)` it.
template <typename Transform, typename T, typename Read, typename Write>
DETR_METHODS_INLINE void transform(Read read, Write write) {
  constexpr int from = Transform::from, to = Transform::to;
  Vector<T> middle[to][from];
  for (int j = 0; j < from; ++j) {
    Vector<T> column[from], transformed[to];
    for (int i = 0; i < from; ++i) column[i] = read(i, j);
    Transform::apply(column, transformed, T());
    for (int i = 0; i < to; ++i) middle[i][j] = transformed[i];
  }
  for (int i = 0; i < to; ++i) {
    Vector<T> row[to];
    Transform::apply(middle[i], row, T());
    for (int j = 0; j < to; ++j) write(i, j, row[j]);
  }
}

// The taps of some filters: of `rows` inputs, each with those of a panel of outputs side by side.
template <typename T>
struct alignas(64) Taps {
  static constexpr int64_t rows = 4;
  T values[rows][9][winograd_panel];
};

// `move(filter's tap, its place in taps)` for a panel of `width` outputs and of `height` inputs.
template <typename P, typename T, typename Move>
DETR_METHODS_INLINE void each_tap(const WinogradFilters<P>& filters, int64_t row, int64_t height,
                                  int64_t panel, int64_t width, Taps<T>& taps, Move move) {
  for (int64_t n = 0; n < width; ++n) {
    for (int64_t c = 0; c < height; ++c) {
      P* filter = filters.at(row + c, panel + n);
      for (int64_t k = 0; k < 9; ++k) {
        move(filter[k], taps.values[c][filters.turned ? 8 - k : k][n]);
      }
    }
  }
}

// `use(row, height, panel, width)` blocks of inputs [begin, end) and of all outputs.
template <typename Use>
DETR_METHODS_INLINE void each_block(int64_t outputs, int64_t rows, int64_t begin, int64_t end,
                                    Use use) {
  for (int64_t panel = 0; panel < outputs; panel += winograd_panel) {
    const int64_t width = std::min(winograd_panel, outputs - panel);
    for (int64_t row = begin; row < end; row += rows) {
      use(row, std::min(rows, end - row), panel, width);
    }
  }
}

template <typename T>
void winograd_filters(const WinogradFilters<const T>& filters, T* transformed, int64_t begin,
                      int64_t end) {
  const int64_t size = filters.inputs * filters.outputs;
  Taps<T> taps;
  each_block(filters.outputs, Taps<T>::rows, begin, end,
             [&](int64_t row, int64_t height, int64_t panel, int64_t width) {
    each_tap(filters, row, height, panel, width, taps, [](const T& tap, T& to) { to = tap; });
    for (int64_t c = 0; c < height; ++c) {
      T* to = transformed + panel * filters.inputs + (row + c) * width;
      for (int64_t n = 0; n < width; n += lanes<T>) {
        transform<FilterTransform, T>(
            [&](int i, int j) { return load(taps.values[c][3 * i + j] + n); },
            [&](int i, int j, Vector<T> x) { store(to + (6 * i + j) * size + n, x); });
      }
    }
  });
}

template <typename T>
void winograd_filter_gradients(const T* transformed, const WinogradFilters<T>& filters,
                               int64_t begin, int64_t end) {
  const int64_t size = filters.inputs * filters.outputs;
  Taps<T> taps;
  each_block(filters.outputs, Taps<T>::rows, begin, end,
             [&](int64_t row, int64_t height, int64_t panel, int64_t width) {
    for (int64_t c = 0; c < height; ++c) {
      const T* from = transformed + (row + c) * filters.outputs + panel;
      for (int64_t n = 0; n < width; n += lanes<T>) {
        transform<FilterGradient, T>(
            [&](int i, int j) { return load(from + (6 * i + j) * size + n); },
            [&](int i, int j, Vector<T> x) { store(taps.values[c][3 * i + j] + n, x); });
      }
    }
    each_tap(filters, row, height, panel, width, taps, [](T& tap, T& from) { tap = from; });
  });
}

// Call `use(tile, image, row, column)` for tiles [begin, end), with the place of their first
// output.
template <typename Use>
DETR_METHODS_INLINE void each_tile(const WinogradGrid& grid, int64_t begin, int64_t end, Use use) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t line = tile / grid.columns();
    use(tile - begin, line / grid.rows(), 4 * (line % grid.rows()), 4 * (tile % grid.columns()));
  }
}

// Where the pixels of a square begin; what lies beyond the image is zero.
template <int size, typename T>
DETR_METHODS_INLINE void find_pixels(const T* images, const WinogradGrid& grid, int64_t channels,
                                     int64_t image, int64_t row, int64_t column, const T* zeros,
                                     const T* (&pixels)[size][size]) {
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t j = 0; j < size; ++j) {
      const int64_t y = row + i, x = column + j;
      const bool inside = y >= 0 && y < grid.height && x >= 0 && x < grid.width;
      pixels[i][j] =
          inside ? images + ((image * grid.height + y) * grid.width + x) * channels : zeros;
    }
  }
}

// Transform squares of pixels that begin `before` a tile's first output.
template <typename Transform, typename T>
DETR_METHODS_INLINE void transform_pixels(const T* images, const WinogradGrid& grid,
                                          WinogradTiles<T> tiles, int64_t before, int64_t begin,
                                          int64_t end) {
  constexpr int size = Transform::from;
  const std::vector<T> zeros(tiles.channels);
  each_tile(grid, begin, end, [&](int64_t tile, int64_t image, int64_t row, int64_t column) {
    const T* pixels[size][size];
    find_pixels(images, grid, tiles.channels, image, row - before, column - before, zeros.data(),
                pixels);
    for (int64_t c = 0; c < tiles.channels; c += lanes<T>) {
      T* to = tiles.data + tile * tiles.channels + c;
      transform<Transform, T>(
          [&](int i, int j) { return load(pixels[i][j] + c); },
          [&](int i, int j, Vector<T> x) { store(to + (6 * i + j) * tiles.stride, x); });
    }
  });
}

template <typename T>
void winograd_inputs(const T* images, const WinogradGrid& grid, WinogradTiles<T> tiles,
                     int64_t begin, int64_t end) {
  transform_pixels<InputTransform>(images, grid, tiles, 1, begin, end);
}

template <typename T>
void winograd_output_gradients(const T* images, const WinogradGrid& grid, WinogradTiles<T> tiles,
                               int64_t begin, int64_t end) {
  transform_pixels<OutputGradient>(images, grid, tiles, 0, begin, end);
}

template <typename T>
void winograd_outputs(WinogradTiles<const T> tiles, const T* bias, T* images,
                      const WinogradGrid& grid, int64_t begin, int64_t end) {
  each_tile(grid, begin, end, [&](int64_t tile, int64_t image, int64_t row, int64_t column) {
    const int64_t height = std::min<int64_t>(4, grid.height - row);
    const int64_t width = std::min<int64_t>(4, grid.width - column);
    T* first = images + ((image * grid.height + row) * grid.width + column) * tiles.channels;
    for (int64_t c = 0; c < tiles.channels; c += lanes<T>) {
      const T* from = tiles.data + tile * tiles.channels + c;
      const Vector<T> added = bias ? load(bias + c) : Vector<T>{};
      transform<OutputTransform, T>(
          [&](int i, int j) { return load(from + (6 * i + j) * tiles.stride); },
          [&](int i, int j, Vector<T> x) {
            if (i < height && j < width) {
              store(first + (i * grid.width + j) * tiles.channels + c, x + added);
            }
          });
    }
  });
}

template <typename T>
void winograd_products(WinogradTiles<const T> inputs, const T* filters, WinogradTiles<T> products,
                       int64_t rows, int64_t begin, int64_t end) {
  const int64_t depth = inputs.channels, outputs = products.channels;
  for (int64_t k = begin; k < end; ++k) {
    const Left<T> left{inputs.data + k * inputs.stride, depth, 1};
    for (int64_t panel = 0; panel < outputs; panel += winograd_panel) {
      const int64_t width = std::min(winograd_panel, outputs - panel);
      multiply<false>(left, filters + (k * outputs + panel) * depth, width,
                      products.data + k * products.stride + panel, outputs, rows, width, depth);
    }
  }
}

template <typename T>
void winograd_filter_products(WinogradTiles<const T> inputs, WinogradTiles<const T> products,
                              int64_t rows, bool accumulate, int64_t frequency, T* filters,
                              int64_t begin, int64_t end) {
  const auto add = accumulate ? multiply<true, T> : multiply<false, T>;
  const Left<T> left{inputs.data + frequency * inputs.stride + begin, 1, inputs.channels};
  T* to = filters + (frequency * inputs.channels + begin) * products.channels;
  add(left, products.data + frequency * products.stride, products.channels, to, products.channels,
      end - begin, products.channels, rows);
}

#define DETR_METHODS_INSTANTIATE(T)                                                             \
  template void winograd_filters<T>(const WinogradFilters<const T>&, T*, int64_t, int64_t);     \
  template void winograd_filter_gradients<T>(const T*, const WinogradFilters<T>&, int64_t,      \
                                             int64_t);                                          \
  template void winograd_inputs<T>(const T*, const WinogradGrid&, WinogradTiles<T>, int64_t,    \
                                   int64_t);                                                    \
  template void winograd_output_gradients<T>(const T*, const WinogradGrid&, WinogradTiles<T>,   \
                                             int64_t, int64_t);                                 \
  template void winograd_outputs<T>(WinogradTiles<const T>, const T*, T*, const WinogradGrid&,  \
                                    int64_t, int64_t);                                          \
  template void winograd_products<T>(WinogradTiles<const T>, const T*, WinogradTiles<T>,        \
                                     int64_t, int64_t, int64_t);                                \
  template void winograd_filter_products<T>(WinogradTiles<const T>, WinogradTiles<const T>,     \
                                            int64_t, bool, int64_t, T*, int64_t, int64_t);
DETR_METHODS_INSTANTIATE(float)
DETR_METHODS_INSTANTIATE(double)
#undef DETR_METHODS_INSTANTIATE

}  // namespace DETR_METHODS_CAPABILITY
}  // namespace detr_methods
