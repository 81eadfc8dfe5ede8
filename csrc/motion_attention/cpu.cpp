// motion_attention on the CPU: one pass over memory, so what counts is that the exponential vectorises.
#include "../cpu.h"

namespace tempops {
namespace {

// exp for |x| <= 88, beyond which x is clamped; NaN stays NaN. x = n ln 2 + r; the polynomial is a least-maximum fit of
// exp on |r| <= ln 2 / 2 (relative error 3e-9), and 2^n is made in the exponent bits.
TEMPOPS_INLINE inline float exp_clamped(float x) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves an integer in the low bits
  x = x < -87.f ? -87.f : x;
  x = x > 88.f ? 88.f : x;
  const float shifted = x * 1.44269504f + kRound, n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const float q = 4.9999993e-1f + r * (1.6666520e-1f + r * (4.1668391e-2f + r * (8.3687451e-3f + r * 1.3814540e-3f)));
  const uint32_t power = (std::bit_cast<uint32_t>(shifted) + 127u) << 23;
  return (1.f + (r + r * r * q)) * std::bit_cast<float>(power);
}
TEMPOPS_INLINE inline double exp_clamped(double x) {
  return std::exp(x > 700. ? 700. : x);
}

template <class acc>
struct Sigmoid {
  acc value, slope;

  // With e = exp(-x): 1 / (1 + e) and its derivative e / (1 + e)^2, which loses no digits where the value is near 1.
  TEMPOPS_INLINE explicit Sigmoid(acc x) {
    const acc e = exp_clamped(-x);
    value = 1 / (1 + e);
    slope = e * value * value;
  }
};

// The longest runs of elements that are adjacent in every tensor: all of it, a frame, or a frame's channel (planar) or
// pixel (channels_last). Runs are cut into pieces of at most kPiece elements, which are what the threads share.
struct Runs {
  static constexpr int64_t kPiece = 1024;
  bool whole, frames;
  int64_t count, length, pieces;

  // All tensors have the shape and the layout of `like`, which is dense.
  Runs(const Clip& like, std::initializer_list<const Clip*> tensors)
      : whole(true), frames(like.dense_frames()) {
    for (const Clip* x : tensors) {
      frames &= x->dense_frames();
      whole &= (x->sn == like.sn || like.N == 1) && (x->st == like.st || like.T == 1) &&
               (x->sc == like.sc || like.C == 1) && (x->sp == like.sp || like.P == 1);
    }
    const int64_t row = like.channels_last ? like.C : like.P, all = like.N * like.T * like.C * like.P;
    length = whole ? all : frames ? like.C * like.P : row;
    count = all / length;
    pieces = (length + kPiece - 1) / kPiece;
  }
  TEMPOPS_INLINE int64_t size(int64_t piece) const {
    return std::min(kPiece, length - piece % pieces * kPiece);
  }
  template <class scalar>
  TEMPOPS_INLINE scalar* at(const Clip& x, int64_t piece) const {
    const int64_t run = piece / pieces, begin = piece % pieces * kPiece;
    if (whole) return x.data<scalar>() + begin;
    if (frames) return x.frame<scalar>(run / x.T, run % x.T) + begin;
    const int64_t rows = x.channels_last ? x.P : x.C, frame = run / rows;
    return x.frame<scalar>(frame / x.T, frame % x.T) + run % rows * (x.channels_last ? x.sp : x.sc) + begin;
  }
};

Clip frames_of(const Tensor& x) {
  return clips(x, x.dim() == 4 ? Segments(1) : std::nullopt);  // frames do not meet here: any count would do
}

Tensor motion_attention(const Tensor& x_, const Tensor& forward, const Tensor& backward, bool centered) {
  const Clip x = frames_of(x_), ahead = clips_like(forward, x, "forward"), behind = clips_like(backward, x, "backward");
  const Clip y = empty_like(x);
  if (x.empty()) return y.tensor;
  const Runs runs(y, {&x, &ahead, &behind});
  by_dtype(x.dtype, [&](auto* type) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    using acc = acc_t<scalar>;
    const acc base = centered ? 0.5 : 1;
    parallel(runs.count * runs.pieces, runs.size(0), [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
      for (int64_t piece = begin; piece < end; ++piece) {
        const scalar* __restrict source = runs.at<scalar>(x, piece);
        const scalar* __restrict f = runs.at<scalar>(ahead, piece);
        const scalar* __restrict b = runs.at<scalar>(behind, piece);
        scalar* __restrict out = runs.at<scalar>(y, piece);
        const int64_t size = runs.size(piece);
        _Pragma("omp simd") for (int64_t i = 0; i < size; ++i) {
          const acc sum = Sigmoid<acc>(load(f[i])).value + Sigmoid<acc>(load(b[i])).value;
          out[i] = store<scalar>(load(source[i]) * (base + acc(0.5) * sum));
        }
      }
    });
  });
  return y.tensor;
}

