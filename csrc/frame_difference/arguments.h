// frame_difference: what the arguments must be. Shared by the CPU and CUDA kernels.
#pragma once

#include "../common.h"

namespace tempops {

// F frames of C channels each, side by side in x's channels; pooled maps of `height` x `width`.
struct Frames {
  int64_t F, C, pool, height, width;
};

// Reads x as maps whose channels are n_frames frames.
inline Clip maps(const Tensor& x, const char* name) {
  TEMPOPS_CHECK(x.dim() == 4, name, " must be [M, F*C, H, W], got ", x.dim(), "-D");
  return clips(x, 1, name);
}

inline void check(int64_t n_frames, int64_t pool) {
  TEMPOPS_CHECK(n_frames >= 2, "n_frames must be at least 2, got ", n_frames);
  TEMPOPS_CHECK(pool >= 1, "pool must be at least 1, got ", pool);
}

inline Frames frames_of(const Clip& x, int64_t n_frames, int64_t pool) {
  TEMPOPS_CHECK(x.C % n_frames == 0, "n_frames=", n_frames, " does not divide ", x.C, " channels");
  return {n_frames, x.C / n_frames, pool, x.H / pool, x.W / pool};
}

// Of the gradient dy to frames of height x width.
inline Frames frames_of_gradient(const Clip& dy, int64_t n_frames, int64_t pool, int64_t height, int64_t width) {
  const Frames f{n_frames, dy.C / (n_frames - 1), pool, dy.H, dy.W};
  TEMPOPS_CHECK(
      f.C * (f.F - 1) == dy.C && height >= 0 && width >= 0 && height / pool == f.height && width / pool == f.width,
      "grad [", dy.N, ", ", dy.C, ", ", dy.H, ", ", dy.W, "] does not fit n_frames=", n_frames, ", pool=", pool,
      " and frames of ", height, " x ", width);
  return f;
}

}  // namespace tempops
