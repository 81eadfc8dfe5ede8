// temporal_cosine_similarity and cosine_gate on the CPU.
//
// All sums are over the channels of one pixel, so a block of pixels walks its clip alone. A frame's block is read from
// memory once, for the sums of the pair that it ends; it is still in the second-level cache where it is written, and
// where it begins the next pair. The backward computes the sums again: that costs no memory traffic. A few channels are
// added in the accumulation type and these subtotals in float64, so that thousands of channels lose no digits.
#include <limits>

#include "../stream.h"
#include "../sums.h"
#include "arguments.h"

namespace tempops {
namespace {

constexpr int64_t kSlots = 256;  // the most pixels of a block; entry i of an array below is the block's pixel i

alignas(64) constexpr double kZeros[kSlots] = {};

// Sums over the channels of the pair (here, next), per pixel.
struct Sums {
  alignas(64) double dot[kSlots];         // <here, next>
  alignas(64) double square[2][kSlots];   // |frame|^2 of even and of odd frames
  alignas(64) double product[2][kSlots];  // <grad, frame>, likewise
};

// A frame of a tensor: channel c of pixel p is at data[c*sc + p] (planar) or data[p*sp + c] (channels_last).
template <class scalar>
struct Frame {
  scalar* data;
  int64_t sc, sp;

  Frame() = default;
  TEMPOPS_INLINE Frame(const Clip& x, int64_t n, int64_t t) : data(x.frame<scalar>(n, t)), sc(x.sc), sp(x.sp) {}
};

// Brings elements that are needed soon to the second-level cache: the rows of a block end before the processor has
// foreseen them.
template <class scalar>
TEMPOPS_INLINE inline void prefetch(const scalar* data, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(scalar)) __builtin_prefetch(data + i, 0, 2);
}

// Adjacent pixels of a planar frame.
struct PlanarBlock {
  static constexpr int64_t kBytes = 196608, kChannels = 16, kChannelsAhead = 4;
  static constexpr int64_t kWhole = 1 << 20;  // a frame up to this size is one run of memory, read without pieces
  static constexpr int64_t kLeast = 128;      // shorter rows cost more than a block that leaves the second-level cache
  int64_t C, first, pixels;

  static int64_t count(const Clip& x) {
    const int64_t channels = x.C * x.tensor.element_size();
    if (x.P <= kSlots && x.P * channels <= kWhole) return 1;
    const int64_t fit = std::clamp<int64_t>(kBytes / channels, kLeast, kSlots) / kLanes;
    return (steps(x) + fit - 1) / fit;
  }
  // Blocks begin at whole steps: rows of a plane are mostly aligned.
  TEMPOPS_INLINE static int64_t steps(const Clip& x) {
    return (x.P + kLanes - 1) / kLanes;
  }
  TEMPOPS_INLINE PlanarBlock(const Clip& x, int64_t blocks, int64_t index)
      : C(x.C), first(index * steps(x) / blocks * kLanes),
        pixels(std::min((index + 1) * steps(x) / blocks * kLanes, x.P) - first) {}
  template <class scalar>
  TEMPOPS_INLINE static int64_t at(const Frame<scalar>& frame, int64_t c, int64_t pixel) {
    return c * frame.sc + pixel;
  }

