// Matrix products of plain loops: a tile of the result stays in registers while the summed dimension is walked.
#pragma once

#include "cpu.h"

namespace tempops {

// Rows and columns of a tile: two 64-byte registers of columns with AVX-512, of 32 bytes elsewhere.
template <class acc, bool wide>
struct Tile {
  static constexpr int rows = wide ? 8 : 6;
  static constexpr int columns = (wide ? 128 : 64) / sizeof(acc);
};

constexpr int64_t kSum = 32;          // terms added up in one go: sums of sums keep float32 as exact as a pairwise sum
constexpr int64_t kCached = 1 << 16;  // elements of B that stay in a processor's cache

// sum [rows][columns] += A B over `terms`: A(i, k) = a[i][k * a_step], B(k, j) = b[k * b_step + j].
template <int rows, int columns, class acc>
TEMPOPS_INLINE inline void multiply_add(acc (&sum)[rows][columns], const acc* const (&a)[rows], int64_t a_step,
                                        const acc* __restrict b, int64_t b_step, int64_t terms) {
  for (int64_t k = 0; k < terms; ++k) {
    _Pragma("GCC unroll 8") for (int i = 0; i < rows; ++i) {
      const acc factor = a[i][k * a_step];
      _Pragma("omp simd") for (int j = 0; j < columns; ++j) sum[i][j] += factor * b[k * b_step + j];
    }
  }
}

// C (+)= A B with C(i, j) = c[i * c_row + j * c_column], A(i, k) = a[i * a_row + k * a_step], B(k, j) = b[k * b_row +
// j].
template <int rows, int columns, class acc>
void product_of_tiles(acc* c, int64_t c_row, int64_t c_column, const acc* a, int64_t a_row, int64_t a_step,
                      const acc* b, int64_t b_row, int64_t M, int64_t N, int64_t K, bool accumulate) {
  const int64_t row_tiles = (M + rows - 1) / rows, panels = (N + columns - 1) / columns;
  const bool along_rows = K * N <= kCached;  // B is at hand: C is written in the order in which it lies
  const int64_t first_terms = std::min(kSum, K);
  parallel(row_tiles * panels, rows * columns * K, [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    std::vector<acc> padded;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t m = (along_rows ? item / panels : item % row_tiles) * rows;
      const int64_t n = (along_rows ? item % panels : item / row_tiles) * columns;
      const int64_t height = std::min<int64_t>(rows, M - m), width = std::min<int64_t>(columns, N - n);
      const acc* panel = b + n;
      int64_t panel_row = b_row;
      if (width < columns) {
        if (padded.empty()) {  // only the last panel is ever narrow
          padded.resize(K * columns);
          for (int64_t k = 0; k < K; ++k) std::copy(panel + k * b_row, panel + k * b_row + width, &padded[k * columns]);
        }
        panel = padded.data();
        panel_row = columns;
      }
      const acc* from[rows];
      for (int i = 0; i < rows; ++i) from[i] = a + std::min(m + i, M - 1) * a_row;
      acc first[rows][columns] = {};
      multiply_add(first, from, a_step, panel, panel_row, first_terms);
      acc* to = c + m * c_row + n * c_column;
      if (K == first_terms && height == rows && width == columns && c_column == 1 && !accumulate) {
        for (int i = 0; i < rows; ++i)
          for (int j = 0; j < columns; ++j) to[i * c_row + j] = first[i][j];
        continue;
      }
      acc total[rows][columns];
      for (int i = 0; i < rows; ++i)
        for (int j = 0; j < columns; ++j) total[i][j] = first[i][j];
      for (int64_t k = first_terms; k < K; k += kSum) {
        for (int i = 0; i < rows; ++i) from[i] = a + std::min(m + i, M - 1) * a_row + k * a_step;
        acc sum[rows][columns] = {};
        multiply_add(sum, from, a_step, panel + k * panel_row, panel_row, std::min(kSum, K - k));
        for (int i = 0; i < rows; ++i)
          for (int j = 0; j < columns; ++j) total[i][j] += sum[i][j];
      }
      for (int64_t i = 0; i < height; ++i)
        for (int64_t j = 0; j < width; ++j) {
          acc& element = to[i * c_row + j * c_column];
          element = accumulate ? element + total[i][j] : total[i][j];
        }
    }
  });
}

// The same, with the tile that suits the processor and N.
template <class acc>
void product(acc* c, int64_t c_row, int64_t c_column, const acc* a, int64_t a_row, int64_t a_step, const acc* b,
             int64_t b_row, int64_t M, int64_t N, int64_t K, bool accumulate = false) {
  using Narrow = Tile<acc, false>;
  using Wide = Tile<acc, true>;
  const bool wide = isa() == Isa::avx512;
  const auto run_tiles = wide && N > Narrow::columns ? product_of_tiles<Wide::rows, Wide::columns, acc>
                         : wide                      ? product_of_tiles<Wide::rows, Narrow::columns, acc>
                                                     : product_of_tiles<Narrow::rows, Narrow::columns, acc>;
  run_tiles(c, c_row, c_column, a, a_row, a_step, b, b_row, M, N, K, accumulate);
}

}  // namespace tempops
