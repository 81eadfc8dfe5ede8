// temporal_cosine_similarity and cosine_gate: what the arguments must be. Shared by the CPU and CUDA kernels.
#pragma once

#include "../common.h"

namespace tempops {

inline Clip checked_clips(const Tensor& x, Segments n_segment, double eps) {
  const Clip clip = clips(x, n_segment);
  TEMPOPS_CHECK(clip.T >= 2, "x must have at least 2 frames a clip, got T = ", clip.T);
  TEMPOPS_CHECK(eps >= 0, "eps must be at least 0, got ", eps);
  return clip;
}

// The gradient to the similarity of x. The similarity [N*T, 1, H, W] or [N, 1, T, H, W] is dense in this order,
// whatever the layout of x.
inline Clip similarity_clips(const Tensor& grad, const Clip& x, Segments n_segment) {
  const Clip ds = clips(dense_argument(grad, x.tensor, "grad"), n_segment, "grad");
  TEMPOPS_CHECK(ds.rank == x.rank && ds.N == x.N && ds.T == x.T && ds.C == 1 && ds.H == x.H && ds.W == x.W,
                "grad has the wrong shape");
  return ds;
}

}  // namespace tempops
