// Loops over short runs: a 7x7 plane is 49 elements, three vectors and one element.
#pragma once

#include "cpu.h"

namespace tempops {

constexpr int64_t kLanes = 16;  // elements of a step; one AVX-512 vector of floats

// Where the frames of a clip are: what a lambda copies in place of a Clip with its Tensor.
template <class scalar>
struct Frames {
  scalar* data;
  int64_t sn, st;

  explicit Frames(const Clip& clip) : data(clip.data<scalar>()), sn(clip.sn), st(clip.st) {}

  TEMPOPS_INLINE scalar* operator()(int64_t n, int64_t t) const {
    return data + n * sn + t * st;
  }
};

// Calls f(i) for all i in [0, n), some of them twice, in steps that vectorise without a remainder: the last step
// reaches back where n is no multiple. So f must give the same result the second time. Before the step that begins at i
// comes hint(i).
template <class Hint, class F>
TEMPOPS_INLINE inline void each(int64_t n, const Hint& hint, const F& f) {
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) {
    hint(i);
    _Pragma("omp simd") for (int64_t lane = 0; lane < kLanes; ++lane) f(i + lane);
  }
  if (n % kLanes == 0) return;
  hint(n / kLanes * kLanes);
  if (n >= kLanes) {
    _Pragma("omp simd") for (int64_t lane = 0; lane < kLanes; ++lane) f(n - kLanes + lane);
  } else {
    for (int64_t i = 0; i < n; ++i) f(i);
  }
}

template <class F>
TEMPOPS_INLINE inline void each(int64_t n, const F& f) {
  each(n, [](int64_t) TEMPOPS_INLINE {}, f);
}

}  // namespace tempops
