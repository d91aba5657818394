// Linear sum assignment on the CPU: checks, allocation, parallel loop over all problems.
#include "assignment_solver.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <sstream>
#include <vector>

namespace detr_methods {
namespace {

// All leading dimensions count as one, the layers. What images own stands one after the other.
struct Batch {
  struct Image {
    int64_t targets, first_target, matches, first_match;
  };

  int64_t layers = 1, queries, all_targets, all_matches = 0, largest = 0;
  std::vector<Image> images;

  Batch(const at::Tensor& costs, at::IntArrayRef sizes)
      : queries(costs.size(-2)), all_targets(costs.size(-1)) {
    for (int64_t size : costs.sizes().slice(0, costs.dim() - 2)) layers *= size;
    int64_t target = 0;
    for (int64_t size : sizes) {
      TORCH_CHECK_VALUE(size >= 0 && size <= all_targets - target,
                        "sizes do not fit the columns of costs");
      images.push_back({size, target, std::min(queries, size), all_matches});
      target += size;
      all_matches += images.back().matches;
      largest = std::max(largest, size);
    }
    TORCH_CHECK_VALUE(target == all_targets, "sizes and costs differ in their targets");
  }

  int64_t problems() const { return layers * static_cast<int64_t>(images.size()); }
};

// Solve one image's problem in one layer; false if a cost is not a finite number.
template <typename T>
bool solve(AssignmentSolver& solver, const Batch& batch, int64_t problem, const T* costs,
           std::vector<int64_t>& target_of, int64_t* rows, int64_t* columns) {
  const int64_t images = static_cast<int64_t>(batch.images.size());
  const int64_t layer = problem / images;
  const Batch::Image& image = batch.images[problem % images];
  if (image.matches == 0) return true;
  const T* from = costs + layer * batch.queries * batch.all_targets + image.first_target;
  rows += layer * batch.all_matches + image.first_match;
  columns += layer * batch.all_matches + image.first_match;
  if (batch.queries <= image.targets) {
    if (!solver.load(from, batch.queries, image.targets, batch.all_targets, 1)) return false;
    solver.solve();
    solver.for_matches([&](int64_t query, int64_t target) {
      rows[query] = query;
      columns[query] = target;
    });
    return true;
  }
  if (!solver.load(from, image.targets, batch.queries, 1, batch.all_targets)) return false;
  solver.solve();
  std::fill(target_of.begin(), target_of.end(), -1);
  solver.for_matches([&](int64_t target, int64_t query) { target_of[query] = target; });
  for (int64_t query = 0; query < batch.queries; ++query) {
    if (target_of[query] < 0) continue;
    *rows++ = query;
    *columns++ = target_of[query];
  }
  return true;
}

// Raise the error about the first cost that is not finite or too large, image by image.
template <typename T>
void refuse(const Batch& batch, const T* costs, at::IntArrayRef shape) {
  for (size_t b = 0; b < batch.images.size(); ++b) {
    const Batch::Image& image = batch.images[b];
    for (int64_t row = 0; row < batch.layers * batch.queries; ++row) {
      for (int64_t column = 0; column < image.targets; ++column) {
        const double cost = costs[row * batch.all_targets + image.first_target + column];
        if (std::abs(cost) <= largest_cost) continue;
        std::ostringstream index;
        int64_t block = batch.layers * batch.queries, rest = row;
        for (int64_t size : shape.slice(0, shape.size() - 1)) {
          block /= size;
          index << rest / block << ", ";
          rest %= block;
        }
        TORCH_CHECK_VALUE(false, "costs of image ", b, " hold ", cost, " at index (", index.str(),
                          column, "), expected ",
                          std::isfinite(cost) ? "magnitudes up to 1e300" : "finite numbers");
      }
    }
  }
}

template <typename T>
void solve_all(const Batch& batch, const at::Tensor& costs, at::Tensor& packed) {
  const T* from = costs.const_data_ptr<T>();
  int64_t* rows = packed.mutable_data_ptr<int64_t>();
  int64_t* columns = rows + batch.layers * batch.all_matches;
  const int64_t smaller = std::min(batch.queries, batch.largest);
  const int64_t larger = std::max(batch.queries, batch.largest);
  // with fewer costs it takes longer to wake the other threads than to solve them here
  const int64_t workers =
      costs.numel() <= 16384 ? 1 : std::min<int64_t>(at::get_num_threads(), batch.problems());
  std::atomic<int64_t> next{0};
  std::atomic<bool> good{true};
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    AssignmentSolver solver(smaller, larger);
    std::vector<int64_t> target_of(batch.queries);
    for (int64_t problem; (problem = next++) < batch.problems();) {
      if (!solve(solver, batch, problem, from, target_of, rows, columns)) good = false;
    }
  });
  if (!good) refuse(batch, from, costs.sizes());
}

at::Tensor linear_sum_assignment(const at::Tensor& costs, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(costs.dim() >= 2, "costs need at least 2 dimensions");
  TORCH_CHECK_TYPE(at::isFloatingType(costs.scalar_type()), "costs are not floating");
  const Batch batch(costs, sizes);
  std::vector<int64_t> shape(costs.sizes().begin(), costs.sizes().end() - 1);
  shape.insert(shape.begin(), 2);
  shape.back() = batch.all_matches;
  at::Tensor packed = at::empty(shape, costs.options().dtype(at::kLong));
  if (packed.numel() == 0) return packed;
  if (costs.scalar_type() == at::kDouble) {
    solve_all<double>(batch, costs.contiguous(), packed);
  } else {  // float holds all narrower types exactly
    solve_all<float>(batch, costs.to(at::kFloat).contiguous(), packed);
  }
  return packed;
}

}  // namespace

TORCH_LIBRARY_IMPL(detr_methods, CPU, library) {
  library.impl("linear_sum_assignment", linear_sum_assignment);
}

}  // namespace detr_methods
