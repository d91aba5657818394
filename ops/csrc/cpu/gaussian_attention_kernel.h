// Kernels of Gaussian-modulated attention, compiled once for each target. Keys stream through in
// blocks, so that no (N, S) matrix exists; a block's logits lie in the core's cache.
#include "gaussian_attention.h"

namespace detr_methods {
namespace DETR_METHODS_CAPABILITY {

constexpr int64_t key_block = 128, query_block = 32;

template <typename A>
constexpr int64_t whole_vectors(int64_t count) {
  return (count + lanes<A> - 1) / lanes<A> * lanes<A>;
}

constexpr int64_t whole_tiles(int64_t count) {
  return (count + tile_rows - 1) / tile_rows * tile_rows;
}

// Rows of `channels` as A times a factor, padded with zeros to whole vectors and to `rows` rows.
template <typename T, typename A>
void pack(const T* from, int64_t count, int64_t channels, A factor, A* to, int64_t rows,
          int64_t padded) {
  const int64_t whole = channels / lanes<A> * lanes<A>;
  for (int64_t i = 0; i < count; ++i, from += channels, to += padded) {
    for (int64_t c = 0; c < whole; c += lanes<A>) store(to + c, factor * load(from + c));
    if (whole < channels) store(to + whole, factor * load_partial(from + whole, channels - whole));
  }
  std::fill_n(to, (rows - count) * padded, A(0));
}

// The first `channels` of each padded row, times a factor.
template <typename T, typename A>
void unpack(const A* from, int64_t rows, int64_t padded, A factor, T* to, int64_t channels) {
  const int64_t whole = channels / lanes<A> * lanes<A>;
  for (int64_t i = 0; i < rows; ++i, from += padded, to += channels) {
    for (int64_t c = 0; c < whole; c += lanes<A>) store(to + c, factor * load(from + c));
    if (whole < channels) {
      store_partial(to + whole, factor * load(from + whole), channels - whole);
    }
  }
}

// Columns of packed rows, as rows of key_block numbers.
template <typename A>
void transpose(const A* from, int64_t columns, int64_t from_row, A* to) {
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t i = 0; i < key_block; ++i) to[c * key_block + i] = from[i * from_row + c];
  }
}

// One block of keys of one head: both layouts of keys and values, and where the keys are.
template <typename A>
struct KeyBlock {
  int64_t first, count, channels, value_channels;  // channels as padded
  A last_x, last_y;                                // of the map
  std::vector<A> key, key_columns, value, value_columns, x, y, allowed;

  KeyBlock(int64_t channels, int64_t value_channels)
      : channels(channels),
        value_channels(value_channels),
        key(key_block * channels),
        key_columns(channels * key_block),
        value(key_block * value_channels),
        value_columns(value_channels * key_block),
        x(key_block),
        y(key_block),
        allowed(key_block) {}

  // Load the keys from `first_key` on; `padding` belongs to the image or is null.
  template <typename T>
  void load_block(const GaussianShape& shape, const T* keys, const T* values, const bool* padding,
                  int64_t first_key, bool value_transposed) {
    first = first_key;
    count = std::min(key_block, shape.keys - first);
    last_x = static_cast<A>(shape.width - 1);
    last_y = static_cast<A>(shape.keys / shape.width - 1);
    pack(keys + first * shape.channels, count, shape.channels, A(1), key.data(), key_block,
         channels);
    pack(values + first * shape.value_channels, count, shape.value_channels, A(1), value.data(),
         key_block, value_channels);
    transpose(key.data(), shape.channels, channels, key_columns.data());
    if (value_transposed) {
      transpose(value.data(), shape.value_channels, value_channels, value_columns.data());
    }
    for (int64_t i = 0; i < key_block; ++i) {
      const bool exists = i < count && !(padding && padding[first + i]);
      x[i] = static_cast<A>((first + i) % shape.width);
      y[i] = static_cast<A>((first + i) / shape.width);
      allowed[i] = exists ? A(0) : -std::numeric_limits<A>::infinity();
    }
  }
};

// The Gaussian of one query. Distances count from the map's cell nearest to its centre: what that
// cell's own distance adds to all logits drops out of the softmax, but would cost them digits.
template <typename A>
struct Gaussian {
  A near_x, near_y, shift_x, shift_y, precision_x, precision_y;  // centre = near + shift

