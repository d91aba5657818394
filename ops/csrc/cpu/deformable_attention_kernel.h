// Kernels of multi-scale deformable attention, compiled once for each target.
#include "deformable_attention.h"

namespace detr_methods {
namespace DETR_METHODS_CAPABILITY {

// The sampling points of one query and head, all levels of [first, last) in a row, padded to whole
// vectors. One instance serves a thread; only `place` changes it.
template <typename T>
struct SamplingPoints {
  using Int = IntegerOf<T>;

  int64_t count;                             // points that exist
  std::vector<T> height, width;              // of each point's level
  std::vector<Int> rows, columns, start;     // the same as integers, and the level's first token
  std::vector<T> x, y, weight;               // given: location and attention weight
  std::vector<T> right, below;               // distance to the corner's left and upper neighbour
  std::vector<T> top_left, top_right, bottom_left, bottom_right;  // weights of the corners
  std::vector<Int> pixel, corners;           // upper left token; bits 1, 2, 4, 8: corner on the map

  SamplingPoints(const DeformableShape& shape, int64_t first, int64_t last)
      : count((last - first) * shape.points) {
    const size_t padded = (count + lanes<T> - 1) / lanes<T> * lanes<T>;
    for (auto* field : {&height, &width, &x, &y, &weight, &right, &below, &top_left, &top_right,
                        &bottom_left, &bottom_right}) {
      field->assign(padded, T(0));
    }
    for (auto* field : {&rows, &columns, &start, &pixel, &corners}) field->assign(padded, Int(0));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t level = first + i / shape.points;
      height[i] = static_cast<T>(shape.height[level]);
      width[i] = static_cast<T>(shape.width[level]);
      rows[i] = static_cast<Int>(shape.height[level]);
      columns[i] = static_cast<Int>(shape.width[level]);
      start[i] = static_cast<Int>(shape.start[level]);
    }
  }

  // Compute corners and bilinear weights of the points at `locations`.
  template <typename C>
  DETR_METHODS_INLINE void place(const C* locations, const C* weights) {
    for (int64_t i = 0; i < count; ++i) {
      x[i] = static_cast<T>(locations[2 * i]);
      y[i] = static_cast<T>(locations[2 * i + 1]);
      weight[i] = static_cast<T>(weights[i]);
    }
    for (int64_t i = 0; i < count; i += lanes<T>) place_vector(i);
  }

 private:
  DETR_METHODS_INLINE Vector<Int> load_integers(const std::vector<Int>& from, int64_t i) {
    Vector<Int> result;
    std::memcpy(&result, &from[i], sizeof(result));
    return result;
  }

  DETR_METHODS_INLINE void place_vector(int64_t i) {
    const Vector<Int> last_row = load_integers(rows, i) - 1;
    const Vector<Int> last_column = load_integers(columns, i) - 1;
    const Vector<T> px = load(&x[i]) * load(&width[i]) - T(0.5);
    const Vector<T> py = load(&y[i]) * load(&height[i]) - T(0.5);
    // false for NaN as well, so that the conversion to integers is always defined
    const Vector<Int> inside = (px > T(-1)) & (px < load(&width[i])) & (py > T(-1)) &
                               (py < load(&height[i]));
    const Vector<T> zero = splat(T(0));
    const Vector<T> safe_x = select<T>(inside, px, zero), safe_y = select<T>(inside, py, zero);
    const Vector<Int> left = floor_of(safe_x), top = floor_of(safe_y);
    const Vector<T> fx = safe_x - __builtin_convertvector(left, Vector<T>);
    const Vector<T> fy = safe_y - __builtin_convertvector(top, Vector<T>);
    const Vector<Int> has_left = inside & (left >= 0), has_right = inside & (left < last_column);
    const Vector<Int> has_top = top >= 0, has_bottom = top < last_row;
    const Vector<Int> flags = (has_left & has_top & 1) | (has_right & has_top & 2) |
                              (has_left & has_bottom & 4) | (has_right & has_bottom & 8);
    const Vector<Int> token = load_integers(start, i) + top * (last_column + 1) + left;
    std::memcpy(&corners[i], &flags, sizeof(flags));
    std::memcpy(&pixel[i], &token, sizeof(token));
    store(&right[i], fx);
    store(&below[i], fy);
    const Vector<T> upper = load(&weight[i]) * (1 - fy), lower = load(&weight[i]) * fy;
    store(&top_left[i], (1 - fx) * upper);
    store(&top_right[i], fx * upper);
    store(&bottom_left[i], (1 - fx) * lower);
    store(&bottom_right[i], fx * lower);
  }

