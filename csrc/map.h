// Functions of elements over rows, by pairs where that is faster.
#pragma once

#include "lanes.h"

namespace tempops {

// to[i] = f(from[i]...) for all i in [0, n), with hint(i) before the step that begins at i. bfloat16 goes by pairs: the
// halves of 32 bits become floats and again bits without the shuffles that bring half a vector to a whole one.
template <class scalar, class Hint, class F, class... From>
TEMPOPS_INLINE inline void map(int64_t n, const Hint& hint, const F& f, scalar* to, const From*... from) {
  if constexpr (std::is_same_v<scalar, BFloat16>) {
    const auto half = [](const scalar* pair, int shift) TEMPOPS_INLINE {
      uint32_t bits;
      __builtin_memcpy(&bits, pair, sizeof bits);
      return load(scalar(static_cast<uint16_t>(bits >> shift), scalar::from_bits()));
    };
    const auto pairs_hint = [=](int64_t i) TEMPOPS_INLINE { hint(2 * i); };
    each(n / 2, pairs_hint, [=](int64_t i) TEMPOPS_INLINE {
      const uint32_t low = store<scalar>(f(half(from + 2 * i, 0)...)).x;
      const uint32_t high = store<scalar>(f(half(from + 2 * i, 16)...)).x;
      const uint32_t bits = low | high << 16;
      __builtin_memcpy(to + 2 * i, &bits, sizeof bits);
    });
    if (n % 2 == 1) to[n - 1] = store<scalar>(f(load(from[n - 1])...));
  } else {
    each<lanes_of<scalar>>(n, hint, [=](int64_t i) TEMPOPS_INLINE { to[i] = store<scalar>(f(load(from[i])...)); });
  }
}

}  // namespace tempops