  Gaussian(const A* center, const A* precision, const KeyBlock<A>& keys)
      : near_x(nearest(center[0], keys.last_x)),
        near_y(nearest(center[1], keys.last_y)),
        shift_x(center[0] - near_x),
        shift_y(center[1] - near_y),
        precision_x(precision[0]),
        precision_y(precision[1]) {}

  // Logits from products of query and key.
  DETR_METHODS_INLINE Vector<A> logits(const A* products, const KeyBlock<A>& keys,
                                       int64_t i) const {
    const Vector<A> dx = load(&keys.x[i]) - near_x, dy = load(&keys.y[i]) - near_y;
    const Vector<A> distance =
        dx * (dx - 2 * shift_x) * precision_x + dy * (dy - 2 * shift_y) * precision_y;
    return load(products + i) - distance + load(&keys.allowed[i]);
  }

 private:
  static A nearest(A center, A last) {
    return std::min(std::max(std::nearbyint(center), A(0)), last);
  }
};

template <typename A>
DETR_METHODS_INLINE A maximum(Vector<A> x) {
  A result = x[0];
  for (int i = 1; i < lanes<A>; ++i) result = std::max(result, x[i]);
  return result;
}

// Softmax over streamed blocks for one query: running maximum and sum of exponentials.
template <typename A>
struct RunningSoftmax {
  A highest = -std::numeric_limits<A>::infinity();
  A total = 0;

  // Turn products into unnormalised weights, dropped out, and scale `output` to the new maximum.
  DETR_METHODS_INLINE void add(A* products, const KeyBlock<A>& keys, const Gaussian<A>& gaussian,
                               const Dropout<A>& dropout, const DropoutRow& row, A* output) {
    Vector<A> top = splat(highest);
    for (int64_t i = 0; i < key_block; i += lanes<A>) {
      const Vector<A> logits = gaussian.logits(products, keys, i);
      store(products + i, logits);
      top = select<A>(top > logits, top, logits);
    }
    const A new_highest = maximum<A>(top);
    // without any allowed key so far, subtract a number instead of infinity
    const A base = new_highest == -std::numeric_limits<A>::infinity() ? A(0) : new_highest;
    const A correction = exponential<A>(splat(highest - base))[0];
    Vector<A> sum_of_block = {};
    for (int64_t i = 0; i < key_block; i += lanes<A>) {
      Vector<A> weight = exponential<A>(load(products + i) - base);
      sum_of_block += weight;
      if (dropout.active) weight *= dropout.factors(row, keys.first + i);
      store(products + i, weight);
    }
    total = total * correction + sum<A>(sum_of_block);
    highest = new_highest;
    for (int64_t c = 0; c < keys.value_channels; c += lanes<A>) {
      store(output + c, load(output + c) * correction);
    }
  }

  A logsumexp() const {
    return total > 0 || total != total ? highest + std::log(total)
                                       : std::numeric_limits<A>::infinity();
  }
};

template <typename T, typename A>
void gaussian_forward(const GaussianShape& shape, const GaussianForward<T, A>& tensors,
                      int64_t chunk, int64_t begin, int64_t end) {
  const int64_t channels = whole_vectors<A>(shape.channels);
  const int64_t value_channels = whole_vectors<A>(shape.value_channels);
  const int64_t chunks = (shape.queries + chunk - 1) / chunk, rows = whole_tiles(chunk);
  const Dropout<A> dropout(shape.dropout, shape.seed);
  KeyBlock<A> keys(channels, value_channels);
  std::vector<A> query(rows * channels), output(rows * value_channels);
  std::vector<A> products(query_block * key_block);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t head = unit / chunks, image = head / shape.heads;
    const int64_t first = unit % chunks * chunk, count = std::min(chunk, shape.queries - first);
    const int64_t row = head * shape.queries + first;
    const bool* padding = tensors.padding ? tensors.padding + image * shape.keys : nullptr;
    pack(tensors.query + row * shape.channels, count, shape.channels, static_cast<A>(shape.scale),
         query.data(), rows, channels);
    std::fill(output.begin(), output.end(), A(0));
    std::vector<RunningSoftmax<A>> softmax(count);
    for (int64_t key = 0; key < shape.keys; key += key_block) {
      keys.load_block(shape, tensors.key + head * shape.keys * shape.channels,
                      tensors.value + head * shape.keys * shape.value_channels, padding, key,
                      false);
      for (int64_t q = 0; q < count; q += query_block) {
        const int64_t here = std::min(query_block, count - q), tiles = whole_tiles(here);
        multiply<false>(Left<A>{query.data() + q * channels, channels, 1}, keys.key_columns.data(),
                        key_block, products.data(), key_block, tiles, key_block, shape.channels);
        for (int64_t i = 0; i < here; ++i) {
          const Gaussian<A> gaussian(tensors.centers + (row + q + i) * 2,
                                     tensors.precision + (row + q + i) * 2, keys);
          softmax[q + i].add(products.data() + i * key_block, keys, gaussian, dropout,
                             DropoutRow(dropout.seed, row + q + i),
                             output.data() + (q + i) * value_channels);
        }
        multiply<true>(Left<A>{products.data(), key_block, 1}, keys.value.data(), value_channels,
                       output.data() + q * value_channels, value_channels, tiles, value_channels,
                       keys.count);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const A total = softmax[i].total, factor = total > 0 || total != total ? 1 / total : A(0);
      tensors.logsumexp[row + i] = softmax[i].logsumexp();
      unpack(output.data() + i * value_channels, 1, value_channels, factor,
             tensors.output + (row + i) * shape.value_channels, shape.value_channels);
    }
  }
}

