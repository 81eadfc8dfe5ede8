// Sums over runs of elements, in lanes.
#pragma once

#include <utility>

#include "lanes.h"

namespace tempops {

// The sum of a vector's elements, by halves: the compiler would add them one after the other.
template <class acc, int64_t lanes>
TEMPOPS_INLINE inline acc sum_of_lanes(const acc (&lane)[lanes]) {
  if constexpr (lanes == 4) {
    return (lane[0] + lane[2]) + (lane[1] + lane[3]);
  } else {
    acc half[lanes / 2];
    _Pragma("omp simd") for (int64_t i = 0; i < lanes / 2; ++i) half[i] = lane[i] + lane[i + lanes / 2];
    return sum_of_lanes(half);
  }
}

// sums[m] += what f(i, terms...) adds to terms[m], for all i in [0, n) and M <= 3: in lanes, which meet at the end.
template <int64_t lanes = kLanes, int M, class acc, class F>
TEMPOPS_INLINE inline void add_up(acc (&sums)[M], int64_t n, const F& f) {
  alignas(64) acc total[3][lanes] = {};
  const auto add = [&]<int64_t... step>(std::integer_sequence<int64_t, step...>, int64_t i, int64_t width)
                       TEMPOPS_INLINE {
    _Pragma("omp simd") for (int64_t lane = 0; lane < width; ++lane) {
      acc first = 0, second = 0, third = 0;  // written out: an array would keep the loop from being vectorised
      (f(i + step * lanes + lane, first, second, third), ...);
      total[0][lane] += first;
      if constexpr (M > 1) total[1][lane] += second;
      if constexpr (M > 2) total[2][lane] += third;
    }
  };
  constexpr int64_t kSteps = 4 * kLanes / lanes;
  int64_t i = 0;
  for (; i + kSteps * lanes <= n; i += kSteps * lanes) add(std::make_integer_sequence<int64_t, kSteps>(), i, lanes);
  for (; i + lanes <= n; i += lanes) add(std::make_integer_sequence<int64_t, 1>(), i, lanes);
  if (i < n) add(std::make_integer_sequence<int64_t, 1>(), i, n - i);
  for (int m = 0; m < M; ++m) sums[m] += sum_of_lanes(total[m]);
}

}  // namespace tempops