  template <bool with_grad, class scalar>
  TEMPOPS_INLINE void add(double* __restrict dot, double* __restrict square, double* __restrict product,
                          Frame<scalar> here, Frame<scalar> next, Frame<scalar> grad) const {
    const auto channels = [&](int64_t c, auto count) TEMPOPS_INLINE {
      const scalar* __restrict a = here.data + at(here, c, first);
      const scalar* __restrict b = next.data + at(next, c, first);
      const scalar* __restrict g = grad.data + at(grad, c, first);
      for (size_t i = 0; i < count.size(); ++i) {
        prefetch(b + (i + kChannelsAhead) * next.sc, pixels);
        if constexpr (with_grad) prefetch(g + (i + kChannelsAhead) * grad.sc, pixels);
      }
      _Pragma("omp simd") for (int64_t p = 0; p < pixels; ++p) {
        acc_t<scalar> ab = 0, bb = 0, gb = 0;
        const auto channel = [&](int64_t i) TEMPOPS_INLINE {
          const acc_t<scalar> value = load(b[i * next.sc + p]);
          ab += load(a[i * here.sc + p]) * value;
          bb += value * value;
          if constexpr (with_grad) gb += load(g[i * grad.sc + p]) * value;
        };
        [&]<int64_t... i>(std::integer_sequence<int64_t, i...>) TEMPOPS_INLINE {
          (channel(i), ...);  // written out: an inner loop would keep this one from being vectorised
        }(count);
        dot[p] += ab;
        square[p] += bb;
        if constexpr (with_grad) product[p] += gb;
      }
    };
    int64_t c = 0;
    for (; c + kChannels <= C; c += kChannels) channels(c, std::make_integer_sequence<int64_t, kChannels>());
    for (; c + 4 <= C; c += 4) channels(c, std::make_integer_sequence<int64_t, 4>());
    for (; c < C; ++c) channels(c, std::make_integer_sequence<int64_t, 1>());
  }

  template <int terms, bool streams, class scalar>
  TEMPOPS_INLINE void mix(Writer<scalar>& writer, Frame<scalar> out, const Frame<scalar>* frames,
                          const acc_t<scalar>* const* factors) const {
    for (int64_t c = 0; c < C; ++c) {
      scalar* row = out.data + at(out, c, first);
      if (!streams) prefetch(row + kChannelsAhead * out.sc, pixels);
      writer.template write<streams>(row, pixels,
                                     [=, this](scalar* __restrict to, int64_t begin, int64_t count) TEMPOPS_INLINE {
        const scalar* source[terms];
        const acc_t<scalar>* factor[terms];
        for (int k = 0; k < terms; ++k) {
          source[k] = frames[k].data + at(frames[k], c, first) + begin;
          factor[k] = factors[k] + begin;
        }
        _Pragma("omp simd") for (int64_t p = 0; p < count; ++p) {
          acc_t<scalar> sum = factor[0][p] * load(source[0][p]);
          for (int k = 1; k < terms; ++k) sum += factor[k][p] * load(source[k][p]);
          to[p] = store<scalar>(sum);
        }
      });
    }
  }
};

// Adjacent pixels of a channels_last frame.
struct ChannelsLastBlock {
  static constexpr int64_t kBytes = 16384, kChannels = 256, kElementsAhead = 1024, kFew = 128;
  int64_t C, first, pixels;

  static int64_t count(const Clip& x) {
    const int64_t fit = std::clamp<int64_t>(kBytes / (x.C * x.tensor.element_size()), 1, kSlots);
    return (x.P + fit - 1) / fit;
  }
  TEMPOPS_INLINE ChannelsLastBlock(const Clip& x, int64_t blocks, int64_t index)
      : C(x.C), first(index * x.P / blocks), pixels((index + 1) * x.P / blocks - first) {}
  template <class scalar>
  TEMPOPS_INLINE static int64_t at(const Frame<scalar>& frame, int64_t c, int64_t pixel) {
    return pixel * frame.sp + c;
  }

  template <bool with_grad, class scalar>
  TEMPOPS_INLINE void add(double* __restrict dot, double* __restrict square, double* __restrict product,
                          Frame<scalar> here, Frame<scalar> next, Frame<scalar> grad) const {
    for (int64_t p = 0; p < pixels; ++p) {
      const scalar* a = here.data + at(here, 0, first + p);
      const scalar* b = next.data + at(next, 0, first + p);
      const scalar* g = grad.data + at(grad, 0, first + p);
      const auto sum = [&]<int64_t lanes>(std::integral_constant<int64_t, lanes>) TEMPOPS_INLINE {
        for (int64_t c = 0; c < C; c += kChannels) {
          const int64_t count = std::min(kChannels, C - c);
          prefetch(b + c + kElementsAhead, count);
          if constexpr (with_grad) prefetch(g + c + kElementsAhead, count);
          acc_t<scalar> sums[with_grad ? 3 : 2] = {};
          add_up<lanes>(sums, count, [=](int64_t i, auto& ab, auto& bb, auto& gb) TEMPOPS_INLINE {
            const acc_t<scalar> value = load(b[c + i]);
            ab += load(a[c + i]) * value;
            bb += value * value;
            if constexpr (with_grad) gb += load(g[c + i]) * value;
          });
          dot[p] += sums[0];
          square[p] += sums[1];
          if constexpr (with_grad) product[p] += sums[2];
        }
      };
      if (C <= kFew)  // to add up the lanes takes as long as to fill them
        sum(std::integral_constant<int64_t, kLanes>());
      else
        sum(std::integral_constant<int64_t, lanes_of<scalar>>());
    }
  }