// What the gradients of one head share: its queries and the sums that they collect.
template <typename A>
struct QueryGradients {
  std::vector<A> query, grad_output, delta, grad_query, grad_center, grad_precision;

  QueryGradients(int64_t rows, int64_t channels, int64_t value_channels)
      : query(rows * channels),
        grad_output(rows * value_channels),
        delta(rows),
        grad_query(rows * channels),
        grad_center(rows * 2),
        grad_precision(rows * 2) {}

  template <typename T>
  void load_head(const GaussianShape& shape, const GaussianBackward<T, A>& tensors, int64_t head,
                 int64_t rows, int64_t channels, int64_t value_channels) {
    const int64_t row = head * shape.queries, depth = shape.value_channels;
    pack(tensors.query + row * shape.channels, shape.queries, shape.channels,
         static_cast<A>(shape.scale), query.data(), rows, channels);
    pack(tensors.grad_output + row * depth, shape.queries, depth, A(1), grad_output.data(), rows,
         value_channels);
    for (int64_t i = 0; i < shape.queries; ++i) {
      delta[i] = 0;
      for (int64_t c = 0; c < depth; ++c) {
        delta[i] += grad_output[i * value_channels + c] *
                    static_cast<A>(tensors.output[(row + i) * depth + c]);
      }
    }
    for (auto* sums : {&grad_query, &grad_center, &grad_precision}) {
      std::fill(sums->begin(), sums->end(), A(0));
    }
  }
};

// One query against one block: from products to weights (dropped out) and logit gradients.
template <typename A>
DETR_METHODS_INLINE void differentiate_row(A* weights, A* grad_logits, const KeyBlock<A>& keys,
                                           const Gaussian<A>& gaussian, A logsumexp, A delta,
                                           const Dropout<A>& dropout, const DropoutRow& row,
                                           A* grad_center, A* grad_precision) {
  // moments about the nearest cell: exact, as a row's logit gradients add up to zero
  Vector<A> first_x = {}, first_y = {}, second_x = {}, second_y = {};
  for (int64_t i = 0; i < key_block; i += lanes<A>) {
    const Vector<A> weight = exponential<A>(gaussian.logits(weights, keys, i) - logsumexp);
    Vector<A> kept = weight, grad = load(grad_logits + i);
    if (dropout.active) {
      const Vector<A> factors = dropout.factors(row, keys.first + i);
      kept *= factors;
      grad *= factors;
    }
    grad = weight * (grad - delta);
    store(weights + i, kept);
    store(grad_logits + i, grad);
    const Vector<A> dx = load(&keys.x[i]) - gaussian.near_x;
    const Vector<A> dy = load(&keys.y[i]) - gaussian.near_y;
    first_x += grad * dx;
    first_y += grad * dy;
    second_x += grad * dx * dx;
    second_y += grad * dy * dy;
  }
  const A moment_x = 2 * sum<A>(first_x), moment_y = 2 * sum<A>(first_y);
  grad_center[0] += gaussian.precision_x * moment_x;
  grad_center[1] += gaussian.precision_y * moment_y;
  grad_precision[0] += gaussian.shift_x * moment_x - sum<A>(second_x);
  grad_precision[1] += gaussian.shift_y * moment_y - sum<A>(second_y);
}

