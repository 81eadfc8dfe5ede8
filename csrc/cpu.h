// What the CPU kernels share: threads, element conversion.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <new>
#include <type_traits>

#include "common.h"
#include "isa.h"

namespace tempops {

// Elements of work below which a second thread costs more than it brings.
constexpr int64_t kGrain = 16384;

// Runs body(begin, end) over [0, n) in parallel, compiled for the instruction set in use. `work` is the number of
// elements that one of the n items touches. The split depends on the number of threads: a result must not.
template <class Body>
void parallel(int64_t n, int64_t work, const Body& body) {
  if (n <= 0) return;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work));
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { run(body, begin, end); });
}

// A thread's scratch, aligned to a cache line: a vector load that straddles two lines costs twice.
template <class T>
struct CacheAligned {
  using value_type = T;
  T* allocate(std::size_t n) {
    return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64)));
  }
  void deallocate(T* pointer, std::size_t) {
    ::operator delete(pointer, std::align_val_t(64));
  }
  bool operator==(const CacheAligned&) const = default;
};
template <class T>
using Scratch = std::vector<T, CacheAligned<T>>;

// The type in which a dtype is added up: float64 for float64, else float32.
template <class scalar>
using acc_t = std::conditional_t<std::is_same_v<scalar, double>, double, float>;

TEMPOPS_INLINE inline float load(float v) {
  return v;
}
TEMPOPS_INLINE inline double load(double v) {
  return v;
}
TEMPOPS_INLINE inline float load(BFloat16 v) {
  return std::bit_cast<float>(static_cast<uint32_t>(v.x) << 16);
}
// Half to float in integer and float arithmetic that vectorises everywhere: the exponent is moved by a product with a
// power of two, except for subnormals, which are made by a subtraction.
TEMPOPS_INLINE inline float load(Half v) {
  const uint32_t bits = static_cast<uint32_t>(v.x) << 16;
  const uint32_t sign = bits & 0x80000000u, twice = bits + bits;
  const float normal = std::bit_cast<float>((twice >> 4) + 0x70000000u) * 0x1p-112f;
  const float subnormal = std::bit_cast<float>((twice >> 17) | 0x3f000000u) - 0.5f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(twice < 0x08000000u ? subnormal : normal));
}

// Rounds to the nearest, ties to even; NaN stays NaN.
template <class scalar>
TEMPOPS_INLINE inline scalar store(acc_t<scalar> v) {
  if constexpr (std::is_same_v<scalar, BFloat16>) {
    const uint32_t bits = std::bit_cast<uint32_t>(v);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return BFloat16(static_cast<uint16_t>(v != v ? 0x7fc0u : rounded), BFloat16::from_bits());
  } else if constexpr (std::is_same_v<scalar, Half>) {
    const uint32_t bits = std::bit_cast<uint32_t>(v), twice = bits + bits;
    const uint32_t bias = std::max(twice & 0xff000000u, 0x71000000u);
    const float scaled = (std::fabs(v) * 0x1p+112f) * 0x1p-110f;
    const uint32_t sum = std::bit_cast<uint32_t>(std::bit_cast<float>((bias >> 1) + 0x07800000u) + scaled);
    const uint32_t magnitude = ((sum >> 13) & 0x7c00u) + (sum & 0x0fffu);
    return Half(static_cast<uint16_t>(((bits & 0x80000000u) >> 16) | (twice > 0xff000000u ? 0x7e00u : magnitude)),
                Half::from_bits());
  } else {
    return v;
  }
}

}  // namespace tempops