  template <int terms, bool streams, class scalar>
  TEMPOPS_INLINE void mix(Writer<scalar>& writer, Frame<scalar> out, const Frame<scalar>* frames,
                          const acc_t<scalar>* const* factors) const {
    for (int64_t p = 0; p < pixels; ++p) {
      scalar* row = out.data + at(out, 0, first + p);
      if (!streams) prefetch(row + kElementsAhead, C);
      writer.template write<streams>(row, C,
                                     [=, this](scalar* __restrict to, int64_t begin, int64_t count) TEMPOPS_INLINE {
        const scalar* source[terms];
        acc_t<scalar> factor[terms];
        for (int k = 0; k < terms; ++k) {
          source[k] = frames[k].data + at(frames[k], 0, first + p) + begin;
          factor[k] = factors[k][p];
        }
        _Pragma("omp simd") for (int64_t c = 0; c < count; ++c) {
          acc_t<scalar> sum = factor[0] * load(source[0][c]);
          for (int k = 1; k < terms; ++k) sum += factor[k] * load(source[k][c]);
          to[c] = store<scalar>(sum);
        }
      });
    }
  }
};

// |frame| at a pixel; infinite, so that its inverse is 0, where it counts as zero. That is decided in the type that
// eager computes in. The choice is made before the division: the compiler then leaves no branch in the loop over
// pixels.
template <class acc>
TEMPOPS_INLINE inline double norm(double square, double eps) {
  const double root = std::sqrt(square);
  return static_cast<acc>(root) <= static_cast<acc>(eps) ? std::numeric_limits<double>::infinity() : root;
}

// The sums of the pair (t, t+1). `fresh` is set where the walk begins, so that frame t's own sums are not there yet.
template <bool with_grad, class scalar, class Block>
void add_pair(Sums& sums, const Block& block, const Clip& x, const Clip& grad, int64_t n, int64_t t, bool fresh) {
  for (int64_t frame = fresh ? t : t + 1; frame <= t + 1; ++frame) {
    double *square = sums.square[frame % 2], *product = sums.product[frame % 2];
    for (int64_t i = 0; i < block.pixels; ++i) sums.dot[i] = square[i] = product[i] = 0;
    run([&]() TEMPOPS_INLINE {
      block.template add<with_grad>(sums.dot, square, product, Frame<scalar>(x, n, t), Frame<scalar>(x, n, frame),
                                    Frame<scalar>(grad, n, frame));
    });
  }
}

// out = sum over k of factors[k] * frames[k], in the pixels of the block
template <int terms, class scalar, class Block>
void mix(Writer<scalar>& writer, const Block& block, Frame<scalar> out, const Frame<scalar>* frames,
         const acc_t<scalar>* const* factors) {
  run([&]() TEMPOPS_INLINE {
    writer.chosen([&](auto streams)
                      TEMPOPS_INLINE { block.template mix<terms, streams()>(writer, out, frames, factors); });
  });
}

// out is the gated frames, or the similarity [N, T, P] seen as clips of one channel.
template <bool gate, class scalar, class Block>
void forward(const Clip& out, const Clip& x, double eps) {
  using acc = acc_t<scalar>;
  const int64_t blocks = Block::count(x), pairs = x.T - 1;
  const bool past_caches = gate && passes_caches({&x, &out});
  parallel(x.N * blocks * pairs, x.C * x.P / blocks, [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    Writer<scalar> writer(past_caches);
    Sums sums;
    alignas(64) acc result[kSlots];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i % pairs, n = i / pairs / blocks;
      const Block block(x, blocks, i / pairs % blocks);
      add_pair<false, scalar>(sums, block, x, x, n, t, t == 0 || i == begin);
      for (int64_t p = 0; p < block.pixels; ++p) {
        const double norms = norm<acc>(sums.square[t % 2][p], eps) * norm<acc>(sums.square[(t + 1) % 2][p], eps);
        const double s = sums.dot[p] / norms;
        result[p] = static_cast<acc>(gate ? 1 - s : s);
      }
      for (int64_t frame = t; frame < (t + 2 == x.T ? x.T : t + 1); ++frame) {
        if constexpr (gate) {
          const Frame<scalar> source(x, n, frame);
          const acc* factor = result;
          mix<1>(writer, block, Frame<scalar>(out, n, frame), &source, &factor);
        } else {
          scalar* __restrict map = out.frame<scalar>(n, frame) + block.first;
          for (int64_t p = 0; p < block.pixels; ++p) map[p] = store<scalar>(result[p]);
        }
      }
    }
  });
}