  DETR_METHODS_INLINE static Vector<Int> floor_of(Vector<T> x) {
    const Vector<Int> towards_zero = __builtin_convertvector(x, Vector<Int>);
    return towards_zero + (x < __builtin_convertvector(towards_zero, Vector<T>));
  }
};

// Call `visit(corner index, token offset, weight)` for each corner of point i on its map.
template <typename A, typename Visit>
DETR_METHODS_INLINE void for_corners(const SamplingPoints<A>& points, int64_t i, Visit visit) {
  const auto flags = points.corners[i];
  const int64_t columns = points.columns[i];
  if (flags == 15) {  // nearly always; without branches between the corners
    visit(0, int64_t(0), points.top_left[i]);
    visit(1, int64_t(1), points.top_right[i]);
    visit(2, columns, points.bottom_left[i]);
    visit(3, columns + 1, points.bottom_right[i]);
    return;
  }
  if (flags & 1) visit(0, int64_t(0), points.top_left[i]);
  if (flags & 2) visit(1, int64_t(1), points.top_right[i]);
  if (flags & 4) visit(2, columns, points.bottom_left[i]);
  if (flags & 8) visit(3, columns + 1, points.bottom_right[i]);
}

// Weighted sum of all corners for Count vectors of channels; `partial` channels of the last one.
template <int Count, bool Partial, typename T, typename A>
DETR_METHODS_INLINE void sample(const SamplingPoints<A>& points, const T* value, int64_t stride,
                                T* output, int64_t partial) {
  Vector<A> total[Count] = {};
  for (int64_t i = 0; i < points.count; ++i) {
    const int64_t token = points.pixel[i];
    for_corners(points, i, [&](int, int64_t offset, A weight) __attribute__((always_inline)) {
      const T* from = value + (token + offset) * stride;
      for (int j = 0; j < Count; ++j) {
        total[j] += weight * (Partial ? load_partial(from, partial) : load(from + j * lanes<A>));
      }
    });
  }
  for (int j = 0; j < Count; ++j) {
    if (Partial) {
      store_partial(output, total[j], partial);
    } else {
      store(output + j * lanes<A>, total[j]);
    }
  }
}

// The same for one channel, of which vectors would be empty but for one number.
template <typename T, typename A>
DETR_METHODS_INLINE void sample_one(const SamplingPoints<A>& points, const T* value, int64_t stride,
                                    T* output) {
  A total[4] = {};
  for (int64_t i = 0; i < points.count; ++i) {
    const int64_t token = points.pixel[i];
    for_corners(points, i, [&](int k, int64_t offset, A weight) __attribute__((always_inline)) {
      total[k] += weight * static_cast<A>(value[(token + offset) * stride]);
    });
  }
  *output = static_cast<T>((total[0] + total[1]) + (total[2] + total[3]));
}

template <typename T, typename C>
void deformable_forward(const DeformableShape& shape, const DeformableForward<T, C>& tensors,
                        int64_t begin, int64_t end) {
  using A = AccumulatorOf<T>;
  constexpr int width = lanes<A>;
  const int64_t stride = shape.heads * shape.channels, samples = shape.levels * shape.points;
  SamplingPoints<A> points(shape, 0, shape.levels);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t query = row % shape.queries, head = row / shape.queries % shape.heads;
    const int64_t image = row / (shape.queries * shape.heads);
    const int64_t place = (image * shape.queries + query) * shape.heads + head;
    const T* value = tensors.value + image * shape.tokens * stride + head * shape.channels;
    T* output = tensors.output + place * shape.channels;
    points.place(tensors.locations + place * samples * 2, tensors.weights + place * samples);
    int64_t c = 0;
    for (; c + 4 * width <= shape.channels; c += 4 * width) {
      sample<4, false>(points, value + c, stride, output + c, 0);
    }
    for (; c + 2 * width <= shape.channels; c += 2 * width) {
      sample<2, false>(points, value + c, stride, output + c, 0);
    }
    for (; c + width <= shape.channels; c += width) {
      sample<1, false>(points, value + c, stride, output + c, 0);
    }
    if (c + 1 == shape.channels) {
      sample_one(points, value + c, stride, output + c);
    } else if (c < shape.channels) {
      sample<1, true>(points, value + c, stride, output + c, shape.channels - c);
    }
  }
}

