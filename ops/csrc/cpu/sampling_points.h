// Where deformable attention samples, and what; compiled once for each target.
#include "deformable_attention.h"

namespace detr_methods {
namespace DETR_METHODS_CAPABILITY {

// What one head has of consecutive queries lies apart, where the processor does not foresee it.
// This many queries, or tokens, pass between a row's fetching and its use.
constexpr int64_t kAhead = 8;

// Have `count` numbers from `from` on in the cache soon, to be written if Write is 1.
template <int Write, typename T>
DETR_METHODS_INLINE void fetch(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(from + i, Write);
}

// The sampling points of one query and head, all levels of [first, last) in a row, padded to whole
// vectors; tokens count from level `first` on. One instance serves a thread; only `place` changes
// it.
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
      start[i] = static_cast<Int>(shape.start[level] - shape.start[first]);
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

}  // namespace DETR_METHODS_CAPABILITY
}  // namespace detr_methods
