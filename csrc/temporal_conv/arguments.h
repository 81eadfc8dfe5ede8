// temporal_conv: its arguments, checked. Shared by the CPU and CUDA kernels.
#pragma once

#include "../common.h"

namespace tempops {

// weight and gate, dense; `gate` is any tensor where there is none.
struct Arguments {
  Tensor weight, gate;
  bool gated;
};

inline Arguments check_arguments(const Clip& x, const Tensor& weight, const std::optional<Tensor>& gate) {
  TEMPOPS_CHECK(weight.dim() == 2 || weight.dim() == 3, "weight must be [C, K], [G, K] or [N, C, K], got ",
                weight.dim(), "-D");
  const int64_t K = weight.size(weight.dim() - 1);
  TEMPOPS_CHECK(K % 2 == 1, "weight must have an odd number of taps K, got ", K);
  if (weight.dim() == 3) {
    TEMPOPS_CHECK(weight.size(0) == x.N && weight.size(1) == x.C, "weight must be [N, C, K] = [", x.N, ", ", x.C,
                  ", K], got [", weight.size(0), ", ", weight.size(1), ", K]");
  } else {
    TEMPOPS_CHECK(weight.size(0) >= 1 && x.C % weight.size(0) == 0, "weight has ", weight.size(0),
                  " kernels, which does not divide ", x.C, " channels");
  }
  if (!gate) return {dense_argument(weight, x.tensor, "weight"), weight, false};
  TEMPOPS_CHECK(gate->dim() == 2 && gate->size(0) == x.N * x.T && gate->size(1) == x.C, "gate must be [N*T, C] = [",
                x.N * x.T, ", ", x.C, "]");
  return {dense_argument(weight, x.tensor, "weight"), dense_argument(*gate, x.tensor, "gate"), true};
}

}  // namespace tempops