template <typename T, typename A>
void gaussian_backward(const GaussianShape& shape, const GaussianBackward<T, A>& tensors,
                       int64_t begin, int64_t end) {
  const int64_t channels = whole_vectors<A>(shape.channels), n = shape.queries;
  const int64_t value_channels = whole_vectors<A>(shape.value_channels), rows = whole_tiles(n);
  const Dropout<A> dropout(shape.dropout, shape.seed);
  KeyBlock<A> keys(channels, value_channels);
  QueryGradients<A> queries(rows, channels, value_channels);
  std::vector<A> weights(query_block * key_block), grad_logits(query_block * key_block);
  std::vector<A> grad_key(key_block * channels), grad_value(key_block * value_channels);
  for (int64_t head = begin; head < end; ++head) {
    const int64_t image = head / shape.heads, row = head * n;
    const bool* padding = tensors.padding ? tensors.padding + image * shape.keys : nullptr;
    queries.load_head(shape, tensors, head, rows, channels, value_channels);
    for (int64_t key = 0; key < shape.keys; key += key_block) {
      const int64_t key_row = head * shape.keys;
      keys.load_block(shape, tensors.key + key_row * shape.channels,
                      tensors.value + key_row * shape.value_channels, padding, key, true);
      std::fill(grad_key.begin(), grad_key.end(), A(0));
      std::fill(grad_value.begin(), grad_value.end(), A(0));
      for (int64_t q = 0; q < n; q += query_block) {
        const int64_t here = std::min(query_block, n - q), tiles = whole_tiles(here);
        const A* query = queries.query.data() + q * channels;
        const A* grad_output = queries.grad_output.data() + q * value_channels;
        multiply<false>(Left<A>{query, channels, 1}, keys.key_columns.data(), key_block,
                        weights.data(), key_block, tiles, key_block, shape.channels);
        multiply<false>(Left<A>{grad_output, value_channels, 1}, keys.value_columns.data(),
                        key_block, grad_logits.data(), key_block, tiles, key_block,
                        shape.value_channels);
        for (int64_t i = 0; i < here; ++i) {
          const int64_t at = row + q + i;
          const Gaussian<A> gaussian(tensors.centers + at * 2, tensors.precision + at * 2, keys);
          differentiate_row(weights.data() + i * key_block, grad_logits.data() + i * key_block,
                            keys, gaussian, tensors.logsumexp[at], queries.delta[q + i], dropout,
                            DropoutRow(dropout.seed, at), queries.grad_center.data() + (q + i) * 2,
                            queries.grad_precision.data() + (q + i) * 2);
        }
        multiply<true>(Left<A>{grad_logits.data(), key_block, 1}, keys.key.data(), channels,
                       queries.grad_query.data() + q * channels, channels, tiles, channels,
                       keys.count);
        multiply<true>(Left<A>{grad_logits.data(), 1, key_block}, query, channels,
                       grad_key.data(), channels, key_block, channels, here);
        multiply<true>(Left<A>{weights.data(), 1, key_block}, grad_output, value_channels,
                       grad_value.data(), value_channels, key_block, value_channels, here);
      }
      unpack(grad_key.data(), keys.count, channels, A(1),
             tensors.grad_key + (key_row + key) * shape.channels, shape.channels);
      unpack(grad_value.data(), keys.count, value_channels, A(1),
             tensors.grad_value + (key_row + key) * shape.value_channels, shape.value_channels);
    }
    unpack(queries.grad_query.data(), n, channels, static_cast<A>(shape.scale),
           tensors.grad_query + row * shape.channels, shape.channels);
    std::copy_n(queries.grad_center.data(), n * 2, tensors.grad_centers + row * 2);
    std::copy_n(queries.grad_precision.data(), n * 2, tensors.grad_precision + row * 2);
  }
}

#define DETR_METHODS_INSTANTIATE(T, A)                                                       \
  template void gaussian_forward<T, A>(const GaussianShape&, const GaussianForward<T, A>&,   \
                                       int64_t, int64_t, int64_t);                           \
  template void gaussian_backward<T, A>(const GaussianShape&, const GaussianBackward<T, A>&, \
                                        int64_t, int64_t);
DETR_METHODS_INSTANTIATE(float, float)
DETR_METHODS_INSTANTIATE(double, double)
DETR_METHODS_INSTANTIATE(c10::BFloat16, float)
DETR_METHODS_INSTANTIATE(c10::Half, float)
#undef DETR_METHODS_INSTANTIATE

}  // namespace DETR_METHODS_CAPABILITY
}  // namespace detr_methods
