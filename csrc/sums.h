// Sums over runs of elements, in lanes.
#pragma once

#include <utility>

#include "lanes.h"

namespace tempops {

// The sum of a vector's elements, by halves: the compiler would add them one after the other.
template <class acc>
TEMPOPS_INLINE inline acc sum_of_lanes(const acc (&lanes)[kLanes]) {
  acc half[kLanes / 2], quarter[kLanes / 4];
  _Pragma("omp simd") for (int64_t i = 0; i < kLanes / 2; ++i) half[i] = lanes[i] + lanes[i + kLanes / 2];
  _Pragma("omp simd") for (int64_t i = 0; i < kLanes / 4; ++i) quarter[i] = half[i] + half[i + kLanes / 4];
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

// sums[m] += what f(i, terms...) adds to terms[m], for all i in [0, n) and M <= 3: in lanes, which meet at the end.
template <int M, class acc, class F>
TEMPOPS_INLINE inline void add_up(acc (&sums)[M], int64_t n, const F& f) {
  alignas(64) acc lanes[3][kLanes] = {};
  const auto add = [&]<int64_t... step>(std::integer_sequence<int64_t, step...>, int64_t i,
                                        int64_t width) TEMPOPS_INLINE {
    _Pragma("omp simd") for (int64_t lane = 0; lane < width; ++lane) {
      acc first = 0, second = 0, third = 0;  // written out: an array would keep the loop from being vectorised
      (f(i + step * kLanes + lane, first, second, third), ...);
      lanes[0][lane] += first;
      if constexpr (M > 1) lanes[1][lane] += second;
      if constexpr (M > 2) lanes[2][lane] += third;
    }
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) add(std::make_integer_sequence<int64_t, 4>(), i, kLanes);
  for (; i + kLanes <= n; i += kLanes) add(std::make_integer_sequence<int64_t, 1>(), i, kLanes);
  if (i < n) add(std::make_integer_sequence<int64_t, 1>(), i, n - i);
  for (int m = 0; m < M; ++m) sums[m] += sum_of_lanes(lanes[m]);
}

}  // namespace tempops