// For each corner of a point, the product of its value with the output gradient.
template <typename A>
struct Similarity {
  A at[4];
};

// One head's gradient of the values of one unit: rows of whole vectors, from `first_token` on.
template <typename A>
struct ValueGradient {
  A* rows;
  int64_t padded, first_token;
};

// Gradients of one query and head whose channels are Count whole vectors; zero stands for a number
// that is not known here.
template <int Count, typename T, typename A>
DETR_METHODS_INLINE void differentiate(const SamplingPoints<A>& points, const T* value,
                                       int64_t stride, const A* grad, int64_t channels,
                                       const ValueGradient<A>& target, Similarity<A>* similarity) {
  constexpr int width = lanes<A>;
  const int64_t whole = Count > 0 ? Count * width : channels / width * width;
  const int64_t padded = Count > 0 ? Count * width : target.padded;
  for (int64_t i = 0; i < points.count; ++i) {
    const int64_t token = points.pixel[i];
    Vector<A> dot[4] = {};
    for_corners(points, i, [&](int k, int64_t offset, A weight) __attribute__((always_inline)) {
      const T* from = value + (token + offset) * stride;
      A* to = target.rows + (token + offset - target.first_token) * padded;
      for (int64_t c = 0; c < whole; c += width) {
        const Vector<A> g = load(grad + c);
        dot[k] += g * load(from + c);
        store(to + c, load(to + c) + weight * g);
      }
      if (Count == 0 && whole < channels) {
        const Vector<A> g = load(grad + whole);  // zero behind the last channel
        dot[k] += g * load_partial(from + whole, channels - whole);
        store(to + whole, load(to + whole) + weight * g);
      }
    });
    four_sums<A>(dot, similarity[i].at);
  }
}

// The same for one channel.
template <typename T, typename A>
DETR_METHODS_INLINE void differentiate_one(const SamplingPoints<A>& points, const T* value,
                                           int64_t stride, A grad, const ValueGradient<A>& target,
                                           Similarity<A>* similarity) {
  for (int64_t i = 0; i < points.count; ++i) {
    const int64_t token = points.pixel[i];
    Similarity<A> dot = {};
    for_corners(points, i, [&](int k, int64_t offset, A weight) __attribute__((always_inline)) {
      dot.at[k] = grad * static_cast<A>(value[(token + offset) * stride]);
      target.rows[(token + offset - target.first_token) * target.padded] += weight * grad;
    });
    similarity[i] = dot;
  }
}

// From each corner's similarity with the output gradient to the gradients of point i.
template <typename A, typename C>
DETR_METHODS_INLINE void finish_point(const SamplingPoints<A>& points, int64_t i,
                                      const Similarity<A>& similarity, C* grad_location,
                                      C* grad_weight) {
  const A* dot = similarity.at;
  const A fx = points.right[i], fy = points.below[i];
  const A upper = (1 - fx) * dot[0] + fx * dot[1];
  const A lower = (1 - fx) * dot[2] + fx * dot[3];
  const A along_x = (1 - fy) * (dot[1] - dot[0]) + fy * (dot[3] - dot[2]);
  *grad_weight = static_cast<C>((1 - fy) * upper + fy * lower);
  grad_location[0] = static_cast<C>(points.weight[i] * points.width[i] * along_x);
  grad_location[1] = static_cast<C>(points.weight[i] * points.height[i] * (lower - upper));
}

