// Kernels of multi-scale deformable attention, compiled once for each target.
#include "deformable_attention.h"

namespace detr_methods {
namespace DETR_METHODS_CAPABILITY {

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

template <typename T>
void copy_values(const DeformableShape& shape, const T* first, int64_t begin, int64_t end,
                 T* copy) {
  const int64_t apart = shape.heads * shape.channels;
  for (int64_t token = begin; token < end; ++token) {
    const T* row = first + token * apart;
    if (token + kAhead < end) fetch<0>(row + kAhead * apart, shape.channels);
    std::copy_n(row, shape.channels, copy + token * shape.channels);
  }
}

template <typename T, typename C>
void deformable_forward(const DeformableShape& shape, const DeformableForward<T, C>& tensors,
                        int64_t begin, int64_t end) {
  using A = AccumulatorOf<T>;
  constexpr int width = lanes<A>;
  const int64_t stride = tensors.value.token, samples = shape.levels * shape.points;
  SamplingPoints<A> points(shape, 0, shape.levels);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t query = row % shape.queries, head = row / shape.queries % shape.heads;
    const int64_t image = row / (shape.queries * shape.heads);
    const int64_t place = (image * shape.queries + query) * shape.heads + head;
    const T* value =
        tensors.value.first + image * tensors.value.image + head * tensors.value.head;
    T* output = tensors.output + place * shape.channels;
    if (query + kAhead < shape.queries) {
      const int64_t next = place + kAhead * shape.heads;
      fetch<0>(tensors.locations + next * samples * 2, samples * 2);
      fetch<0>(tensors.weights + next * samples, samples);
      fetch<1>(tensors.output + next * shape.channels, shape.channels);
    }
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

// One head's gradient of the values of one unit: rows of whole vectors.
template <typename A>
struct ValueGradient {
  A* rows;
  int64_t padded;
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
      A* to = target.rows + (token + offset) * padded;
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
      target.rows[(token + offset) * target.padded] += weight * grad;
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

// Round one head's gradient and put it where it belongs, between those of the other heads.
template <typename T, typename A>
DETR_METHODS_INLINE void copy_rows(const ValueGradient<A>& sums, int64_t tokens, int64_t channels,
                                   T* target, int64_t apart) {
  for (int64_t token = 0; token < tokens; ++token) {
    T* row = target + token * apart;
    if (token + kAhead < tokens) fetch<1>(row + kAhead * apart, channels);
    for (int64_t c = 0; c < channels; ++c) {
      row[c] = static_cast<T>(sums.rows[token * sums.padded + c]);
    }
  }
}

// All points of one query and head, by the loop that fits the number of channels.
template <typename T, typename A>
DETR_METHODS_INLINE void differentiate_query(const SamplingPoints<A>& points,
                                             const T* value, int64_t stride, const A* grad,
                                             int64_t channels, const ValueGradient<A>& sums,
                                             Similarity<A>* similarity) {
  const auto walk = [&](auto count) {
    differentiate<decltype(count)::value>(points, value, stride, grad, channels, sums, similarity);
  };
  if (channels == 1) {
    differentiate_one(points, value, stride, grad[0], sums, similarity);
  } else if (channels == lanes<A>) {
    walk(std::integral_constant<int, 1>());
  } else if (channels == 2 * lanes<A>) {
    walk(std::integral_constant<int, 2>());
  } else if (channels == 4 * lanes<A>) {
    walk(std::integral_constant<int, 4>());
  } else {
    walk(std::integral_constant<int, 0>());
  }
}

// Levels [first, last) of one image and head: a unit of the backward pass.
struct DeformableUnit {
  int64_t image, head, first, last;
};

// Gradients of a unit's locations and weights, and the sums of those of its values.
template <typename T, typename C, typename A>
void differentiate_unit(const DeformableShape& shape, const DeformableBackward<T, C>& tensors,
                        const DeformableUnit& unit, const T* value, int64_t stride,
                        const ValueGradient<A>& sums) {
  const int64_t samples = shape.levels * shape.points;
  SamplingPoints<A> points(shape, unit.first, unit.last);
  std::vector<Similarity<A>> similarity(points.count);
  std::vector<A> grad(sums.padded, A(0));
  for (int64_t query = 0; query < shape.queries; ++query) {
    const int64_t place = (unit.image * shape.queries + query) * shape.heads + unit.head;
    const int64_t sample = place * samples + unit.first * shape.points;
    if (query + kAhead < shape.queries) {
      const int64_t row = place + kAhead * shape.heads;
      const int64_t next = row * samples + unit.first * shape.points;
      fetch<0>(tensors.locations + next * 2, points.count * 2);
      fetch<0>(tensors.weights + next, points.count);
      fetch<0>(tensors.grad_output + row * shape.channels, shape.channels);
      fetch<1>(tensors.grad_locations + next * 2, points.count * 2);
      fetch<1>(tensors.grad_weights + next, points.count);
    }
    points.place(tensors.locations + sample * 2, tensors.weights + sample);
    for (int64_t c = 0; c < shape.channels; ++c) {
      grad[c] = static_cast<A>(tensors.grad_output[place * shape.channels + c]);
    }
    differentiate_query(points, value, stride, grad.data(), shape.channels, sums,
                        similarity.data());
#pragma GCC ivdep
    for (int64_t i = 0; i < points.count; ++i) {
      finish_point(points, i, similarity[i], tensors.grad_locations + (sample + i) * 2,
                   tensors.grad_weights + sample + i);
    }
  }
}

template <typename T, typename C>
void deformable_backward(const DeformableShape& shape, const DeformableBackward<T, C>& tensors,
                         int64_t groups, int64_t begin, int64_t end) {
  using A = AccumulatorOf<T>;
  const int64_t apart = shape.heads * shape.channels;
  const int64_t padded =
      shape.channels == 1 ? 1 : (shape.channels + lanes<A> - 1) / lanes<A> * lanes<A>;
  std::vector<A> buffer;
  std::vector<T> copy;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t group = i % groups;
    const DeformableUnit unit{i / (groups * shape.heads), i / groups % shape.heads,
                              group * shape.levels / groups, (group + 1) * shape.levels / groups};
    const int64_t first_token = shape.start[unit.first];
    const int64_t tokens =
        (unit.last < shape.levels ? shape.start[unit.last] : shape.tokens) - first_token;
    const int64_t first_row =
        (unit.image * shape.tokens + first_token) * apart + unit.head * shape.channels;
    const T* value = tensors.value + first_row;
    const int64_t stride = shape.copies_values ? shape.channels : apart;
    if (shape.copies_values) {
      copy.resize(tokens * shape.channels);
      copy_values(shape, value, 0, tokens, copy.data());
      value = copy.data();
    }
    A* rows = nullptr;
    if constexpr (std::is_same_v<T, A>) {  // a single head's whole vectors are summed in place
      if (shape.heads == 1 && padded == shape.channels) rows = tensors.grad_value + first_row;
    }
    const bool in_place = rows != nullptr;
    if (!in_place) {
      buffer.resize(tokens * padded);
      rows = buffer.data();
    }
    std::fill_n(rows, tokens * padded, A(0));
    const ValueGradient<A> sums{rows, padded};
    differentiate_unit(shape, tensors, unit, value, stride, sums);
    if (!in_place) copy_rows(sums, tokens, shape.channels, tensors.grad_value + first_row, apart);
  }
}

template void copy_values(const DeformableShape&, const float*, int64_t, int64_t, float*);
template void copy_values(const DeformableShape&, const double*, int64_t, int64_t, double*);
template void copy_values(const DeformableShape&, const c10::BFloat16*, int64_t, int64_t,
                          c10::BFloat16*);
template void copy_values(const DeformableShape&, const c10::Half*, int64_t, int64_t, c10::Half*);

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
