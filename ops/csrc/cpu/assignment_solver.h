// One linear sum assignment: shortest augmenting paths with dual variables, for rows <= columns.
//
// Rows enter one after the other. A row's search starts at distance 0 and visits rows in the order
// of their distance: from a visited row over a taken column to the row that holds it, until some
// free column is nearest. A taken column has a price, a free one has none, so that each row needs
// only its nearest free column and the few taken ones: the search never walks over all columns.
//
// Which of several optimal assignments comes out is part of the contract (that of SciPy, Crouse's
// variant of the algorithm): it follows from the order of rows, from the order of operations in
// `reduced`, and from the rules for equal distances in `nearest_taken` and `free_column`.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

namespace detr_methods {

// Beyond this magnitude sums of costs could overflow.
constexpr double largest_cost = 1e300;

class AssignmentSolver {
 public:
  // Scratch for problems of at most `rows` x `columns`, rows <= columns.
  AssignmentSolver(int64_t rows, int64_t columns)
      : costs_(std::make_unique_for_overwrite<double[]>(rows * padded(columns))),
        block_lowest_(rows * padded(padded(columns) / block)),
        taken_costs_(rows * padded(rows)),
        price_(padded(rows)),
        distance_(padded(rows)),
        column_of_(rows),
        holder_(rows),
        changed_(rows),
        rows_state_(rows),
        order_(columns),
        position_(columns) {
    visits_.reserve(rows);
    moves_.reserve(rows);
  }

  // Take the costs source[row * row_stride + column * column_stride]; false if one is not finite or
  // too large, and then there is nothing to solve.
  template <typename T>
  bool load(const T* source, int64_t rows, int64_t columns, int64_t row_stride,
            int64_t column_stride) {
    rows_ = rows;
    columns_ = columns;
    stride_ = padded(columns);
    block_stride_ = padded(stride_ / block);
    taken_stride_ = padded(rows);
    std::fill_n(block_lowest_.begin(), rows * block_stride_, infinity);
    Mask good = ~Mask{};
    for (int64_t first = 0; first < columns; first += block) {
      const T* from = source + first * column_stride;
      for (int64_t row = 0; row < rows; ++row, from += row_stride) {
        good &= first + block <= columns
                    ? load_block(from, column_stride, block, row, first)
                    : load_block(from, column_stride, columns - first, row, first);
      }
    }
    return good[0] && good[1];
  }

  void solve() {
    std::fill(price_.begin(), price_.end(), -infinity);
    std::fill_n(rows_state_.begin(), rows_, Row{});
    for (int64_t i = 0; i < columns_; ++i) order_[i] = position_[i] = columns_ - 1 - i;
    for (taken_ = 0; taken_ < rows_; ++taken_) augment(taken_);
  }

  // Call `use(row, column)` for each row and its column, in no order.
  template <typename Use>
  void for_matches(Use use) const {
    for (int64_t slot = 0; slot < rows_; ++slot) use(holder_[slot], column_of_[slot]);
  }

 private:
  static constexpr double infinity = std::numeric_limits<double>::infinity();
  typedef double Vector __attribute__((vector_size(16)));
  typedef int64_t Mask __attribute__((vector_size(16)));
  static constexpr int64_t lanes = 2, block = 8;  // a block is a cache line

  struct Row {
    double dual = 0;
    int64_t gathered = 0;       // so many of its costs stand in taken_costs_
    double lowest = -infinity;  // of its free columns
  };

  // A row that the search has reached.
  struct Visit {
    int64_t row;
    double distance;
    int64_t slot;  // over which it was reached, the one that it holds
    double price;  // of that slot
    double nearest_free;
  };

  struct Move {
    int64_t column, place;
  };

  static int64_t padded(int64_t count) { return (count + block - 1) / block * block; }

  static Vector load_vector(const double* from) {
    Vector result;
    std::memcpy(&result, from, sizeof(result));
    return result;
  }

  static Vector min(Vector a, Vector b) { return a < b ? a : b; }

  // The lowest of `count` numbers, one or more whole blocks.
  static double lowest_of(const double* from, int64_t count) {
    Vector lowest[block / lanes];
    for (int64_t k = 0; k < block / lanes; ++k) lowest[k] = load_vector(from + k * lanes);
    for (int64_t i = block; i < count; i += block) {
      for (int64_t k = 0; k < block / lanes; ++k) {
        lowest[k] = min(load_vector(from + i + k * lanes), lowest[k]);
      }
    }
    return lowest_of(lowest);
  }

  static double lowest_of(const Vector (&parts)[block / lanes]) {
    const Vector all = min(min(parts[0], parts[1]), min(parts[2], parts[3]));
    return std::min(all[0], all[1]);
  }

