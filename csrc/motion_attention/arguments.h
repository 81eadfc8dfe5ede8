// motion_attention: how x is read. Shared by the CPU and CUDA kernels.
#pragma once

#include "../common.h"

namespace tempops {

inline Clip frames_of(const Tensor& x) {
  return clips(x, x.dim() == 4 ? Segments(1) : std::nullopt);  // frames do not meet here: any count would do
}

}  // namespace tempops