// With s = cos of (a, b) and h its gradient, da = h (b / |a||b| - s a / |a|^2), and db likewise. The similarity's h is
// its grad; the gate's is -<grad, x>. The last frame's s is a copy, so its gradient adds to the last pair's h.
template <bool gate, class scalar, class Block>
void backward(const Clip& dx, const Clip& grad, const Clip& x, double eps) {
  using acc = acc_t<scalar>;
  const int64_t blocks = Block::count(x), T = x.T;
  const bool past_caches = passes_caches({&x, &grad, &dx});
  parallel(x.N * blocks * T, x.C * x.P / blocks, [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    Writer<scalar> writer(past_caches);
    Sums sums;
    alignas(64) acc by_grad[kSlots], by_here[kSlots], by_previous[kSlots], by_next[kSlots];
    alignas(64) double across[2][kSlots], along[2][kSlots];  // h / |a||b| and h s, of even and of odd pairs
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i % T, n = i / T / blocks;
      const Block block(x, blocks, i / T % blocks);
      const int64_t first = i == begin && t > 0 ? t - 1 : t;
      for (int64_t pair = first; pair <= std::min(t, T - 2); ++pair) {
        add_pair<gate, scalar>(sums, block, x, gate ? grad : x, n, pair, pair == 0 || pair < t);
        const int64_t here = pair % 2, next = 1 - here;
        const bool last = pair + 2 == T;
        if constexpr (!gate) {
          const scalar* __restrict map = grad.frame<scalar>(n, pair) + block.first;
          const scalar* __restrict copy = grad.frame<scalar>(n, pair + last) + block.first;
          for (int64_t p = 0; p < block.pixels; ++p) {
            sums.product[here][p] = -static_cast<double>(load(map[p]));
            sums.product[next][p] = -static_cast<double>(load(copy[p]));
          }
        }
        for (int64_t p = 0; p < block.pixels; ++p) {
          const double inverse = 1 / (norm<acc>(sums.square[here][p], eps) * norm<acc>(sums.square[next][p], eps));
          const double s = sums.dot[p] * inverse;
          const double h = -sums.product[here][p] - (last ? sums.product[next][p] : 0);
          across[here][p] = h * inverse;
          along[here][p] = h * s;
          by_grad[p] = static_cast<acc>(1 - s);
        }
      }
      const int64_t here = t % 2, before = 1 - here;
      const double* along_previous = t > 0 ? along[before] : kZeros;
      const double* along_next = t + 1 < T ? along[here] : kZeros;
      for (int64_t p = 0; p < block.pixels; ++p) {
        const double size = norm<acc>(sums.square[here][p], eps);
        by_here[p] = static_cast<acc>(-(along_previous[p] + along_next[p]) / (size * size));
        by_previous[p] = static_cast<acc>(across[before][p]);
        by_next[p] = static_cast<acc>(across[here][p]);
      }
      constexpr int kTerms = gate ? 4 : 3;
      Frame<scalar> frames[kTerms];
      const acc* factors[kTerms];
      int terms = 0;
      const auto term = [&](const Clip& clip, int64_t frame, const acc* factor) TEMPOPS_INLINE {
        frames[terms] = {clip, n, frame};
        factors[terms++] = factor;
      };
      term(x, t, by_here);
      if constexpr (gate) term(grad, t, by_grad);
      if (t > 0) term(x, t - 1, by_previous);
      if (t + 1 < T) term(x, t + 1, by_next);
      const Frame<scalar> out(dx, n, t);
      terms == kTerms ? mix<kTerms>(writer, block, out, frames, factors)
                      : mix<kTerms - 1>(writer, block, out, frames, factors);
    }
  });
}

