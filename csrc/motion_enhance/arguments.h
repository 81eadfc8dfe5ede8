// What the back ends of motion_enhance check alike.
#pragma once

#include <algorithm>

#include "../common.h"

namespace tempops {

// Half the kernel size. A window that reaches over the whole plane from everywhere may as well end there.
inline int64_t radius_of(const Clip& x, int64_t kernel_size) {
  TEMPOPS_CHECK(x.T >= 2, "x must have at least 2 frames a clip, got T = ", x.T);
  TEMPOPS_CHECK(kernel_size >= 1 && kernel_size % 2 == 1, "kernel_size must be odd and at least 1, got ", kernel_size);
  return std::min(kernel_size / 2, std::max<int64_t>({1, x.H, x.W}) - 1);
}

// The output's gradient, in the layout of x.
inline Clip gradient_of(const Clip& x, const Tensor& grad) {
  const Clip dy = clips(grad, x.rank == 4 ? Segments(x.T - 1) : std::nullopt, "grad", &x);
  TEMPOPS_CHECK(dy.N == x.N && dy.T == x.T - 1 && dy.C == x.C && dy.H == x.H && dy.W == x.W,
                "grad has the wrong shape");
  return dy;
}

}  // namespace tempops