  // Where `value` stands first, in whole blocks from `from` on; `end` if nowhere.
  static int64_t find(const std::vector<double>& values, int64_t from, int64_t end, double value) {
    for (; from < end && from % block != 0; ++from) {
      if (values[from] == value) return from;
    }
    for (; from < end; from += block) {
      Mask equal = {};
      for (int64_t k = 0; k < block; k += lanes) equal |= load_vector(&values[from + k]) == value;
      if (!(equal[0] | equal[1])) continue;
      while (values[from] != value) ++from;
      return std::min(from, end);
    }
    return end;
  }

  // Copy a block of a row's costs, `count` that exist and infinite ones; which are acceptable.
  template <typename T>
  __attribute__((always_inline)) Mask load_block(const T* from, int64_t stride, int64_t count,
                                                 int64_t row, int64_t first) {
    double* to = &costs_[row * stride_ + first];
    Mask good = ~Mask{};
    Vector parts[block / lanes];
    for (int64_t k = 0; k < block; k += lanes) {
      const Vector x = {k < count ? static_cast<double>(from[k * stride]) : 0.0,
                        k + 1 < count ? static_cast<double>(from[(k + 1) * stride]) : 0.0};
      good &= (x <= largest_cost) & (x >= -largest_cost);
      parts[k / lanes] = Vector{k < count ? x[0] : infinity, k + 1 < count ? x[1] : infinity};
    }
    std::memcpy(to, parts, sizeof(parts));
    block_lowest_[row * block_stride_ + first / block] = lowest_of(parts);
    return good;
  }

  // Length of the way to a column with this price over a visited row.
  template <typename T>
  static T reduced(double distance, T cost, double dual, T price) {
    return ((distance + cost) - dual) - price;
  }

  // Give `start`, the row after all that have a column, a column too.
  void augment(int64_t start) {
    std::fill_n(distance_.begin(), padded(taken_), infinity);
    visits_.clear();
    visits_.push_back({start, 0, -1, 0, 0});
    double free_distance = infinity;
    while (true) {
      Visit& visit = visits_.back();
      Row& row = rows_state_[visit.row];
      update_row(row, visit.row);
      visit.nearest_free = reduced(visit.distance, row.lowest, row.dual, 0.0);
      free_distance = std::min(free_distance, visit.nearest_free);
      const double taken_distance = relax(visit);
      if (free_distance <= taken_distance) break;
      const int64_t slot = nearest_taken(taken_distance);
      visits_.push_back({holder_[slot], taken_distance, slot, price_[slot], 0});
      distance_[slot] = infinity;  // with this price it stays so
      price_[slot] = -infinity;
    }
    column_of_[taken_] = free_column(free_distance);
    flip_path(column_of_[taken_], free_distance);
    update_duals(free_distance);
    restore_order();
  }

  // Move the costs of columns taken since the row's last visit from its free to its taken ones.
  void update_row(Row& row, int64_t index) {
    double* costs = &costs_[index * stride_];
    double* lowest = &block_lowest_[index * block_stride_];
    double* taken_costs = &taken_costs_[index * taken_stride_];
    int64_t changed = 0;
    for (; row.gathered < taken_; ++row.gathered) {  // no branches: they would be unpredictable
      const int64_t column = column_of_[row.gathered];
      const double cost = costs[column];
      taken_costs[row.gathered] = cost;
      costs[column] = infinity;
      changed_[changed] = column / block;
      changed += cost == lowest[column / block];
    }
    for (int64_t i = 0; i < changed; ++i) {
      lowest[changed_[i]] = lowest_of(costs + changed_[i] * block, block);
    }
    if (changed > 0 || row.lowest == -infinity) row.lowest = lowest_of(lowest, block_stride_);
  }

  // Shorten the ways to the taken columns over a row; the shortest of all.
  double relax(const Visit& visit) {
    const double* costs = &taken_costs_[visit.row * taken_stride_];
    const double dual = rows_state_[visit.row].dual;
    Vector lowest[block / lanes];
    for (Vector& part : lowest) part = Vector{} + infinity;
    for (int64_t i = 0; i < taken_; i += block) {
      for (int64_t k = 0; k < block / lanes; ++k) {
        const int64_t slot = i + k * lanes;
        const Vector way = reduced(visit.distance, load_vector(costs + slot), dual,
                                   load_vector(&price_[slot]));
        const Vector shortest = min(way, load_vector(&distance_[slot]));
        std::memcpy(&distance_[slot], &shortest, sizeof(shortest));
        lowest[k] = min(shortest, lowest[k]);
      }
    }
    return lowest_of(lowest);
  }