// All three gradients in one pass; one that nobody asked for goes to scratch memory that stays in the first-level cache.
std::tuple<Tensor, Tensor, Tensor> motion_attention_backward(const Tensor& grad, const Tensor& x_,
                                                             const Tensor& forward, const Tensor& backward,
                                                             bool centered, bool need_x, bool need_forward,
                                                             bool need_backward) {
  const Clip x = frames_of(x_), ahead = clips_like(forward, x, "forward"), behind = clips_like(backward, x, "backward");
  const Clip dy = clips_like(grad, x, "grad");
  const std::array<bool, 3> needed = {need_x, need_forward, need_backward};
  std::array<Clip, 3> out = {x, x, x};
  std::array<Tensor, 3> result = {no_gradient(x.tensor), no_gradient(x.tensor), no_gradient(x.tensor)};
  for (size_t i = 0; i < out.size(); ++i) {
    if (!needed[i]) continue;
    out[i] = empty_like(x);
    result[i] = out[i].tensor;
  }
  if (x.empty() || !(need_x || need_forward || need_backward)) return {result[0], result[1], result[2]};
  const Runs runs(out[need_x ? 0 : need_forward ? 1 : 2], {&x, &ahead, &behind, &dy});
  by_dtype(x.dtype, [&](auto* type) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    using acc = acc_t<scalar>;
    const acc base = centered ? 0.5 : 1;
    parallel(runs.count * runs.pieces, 2 * runs.size(0), [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
      alignas(64) scalar scratch[3][Runs::kPiece];
      for (int64_t piece = begin; piece < end; ++piece) {
        const scalar* __restrict source = runs.at<scalar>(x, piece);
        const scalar* __restrict f = runs.at<scalar>(ahead, piece);
        const scalar* __restrict b = runs.at<scalar>(behind, piece);
        const scalar* __restrict g = runs.at<scalar>(dy, piece);
        scalar* __restrict dx = needed[0] ? runs.at<scalar>(out[0], piece) : scratch[0];
        scalar* __restrict df = needed[1] ? runs.at<scalar>(out[1], piece) : scratch[1];
        scalar* __restrict db = needed[2] ? runs.at<scalar>(out[2], piece) : scratch[2];
        const int64_t size = runs.size(piece);
        _Pragma("omp simd") for (int64_t i = 0; i < size; ++i) {
          const Sigmoid<acc> to_next(load(f[i])), to_previous(load(b[i]));
          const acc gradient = load(g[i]), half = acc(0.5) * gradient * load(source[i]);
          dx[i] = store<scalar>(gradient * (base + acc(0.5) * (to_next.value + to_previous.value)));
          df[i] = store<scalar>(half * to_next.slope);
          db[i] = store<scalar>(half * to_previous.slope);
        }
      }
    });
  });
  return {result[0], result[1], result[2]};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tempops, m) {
  m.def("motion_attention(Tensor x, Tensor forward, Tensor backward, bool centered=False) -> Tensor");
  m.def(
      "motion_attention_backward(Tensor grad, Tensor x, Tensor forward, Tensor backward, bool centered, bool need_x, "
      "bool need_forward, bool need_backward) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(tempops, CPU, m) {
  m.impl("motion_attention", TORCH_BOX(&motion_attention));
  m.impl("motion_attention_backward", TORCH_BOX(&motion_attention_backward));
}

}  // namespace tempops
