// motion_attention on the CPU: one pass over memory, so what counts is that the sigmoids vectorise.
#include "../map.h"
#include "../sigmoid.h"
#include "../stream.h"
#include "arguments.h"

namespace tempops {
namespace {

// Elements in the type that is computed in, converted into the buffer where theirs is another: with seven tensors,
// loops that convert and loops that compute take 0.6x the time of one that mixes element sizes. The next piece is
// fetched meanwhile, because the hardware loses track between the loops.
template <class scalar>
TEMPOPS_INLINE inline const acc_t<scalar>* widen(const scalar* source, acc_t<scalar>* buffer, int64_t size) {
  if constexpr (std::is_same_v<scalar, acc_t<scalar>>) {
    return source;
  } else {
    for (int64_t i = 0; i < size; i += 64 / sizeof(scalar)) __builtin_prefetch(source + size + i);
    _Pragma("omp simd") for (int64_t i = 0; i < size; ++i) buffer[i] = load(source[i]);
    return buffer;
  }
}

// The longest runs of elements that are adjacent in every tensor: all of it, a frame, or a frame's channel (planar) or
// pixel (channels_last). Runs are cut into pieces of at most kPiece elements, which the threads share.
struct Runs {
  static constexpr int64_t kPiece = 512;
  bool whole, frames;
  int64_t count, length, pieces;

  // All tensors have the shape and the layout of `like`, which is dense.
  Runs(const Clip& like, std::initializer_list<const Clip*> tensors) : whole(true), frames(like.dense_frames()) {
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

Tensor motion_attention(const Tensor& x_, const Tensor& forward, const Tensor& backward, bool centered) {
  const Clip x = frames_of(x_), ahead = clips_like(forward, x, "forward"), behind = clips_like(backward, x, "backward");
  const Clip y = empty_like(x);
  if (x.empty()) return y.tensor;
  const Runs runs(y, {&x, &ahead, &behind});
  by_dtype(x.dtype, [&](auto* type) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    using acc = acc_t<scalar>;
    const acc base = centered ? 0.5 : 1;
    const bool past_caches = passes_caches({&x, &ahead, &behind, &y});
    parallel(runs.count * runs.pieces, runs.size(0), [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
      Writer<scalar> writer(past_caches);
      writer.chosen([&](auto streams) TEMPOPS_INLINE {
        for (int64_t piece = begin; piece < end; ++piece) {
          const scalar* __restrict source = runs.at<scalar>(x, piece);
          const scalar* __restrict f = runs.at<scalar>(ahead, piece);
          const scalar* __restrict b = runs.at<scalar>(behind, piece);
          const auto part = [=](scalar* __restrict to, int64_t first, int64_t count) TEMPOPS_INLINE {
            const auto fetch = [=](int64_t i) TEMPOPS_INLINE {
              for (const scalar* from : {source, f, b}) fetch_to_read(from + first + i);
              fetch_to_write(to + i);
            };
            const auto attend = [=](acc x, acc f, acc b)
                                    TEMPOPS_INLINE { return x * (base + acc(0.5) * sum_of_sigmoids<scalar>(f, b)); };
            map(count, fetch, attend, to, source + first, f + first, b + first);
          };
          writer.template write<streams()>(runs.at<scalar>(y, piece), runs.size(piece), part);
        }
      });
    });
  });
  return y.tensor;
}

// All three gradients in one pass.
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
    const bool past_caches = passes_caches({&x, &ahead, &behind, &dy, &out[0], &out[1], &out[2]});
    parallel(runs.count * runs.pieces, 2 * runs.size(0), [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
      Writer<scalar> writer(past_caches);
      alignas(64) acc buffers[7][Runs::kPiece];
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t size = runs.size(piece);
        const acc* __restrict source = widen(runs.at<scalar>(x, piece), buffers[0], size);
        const acc* __restrict f = widen(runs.at<scalar>(ahead, piece), buffers[1], size);
        const acc* __restrict b = widen(runs.at<scalar>(behind, piece), buffers[2], size);
        const acc* __restrict g = widen(runs.at<scalar>(dy, piece), buffers[3], size);
        // A gradient that nobody asked for ends in its buffer, one that is converted or streamed begins there.
        acc* target[3] = {buffers[4], buffers[5], buffers[6]};
        if constexpr (std::is_same_v<scalar, acc>)
          for (int k = 0; k < 3; ++k)
            if (needed[k] && !past_caches) target[k] = runs.at<scalar>(out[k], piece);
        acc* __restrict dx = target[0];
        acc* __restrict df = target[1];
        acc* __restrict db = target[2];
        const auto fetch = [=](int64_t i) TEMPOPS_INLINE {
          if constexpr (std::is_same_v<scalar, acc>) {
            for (const acc* from : {source, f, b, g}) fetch_to_read(from + i);
            for (acc* to : {dx, df, db}) fetch_to_write(to + i);
          }
        };
        each(size, fetch, [=](int64_t i) TEMPOPS_INLINE {
          const Sigmoid<scalar> to_next(f[i]), to_previous(b[i]);
          const acc half = acc(0.5) * g[i] * source[i];
          dx[i] = g[i] * (base + acc(0.5) * (to_next.value + to_previous.value));
          df[i] = half * to_next.slope;
          db[i] = half * to_previous.slope;
        });
        for (int k = 0; k < 3; ++k) {
          if (!needed[k]) continue;
          scalar* row = runs.at<scalar>(out[k], piece);
          if constexpr (!std::is_same_v<scalar, acc>) {
            const auto part = [&](scalar* __restrict to, int64_t first, int64_t count) TEMPOPS_INLINE {
              const acc* __restrict from = target[k] + first;
              _Pragma("omp simd") for (int64_t i = 0; i < count; ++i) to[i] = store<scalar>(from[i]);
            };
            writer.chosen([&](auto streams) TEMPOPS_INLINE { writer.template write<streams()>(row, size, part); });
          } else if (past_caches) {
            stream(row, target[k], size * sizeof(scalar));
          }
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
