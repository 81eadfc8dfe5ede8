// Loops over short runs: a 7x7 plane is 49 elements, three vectors and one element.
#pragma once

#include "cpu.h"

namespace tempops {

constexpr int64_t kLanes = 16;  // elements of a step; one AVX-512 vector of floats

// How far a loop fetches ahead of itself what it reads or writes, 1 KiB: the short rows of a block end before the
// processor has foreseen them.
template <class scalar>
constexpr int64_t kAhead = 1024 / sizeof(scalar);

template <class scalar>
TEMPOPS_INLINE inline void fetch_to_read(const scalar* next) {
  __builtin_prefetch(next + kAhead<scalar>);
}
template <class scalar>
TEMPOPS_INLINE inline void fetch_to_write(const scalar* next) {
  __builtin_prefetch(next + kAhead<scalar>, 1);
}

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

// Elements of a step over tensors of a dtype. A loop of 16 steps over 16-bit elements would become one of half vectors.
template <class scalar>
constexpr int64_t lanes_of = sizeof(scalar) == 2 ? 2 * kLanes : kLanes;

// Calls f(i) for all i in [0, n), some of them twice, in steps that vectorise without a remainder: the last step
// reaches back where n is no multiple. So f must give the same result the second time. Before the step that begins at i
// comes hint(i).
template <int64_t lanes = kLanes, class Hint, class F>
TEMPOPS_INLINE inline void each(int64_t n, const Hint& hint, const F& f) {
  for (int64_t i = 0; i + lanes <= n; i += lanes) {
    hint(i);
    _Pragma("omp simd") for (int64_t lane = 0; lane < lanes; ++lane) f(i + lane);
  }
  if (n % lanes == 0) return;
  if (n >= lanes) {
    hint(n / lanes * lanes);
    _Pragma("omp simd") for (int64_t lane = 0; lane < lanes; ++lane) f(n - lanes + lane);
  } else if constexpr (lanes > kLanes) {
    each<lanes / 2>(n, hint, f);
  } else {
    hint(0);
    for (int64_t i = 0; i < n; ++i) f(i);
  }
}

template <int64_t lanes = kLanes, class F>
TEMPOPS_INLINE inline void each(int64_t n, const F& f) {
  each<lanes>(n, [](int64_t) TEMPOPS_INLINE {}, f);
}

}  // namespace tempops
