// Tensor cores, in place of CUDA's header: the same interface, computed by plain loops in float32. Every lane holds all
// of a factor and its share of a sum. tf32 is not rounded.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "cuda_runtime.h"

using __half = torch::headeronly::Half;
using __nv_bfloat16 = torch::headeronly::BFloat16;

namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };
namespace precision {
struct tf32 {};
}  // namespace precision

inline float __float_to_tf32(float value) {
  return value;
}

// A factor: element (i, j) is x[i * columns + j].
template <class Use, int m, int n, int k, class T, class Layout = void>
struct fragment {
  static constexpr int rows = std::is_same_v<Use, matrix_a> ? m : k;
  static constexpr int columns = std::is_same_v<Use, matrix_a> ? k : n;
  static constexpr int num_elements = rows * columns;
  float x[num_elements];
};

// A sum: lane l holds elements [l * num_elements, (l + 1) * num_elements), row by row.
template <int m, int n, int k, class T>
struct fragment<accumulator, m, n, k, T, void> {
  static constexpr int num_elements = m * n / 32;
  T x[num_elements];
};

template <class Use, int m, int n, int k, class T, class Layout, class Memory>
void load_matrix_sync(fragment<Use, m, n, k, T, Layout>& to, const Memory* from, unsigned pitch) {
  constexpr bool by_rows = std::is_same_v<Layout, row_major>;
  for (int i = 0; i < to.rows; ++i)
    for (int j = 0; j < to.columns; ++j)
      to.x[i * to.columns + j] = static_cast<float>(by_rows ? from[i * pitch + j] : from[j * pitch + i]);
}

template <int m, int n, int k, class T>
void fill_fragment(fragment<accumulator, m, n, k, T>& sum, T value) {
  for (T& x : sum.x) x = value;
}

template <int m, int n, int k, class T, class A, class B>
void mma_sync(fragment<accumulator, m, n, k, T>& sum, const A& a, const B& b,
              const fragment<accumulator, m, n, k, T>& start) {
  for (int e = 0; e < sum.num_elements; ++e) {
    const int at = cuda_sim::lane() * sum.num_elements + e;
    sum.x[e] = start.x[e];
    for (int i = 0; i < k; ++i) sum.x[e] += a.x[at / n * k + i] * b.x[i * n + at % n];
  }
}

template <int m, int n, int k, class T>
void store_matrix_sync(T* to, const fragment<accumulator, m, n, k, T>& sum, unsigned pitch, layout_t layout) {
  for (int e = 0; e < sum.num_elements; ++e) {
    const int at = cuda_sim::lane() * sum.num_elements + e, i = at / n, j = at % n;
    to[layout == mem_row_major ? i * pitch + j : j * pitch + i] = sum.x[e];
  }
}

}  // namespace nvcuda::wmma