  // The taken column at this distance; of several the one that comes first in `order_`.
  int64_t nearest_taken(double distance) {
    int64_t best = find(distance_, 0, taken_, distance);
    int64_t other = find(distance_, best + 1, taken_, distance);
    if (other < taken_) replay_order();
    for (; other < taken_; other = find(distance_, other + 1, taken_, distance)) {
      if (position_[column_of_[other]] < position_[column_of_[best]]) best = other;
    }
    return best;
  }

  // The free column at this distance; of several the one that comes last in `order_`.
  int64_t free_column(double distance) {
    int64_t best = -1;
    for (const Visit& visit : visits_) {
      if (visit.nearest_free != distance) continue;
      for_free(visit, distance, [&](int64_t column) {
        if (best >= 0 && column != best) replay_order();
        if (best < 0 || position_[column] > position_[best]) best = column;
        return column + 1 < static_cast<int64_t>(visits_.size());  // the others never change places
      });
    }
    return best;
  }

  // Call `use(column)` for the visited row's free columns at this distance while it returns true.
  template <typename Use>
  void for_free(const Visit& visit, double distance, Use use) const {
    const double* costs = &costs_[visit.row * stride_];
    const double* lowest = &block_lowest_[visit.row * block_stride_];
    for (int64_t first = 0; first < columns_; first += block) {
      if (over(visit, lowest[first / block], 0.0) != distance) continue;
      for (int64_t column = first; column < first + block; ++column) {
        if (over(visit, costs[column], 0.0) == distance && !use(column)) return;
      }
    }
  }

  // The order that decides between equal distances: the columns backwards, and where the search
  // has passed over one, the last of the list took its place. Brought up to date when it is needed.
  void replay_order() {
    while (moves_.size() + 1 < visits_.size()) {
      const int64_t last = columns_ - 1 - static_cast<int64_t>(moves_.size());
      const int64_t place = position_[column_of_[visits_[moves_.size() + 1].slot]];
      moves_.push_back({order_[last], place});
      order_[place] = order_[last];
      position_[order_[place]] = place;
    }
  }

  void restore_order() {
    for (const Move& move : moves_) {
      order_[move.place] = columns_ - 1 - move.place;
      position_[move.column] = columns_ - 1 - move.column;
    }
    moves_.clear();
  }

  // Move the columns along the path one row on, from its free end to the row that it started at.
  void flip_path(int64_t free_column, double free_distance) {
    size_t step = 0;
    while (over(visits_[step], costs_[visits_[step].row * stride_ + free_column], 0.0) !=
           free_distance) {
      ++step;
    }
    holder_[taken_] = visits_[step].row;
    while (step > 0) {
      const Visit& visit = visits_[step];
      step = 0;
      while (over(visits_[step], taken_costs_[visits_[step].row * taken_stride_ + visit.slot],
                  visit.price) != visit.distance) {
        ++step;
      }
      holder_[visit.slot] = visits_[step].row;
    }
  }

  double over(const Visit& visit, double cost, double price) const {
    return reduced(visit.distance, cost, rows_state_[visit.row].dual, price);
  }

  void update_duals(double free_distance) {
    for (const Visit& visit : visits_) {
      const double change = free_distance - visit.distance;
      rows_state_[visit.row].dual += change;
      if (visit.slot >= 0) price_[visit.slot] = visit.price - change;
    }
    price_[taken_] = 0;
  }

  int64_t rows_ = 0, columns_ = 0, stride_ = 0, taken_stride_ = 0;
  int64_t taken_ = 0;  // columns that have a row; they are counted in slots, in the order of taking
  int64_t block_stride_ = 0;
  // rows x columns, infinite behind the last one; a visit makes those infinite that were taken
  std::unique_ptr<double[]> costs_;
  std::vector<double> block_lowest_;  // rows x blocks: the lowest of each block of costs_
  std::vector<double> taken_costs_;   // rows x slots, filled when a row is visited
  std::vector<double> price_;         // per slot; -infinity once the search has passed over it
  std::vector<double> distance_;      // per slot, from the row that the search started at
  std::vector<int64_t> column_of_;    // per slot
  std::vector<int64_t> holder_;       // per slot: the row that has its column
  std::vector<int64_t> changed_;      // blocks, within update_row
  std::vector<Row> rows_state_;
  std::vector<Visit> visits_;
  std::vector<int64_t> order_, position_;  // see replay_order; each is the other's inverse
  std::vector<Move> moves_;                // that lead from the initial order to the present one
};

}  // namespace detr_methods
