// Products of small matrices that lie in a core's cache, the core of the attention kernels.

namespace detr_methods {
namespace DETR_METHODS_CAPABILITY {

// Rows of a result that stay in registers, two vectors each; 16 registers are few.
constexpr int tile_rows = DETR_METHODS_VECTOR_BYTES == 64 ? 8 : 4;

// A matrix, `row` and `column` elements from one row or column to the next.
template <typename A>
struct Left {
  const A* data;
  int64_t row, column;
};

template <int Columns, bool Accumulate, typename A>
DETR_METHODS_INLINE void multiply_tile(Left<A> left, const A* right, int64_t right_row, A* result,
                                       int64_t result_row, int64_t depth) {
  Vector<A> total[tile_rows][Columns];
  for (int i = 0; i < tile_rows; ++i) {
    for (int j = 0; j < Columns; ++j) {
      total[i][j] = Accumulate ? load(result + i * result_row + j * lanes<A>) : Vector<A>{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vector<A> row[Columns];
    for (int j = 0; j < Columns; ++j) row[j] = load(right + k * right_row + j * lanes<A>);
    for (int i = 0; i < tile_rows; ++i) {
      const A factor = left.data[i * left.row + k * left.column];
      for (int j = 0; j < Columns; ++j) total[i][j] += factor * row[j];
    }
  }
  for (int i = 0; i < tile_rows; ++i) {
    for (int j = 0; j < Columns; ++j) store(result + i * result_row + j * lanes<A>, total[i][j]);
  }
}

// result (rows x columns) = or += left (rows x depth) * right (depth x columns), the last two
// row-major. `rows` is a multiple of tile_rows, `columns` of a vector.
template <bool Accumulate, typename A>
void multiply(Left<A> left, const A* right, int64_t right_row, A* result, int64_t result_row,
              int64_t rows, int64_t columns, int64_t depth) {
  for (int64_t j = 0; j < columns; j += 2 * lanes<A>) {
    for (int64_t i = 0; i < rows; i += tile_rows) {
      const Left<A> part{left.data + i * left.row, left.row, left.column};
      A* to = result + i * result_row + j;
      if (j + 2 * lanes<A> <= columns) {
        multiply_tile<2, Accumulate>(part, right + j, right_row, to, result_row, depth);
      } else {
        multiply_tile<1, Accumulate>(part, right + j, right_row, to, result_row, depth);
      }
    }
  }
}

}  // namespace DETR_METHODS_CAPABILITY
}  // namespace detr_methods
