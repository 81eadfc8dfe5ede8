// The sigmoid in loops that vectorise.
#pragma once

#include "cpu.h"

namespace tempops {

// exp for |x| <= 88, beyond which x is clamped; NaN stays NaN. x = n ln 2 + r, 2^n is made in the exponent bits, and
// exp(r) is a polynomial, fitted for |r| <= ln 2 / 2 by the least largest relative error: 3e-9, or 3e-6 where the
// result is rounded to 16 bits, which saves a fifth of the time.
template <bool narrow>
TEMPOPS_INLINE inline float exponential(float x) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves an integer in the low bits
  x = x < -87.f ? -87.f : x;
  x = x > 88.f ? 88.f : x;
  const float shifted = x * 1.44269504f + kRound, n = shifted - kRound;
  const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) + 127u) << 23);
  if constexpr (narrow) {
    const float r = x - n * 0.693147181f;
    return (1.f + r * (9.9996671e-01f + r * (5.0003026e-01f + r * (1.6787710e-01f + r * 4.1513518e-02f)))) * power;
  } else {
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    const float q = 4.9999993e-1f + r * (1.6666520e-1f + r * (4.1668391e-2f + r * (8.3687451e-3f + r * 1.3814540e-3f)));
    return (1.f + (r + r * r * q)) * power;
  }
}
template <bool narrow>
TEMPOPS_INLINE inline double exponential(double x) {
  return std::exp(x > 700. ? 700. : x);
}

template <class scalar>
struct Sigmoid {
  acc_t<scalar> value, slope;

  // With e = exp(-x): 1 / (1 + e) and its derivative e / (1 + e)^2, which loses no digits where the value is near 1.
  TEMPOPS_INLINE explicit Sigmoid(acc_t<scalar> x) {
    const acc_t<scalar> e = exponential<sizeof(scalar) == 2>(-x);
    value = 1 / (1 + e);
    slope = e * value * value;
  }
};

// sigmoid(x) + sigmoid(y). For results of 16 bits without exponentials, and with one division: sigmoid(x) is there
// (1 + tanh(x / 2)) / 2 with a rational tanh, fitted for |x| <= 11 by the least largest error, 7e-5; beyond, x is
// clamped, where tanh is within 4e-5 of its limit. NaN stays NaN.
template <class scalar>
TEMPOPS_INLINE inline acc_t<scalar> sum_of_sigmoids(acc_t<scalar> x, acc_t<scalar> y) {
  if constexpr (sizeof(scalar) == 2) {
    struct Ratio {
      float over, under;
      TEMPOPS_INLINE explicit Ratio(float x) {
        x = x < -11.f ? -11.f : x;
        x = x > 11.f ? 11.f : x;
        const float square = x * x;
        over = x * (4.9984323e-01f + square * (1.2500561e-02f + square * 1.8981298e-05f));
        under = 1.f + square * (1.0812085e-01f + square * 7.5881838e-04f);
      }
    };
    const Ratio a(x), b(y);
    return 1.f + 0.5f * ((a.over * b.under + b.over * a.under) / (a.under * b.under));
  } else {
    return Sigmoid<scalar>(x).value + Sigmoid<scalar>(y).value;
  }
}

}  // namespace tempops