// Calls f with the element type and the block type for the layout of x, unless there is nothing to compute.
template <class F>
void by_layout(const Clip& x, const F& f) {
  if (x.empty()) return;
  by_dtype(x.dtype, [&](auto* type) {
    if (x.channels_last)
      f(type, static_cast<ChannelsLastBlock*>(nullptr));
    else
      f(type, static_cast<PlanarBlock*>(nullptr));
  });
}

Tensor temporal_cosine_similarity(const Tensor& x_, Segments n_segment, double eps) {
  const Clip x = checked_clips(x_, n_segment, eps);
  const Clip s = empty_clips(x, x.T, 1, x.H, x.W);
  if (x.C == 0) torch::stable::zero_(const_cast<Tensor&>(s.tensor));
  by_layout(x, [&](auto* type, auto* block) {
    forward<false, std::remove_pointer_t<decltype(type)>, std::remove_pointer_t<decltype(block)>>(s, x, eps);
  });
  return s.tensor;
}

Tensor temporal_cosine_similarity_backward(const Tensor& grad, const Tensor& x_, Segments n_segment, double eps) {
  const Clip x = checked_clips(x_, n_segment, eps);
  const Clip ds = similarity_clips(grad, x, n_segment);
  const Clip dx = empty_like(x);
  by_layout(x, [&](auto* type, auto* block) {
    backward<false, std::remove_pointer_t<decltype(type)>, std::remove_pointer_t<decltype(block)>>(dx, ds, x, eps);
  });
  return dx.tensor;
}

Tensor cosine_gate(const Tensor& x_, Segments n_segment, double eps) {
  const Clip x = checked_clips(x_, n_segment, eps);
  const Clip y = empty_like(x);
  by_layout(x, [&](auto* type, auto* block) {
    forward<true, std::remove_pointer_t<decltype(type)>, std::remove_pointer_t<decltype(block)>>(y, x, eps);
  });
  return y.tensor;
}

Tensor cosine_gate_backward(const Tensor& grad, const Tensor& x_, Segments n_segment, double eps) {
  const Clip x = checked_clips(x_, n_segment, eps);
  const Clip dy = clips_like(grad, x, "grad");
  const Clip dx = empty_like(x);
  by_layout(x, [&](auto* type, auto* block) {
    backward<true, std::remove_pointer_t<decltype(type)>, std::remove_pointer_t<decltype(block)>>(dx, dy, x, eps);
  });
  return dx.tensor;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tempops, m) {
  m.def("temporal_cosine_similarity(Tensor x, int? n_segment=None, float eps=1e-8) -> Tensor");
  m.def("temporal_cosine_similarity_backward(Tensor grad, Tensor x, int? n_segment, float eps) -> Tensor");
  m.def("cosine_gate(Tensor x, int? n_segment=None, float eps=1e-8) -> Tensor");
  m.def("cosine_gate_backward(Tensor grad, Tensor x, int? n_segment, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tempops, CPU, m) {
  m.impl("temporal_cosine_similarity", TORCH_BOX(&temporal_cosine_similarity));
  m.impl("temporal_cosine_similarity_backward", TORCH_BOX(&temporal_cosine_similarity_backward));
  m.impl("cosine_gate", TORCH_BOX(&cosine_gate));
  m.impl("cosine_gate_backward", TORCH_BOX(&cosine_gate_backward));
}

}  // namespace tempops