template <typename T, typename C>
void deformable_backward(const DeformableShape& shape, const DeformableBackward<T, C>& tensors,
                         int64_t groups, int64_t begin, int64_t end) {
  using A = AccumulatorOf<T>;
  const int64_t stride = shape.heads * shape.channels, samples = shape.levels * shape.points;
  const int64_t padded =
      shape.channels == 1 ? 1 : (shape.channels + lanes<A> - 1) / lanes<A> * lanes<A>;
  std::vector<A> grad(padded, A(0)), grad_value;
  std::vector<Similarity<A>> similarity(samples);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t group = unit % groups, head = unit / groups % shape.heads;
    const int64_t image = unit / (groups * shape.heads);
    const int64_t first = group * shape.levels / groups, last = (group + 1) * shape.levels / groups;
    const int64_t first_token = shape.start[first];
    const int64_t tokens = (last < shape.levels ? shape.start[last] : shape.tokens) - first_token;
    const T* value = tensors.value + image * shape.tokens * stride + head * shape.channels;
    SamplingPoints<A> points(shape, first, last);
    grad_value.assign(tokens * padded, A(0));
    const ValueGradient<A> sums{grad_value.data(), padded, first_token};
    for (int64_t query = 0; query < shape.queries; ++query) {
      const int64_t place = (image * shape.queries + query) * shape.heads + head;
      const int64_t sample = place * samples + first * shape.points;
      points.place(tensors.locations + sample * 2, tensors.weights + sample);
      for (int64_t c = 0; c < shape.channels; ++c) {
        grad[c] = static_cast<A>(tensors.grad_output[place * shape.channels + c]);
      }
      const auto walk = [&](auto count) {
        differentiate<decltype(count)::value>(points, value, stride, grad.data(), shape.channels,
                                              sums, similarity.data());
      };
      if (shape.channels == 1) {
        differentiate_one(points, value, stride, grad[0], sums, similarity.data());
      } else if (shape.channels == lanes<A>) {
        walk(std::integral_constant<int, 1>());
      } else if (shape.channels == 2 * lanes<A>) {
        walk(std::integral_constant<int, 2>());
      } else if (shape.channels == 4 * lanes<A>) {
        walk(std::integral_constant<int, 4>());
      } else {
        walk(std::integral_constant<int, 0>());
      }
      for (int64_t i = 0; i < points.count; ++i) {
        finish_point(points, i, similarity[i], tensors.grad_locations + (sample + i) * 2,
                     tensors.grad_weights + sample + i);
      }
    }
    T* target = tensors.grad_value + (image * shape.tokens + first_token) * stride +
                head * shape.channels;
    for (int64_t token = 0; token < tokens; ++token) {
      for (int64_t c = 0; c < shape.channels; ++c) {
        target[token * stride + c] = static_cast<T>(grad_value[token * padded + c]);
      }
    }
  }
}

#define DETR_METHODS_INSTANTIATE(T, C)                                                          \
  template void deformable_forward<T, C>(const DeformableShape&, const DeformableForward<T, C>&, \
                                         int64_t, int64_t);                                     \
  template void deformable_backward<T, C>(const DeformableShape&,                               \
                                          const DeformableBackward<T, C>&, int64_t, int64_t,    \
                                          int64_t);
DETR_METHODS_INSTANTIATE(float, float)
DETR_METHODS_INSTANTIATE(double, double)
DETR_METHODS_INSTANTIATE(c10::BFloat16, float)
DETR_METHODS_INSTANTIATE(c10::BFloat16, c10::BFloat16)
DETR_METHODS_INSTANTIATE(c10::Half, float)
DETR_METHODS_INSTANTIATE(c10::Half, c10::Half)
#undef DETR_METHODS_INSTANTIATE

}  // namespace DETR_METHODS_CAPABILITY
}  // namespace detr_methods
