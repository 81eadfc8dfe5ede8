// bidirectional_difference: the argument checks. Shared by the CPU and CUDA kernels.
#pragma once

#include "../common.h"

namespace tempops {

inline Tensor checked_weight(const Tensor& weight, const Clip& x) {
  TEMPOPS_CHECK(
      weight.dim() == 4 && weight.size(0) == x.C && weight.size(1) == 1 && weight.size(2) == 3 && weight.size(3) == 3,
      "weight must have shape [C, 1, 3, 3] with C = ", x.C);
  return dense_argument(weight, x.tensor, "weight");
}

}  // namespace tempops
