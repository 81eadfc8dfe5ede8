// temporal_cosine_similarity and cosine_gate on the CPU.
//
// All sums are over the channels of one pixel, so a block of pixels walks its clip alone. A frame's block is read from
// memory once, for the sums of the pair that it ends; it is still in the second-level cache where it is written, and
// where it begins the next pair. The backward computes the sums again: that costs no memory traffic. A few channels are
// added in the accumulation type and these subtotals in float64, so that thousands of channels lose no digits.
#include "../cpu.h"

namespace tempops {
namespace {

constexpr int64_t kSlots = 256;          // the most pixels of a block; entry i of an array below is the block's pixel i
constexpr int64_t kBlockBytes = 131072;  // a frame's block: the backward keeps up to six in the second-level cache

// Sums over the channels of the pair (here, next), per pixel.
struct Sums {
  alignas(64) double dot[kSlots];         // <here, next>
  alignas(64) double square[2][kSlots];   // |frame|^2 of even and of odd frames
  alignas(64) double product[2][kSlots];  // <grad, frame>, likewise
};

// dx[t] = grad * grad[t] + previous * x[t-1] + here * x[t] + next * x[t+1], per pixel.
template <class acc>
struct Factors {
  alignas(64) acc grad[kSlots], previous[kSlots], here[kSlots], next[kSlots];
};

// A frame of a tensor: channel c of pixel p is at data[c*sc + p] (planar) or data[p*sp + c] (channels_last).
template <class scalar>
struct Frame {
  scalar* data;
  int64_t sc, sp;

  TEMPOPS_INLINE Frame(const Clip& x, int64_t n, int64_t t) : data(x.frame<scalar>(n, t)), sc(x.sc), sp(x.sp) {}
};

// Groups of kLanes adjacent pixels of a planar frame. The last group of a frame reaches back into the one before it
// rather than past the frame: both lie in one block, which computes the pixels they share twice.
struct PlanarBlock {
  static constexpr int64_t kLanes = 16, kChannels = 16;
  int64_t P, C, first, groups;

  static int64_t groups_of(const Clip& x) {
    return (x.P + kLanes - 1) / kLanes;
  }
  static int64_t count(const Clip& x) {
    const int64_t fit = kBlockBytes / (kLanes * x.C * x.tensor.element_size());
    return std::max<int64_t>(1, groups_of(x) / std::clamp<int64_t>(fit, 2, kSlots / kLanes / 2));
  }
  TEMPOPS_INLINE PlanarBlock(const Clip& x, int64_t blocks, int64_t index)
      : P(x.P), C(x.C), first(index * groups_of(x) / blocks), groups((index + 1) * groups_of(x) / blocks - first) {}
  TEMPOPS_INLINE int64_t slots() const {
    return groups * kLanes;
  }
  template <class scalar>
  TEMPOPS_INLINE static int64_t at(const Frame<scalar>& frame, int64_t c, int64_t pixel) {
    return c * frame.sc + pixel;
  }

  // f(slot, pixel, lanes) for each group; lanes is a constant except in frames smaller than a group.
  template <class F>
  TEMPOPS_INLINE void each_group(const F& f) const {
    if (P < kLanes) return f(int64_t{0}, int64_t{0}, P);
    for (int64_t g = 0; g < groups; ++g)
      f(g * kLanes, std::min((first + g) * kLanes, P - kLanes), std::integral_constant<int64_t, kLanes>());
  }

  template <bool with_grad, class scalar>
  TEMPOPS_INLINE void add(double* __restrict dot, double* __restrict square, double* __restrict product,
                          Frame<scalar> here, Frame<scalar> next, Frame<scalar> grad) const {
    const auto channels = [&](int64_t c, auto count) TEMPOPS_INLINE {
      each_group([&](int64_t slot, int64_t pixel, auto lanes) TEMPOPS_INLINE {
        const scalar* __restrict a = here.data + at(here, c, pixel);
        const scalar* __restrict b = next.data + at(next, c, pixel);
        const scalar* __restrict g = grad.data + at(grad, c, pixel);
        _Pragma("omp simd") for (int64_t l = 0; l < lanes; ++l) {
          acc_t<scalar> ab = 0, bb = 0, gb = 0;
          for (int64_t i = 0; i < count; ++i) {
            const acc_t<scalar> value = load(b[i * next.sc + l]);
            ab += load(a[i * here.sc + l]) * value;
            bb += value * value;
            if constexpr (with_grad) gb += load(g[i * grad.sc + l]) * value;
          }
          dot[slot + l] += ab;
          square[slot + l] += bb;
          if constexpr (with_grad) product[slot + l] += gb;
        }
      });
    };
    int64_t c = 0;
    for (; c + kChannels <= C; c += kChannels) channels(c, std::integral_constant<int64_t, kChannels>());
    for (; c < C; ++c) channels(c, std::integral_constant<int64_t, 1>());
  }

  // out[c, pixel] = f(slot)(c, pixel)
  template <class scalar, class F>
  TEMPOPS_INLINE void write(Frame<scalar> out, const F& f) const {
    for (int64_t c = 0; c < C; ++c)
      each_group([&](int64_t slot, int64_t pixel, auto lanes) TEMPOPS_INLINE {
        scalar* __restrict row = out.data + at(out, c, pixel);
        _Pragma("omp simd") for (int64_t l = 0; l < lanes; ++l) row[l] = store<scalar>(f(slot + l)(c, pixel + l));
      });
  }

  template <class F>
  TEMPOPS_INLINE void each_pixel(const F& f) const {
    each_group([&](int64_t slot, int64_t pixel, auto lanes) TEMPOPS_INLINE {
      for (int64_t l = 0; l < lanes; ++l) f(slot + l, pixel + l);
    });
  }
};

// Adjacent pixels of a channels_last frame.
struct ChannelsLastBlock {
  static constexpr int64_t kBytes = 16384, kChannels = 256;
  int64_t C, first, pixels;

  static int64_t count(const Clip& x) {
    const int64_t fit = std::clamp<int64_t>(kBytes / (x.C * x.tensor.element_size()), 1, kSlots);
    return (x.P + fit - 1) / fit;
  }
  TEMPOPS_INLINE ChannelsLastBlock(const Clip& x, int64_t blocks, int64_t index)
      : C(x.C), first(index * x.P / blocks), pixels((index + 1) * x.P / blocks - first) {}
  TEMPOPS_INLINE int64_t slots() const {
    return pixels;
  }
  template <class scalar>
  TEMPOPS_INLINE static int64_t at(const Frame<scalar>& frame, int64_t c, int64_t pixel) {
    return pixel * frame.sp + c;
  }

  template <bool with_grad, class scalar>
  TEMPOPS_INLINE void add(double* __restrict dot, double* __restrict square, double* __restrict product,
                          Frame<scalar> here, Frame<scalar> next, Frame<scalar> grad) const {
    for (int64_t slot = 0; slot < pixels; ++slot)
      for (int64_t begin = 0; begin < C; begin += kChannels) {
        const int64_t count = std::min(kChannels, C - begin);
        const scalar* __restrict a = here.data + at(here, begin, first + slot);
        const scalar* __restrict b = next.data + at(next, begin, first + slot);
        const scalar* __restrict g = grad.data + at(grad, begin, first + slot);
        acc_t<scalar> ab = 0, bb = 0, gb = 0;
        _Pragma("omp simd reduction(+ : ab, bb, gb)") for (int64_t c = 0; c < count; ++c) {
          const acc_t<scalar> value = load(b[c]);
          ab += load(a[c]) * value;
          bb += value * value;
          if constexpr (with_grad) gb += load(g[c]) * value;
        }
        dot[slot] += ab;
        square[slot] += bb;
        if constexpr (with_grad) product[slot] += gb;
      }
  }

  template <class scalar, class F>
  TEMPOPS_INLINE void write(Frame<scalar> out, const F& f) const {
    for (int64_t slot = 0; slot < pixels; ++slot) {
      scalar* __restrict row = out.data + at(out, 0, first + slot);
      const auto element = f(slot);
      _Pragma("omp simd") for (int64_t c = 0; c < C; ++c) row[c] = store<scalar>(element(c, first + slot));
    }
  }

  template <class F>
  TEMPOPS_INLINE void each_pixel(const F& f) const {
    for (int64_t slot = 0; slot < pixels; ++slot) f(slot, first + slot);
  }
};

// Whether a frame's norm at a pixel counts as zero, decided in the type that eager computes in.
template <class acc>
TEMPOPS_INLINE inline bool is_still(double square, double eps) {
  return static_cast<acc>(std::sqrt(square)) <= static_cast<acc>(eps);
}

// The sums of the pair (t, t+1). `fresh` is set where the walk begins, so that frame t's own sums are not there yet.
template <bool with_grad, class scalar, class Block>
TEMPOPS_INLINE inline void add_pair(Sums& sums, const Block& block, const Clip& x, const Clip& grad, int64_t n,
                                    int64_t t, bool fresh) {
  for (int64_t frame = fresh ? t : t + 1; frame <= t + 1; ++frame) {
    double *square = sums.square[frame % 2], *product = sums.product[frame % 2];
    for (int64_t i = 0; i < block.slots(); ++i) sums.dot[i] = square[i] = product[i] = 0;
    block.template add<with_grad>(sums.dot, square, product, Frame<scalar>(x, n, t), Frame<scalar>(x, n, frame),
                                  Frame<scalar>(grad, n, frame));
  }
}

// The cosine of the pair (t, t+1).
template <class acc>
TEMPOPS_INLINE inline double cosine(const Sums& sums, int64_t t, int64_t slot, double eps) {
  const double here = sums.square[t % 2][slot], next = sums.square[(t + 1) % 2][slot];
  const bool still = is_still<acc>(here, eps) | is_still<acc>(next, eps);
  return still ? 0 : sums.dot[slot] / (std::sqrt(here) * std::sqrt(next));
}

// out is the gated frames, or the similarity [N, T, P] seen as clips of one channel.
template <bool gate, class scalar, class Block>
void forward(const Clip& out, const Clip& x, double eps) {
  using acc = acc_t<scalar>;
  const int64_t blocks = Block::count(x), pairs = x.T - 1;
  parallel(x.N * blocks * pairs, x.C * x.P / blocks, [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    Sums sums;
    alignas(64) acc result[kSlots];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i % pairs, n = i / pairs / blocks;
      const Block block(x, blocks, i / pairs % blocks);
      add_pair<false, scalar>(sums, block, x, x, n, t, t == 0 || i == begin);
      for (int64_t slot = 0; slot < block.slots(); ++slot) {
        const double s = cosine<acc>(sums, t, slot, eps);
        result[slot] = static_cast<acc>(gate ? 1 - s : s);
      }
      for (int64_t frame = t; frame < (t + 2 == x.T ? x.T : t + 1); ++frame) {
        if constexpr (gate) {
          const Frame<scalar> source(x, n, frame);
          block.write(Frame<scalar>(out, n, frame), [&](int64_t slot) TEMPOPS_INLINE {
            return [source, factor = result[slot]](int64_t c, int64_t pixel)
                       TEMPOPS_INLINE { return load(source.data[Block::at(source, c, pixel)]) * factor; };
          });
        } else {
          scalar* map = out.frame<scalar>(n, frame);
          block.each_pixel([&](int64_t slot, int64_t pixel)
                               TEMPOPS_INLINE { map[pixel] = store<scalar>(result[slot]); });
        }
      }
    }
  });
}

// dx of frame t from its neighbours where the clip has them; what lies outside is not read.
template <bool gate, bool previous, bool next, class scalar, class Block>
TEMPOPS_INLINE inline void write_gradient(const Block& block, const Factors<acc_t<scalar>>& factors, const Clip& dx,
                                          const Clip& grad, const Clip& x, int64_t n, int64_t t) {
  const Frame<scalar> g(grad, n, t), before(x, n, t - previous), here(x, n, t), after(x, n, t + next);
  block.write(Frame<scalar>(dx, n, t), [&](int64_t slot) TEMPOPS_INLINE {
    return [=, by_grad = factors.grad[slot], by_here = factors.here[slot], by_before = factors.previous[slot],
            by_after = factors.next[slot]](int64_t c, int64_t pixel) TEMPOPS_INLINE {
      acc_t<scalar> sum = by_here * load(here.data[Block::at(here, c, pixel)]);
      if constexpr (previous) sum += by_before * load(before.data[Block::at(before, c, pixel)]);
      if constexpr (next) sum += by_after * load(after.data[Block::at(after, c, pixel)]);
      if constexpr (gate) sum += by_grad * load(g.data[Block::at(g, c, pixel)]);
      return sum;
    };
  });
}

// With s = cos of (a, b) and h its gradient, da = h (b / |a||b| - s a / |a|^2), and db likewise. The similarity's h is
// its grad; the gate's is -<grad, x>. The last frame's s is a copy, so its gradient adds to the last pair's h.
template <bool gate, class scalar, class Block>
void backward(const Clip& dx, const Clip& grad, const Clip& x, double eps) {
  using acc = acc_t<scalar>;
  const int64_t blocks = Block::count(x), T = x.T;
  parallel(x.N * blocks * T, x.C * x.P / blocks, [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    Sums sums;
    Factors<acc> factors;
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
          const scalar* map = grad.frame<scalar>(n, pair);
          const scalar* copy = grad.frame<scalar>(n, pair + last);
          block.each_pixel([&](int64_t slot, int64_t pixel) TEMPOPS_INLINE {
            sums.product[here][slot] = -static_cast<double>(load(map[pixel]));
            sums.product[next][slot] = -static_cast<double>(load(copy[pixel]));
          });
        }
        for (int64_t slot = 0; slot < block.slots(); ++slot) {
          const double a = sums.square[here][slot], b = sums.square[next][slot];
          const double h = -sums.product[here][slot] - (last ? sums.product[next][slot] : 0);
          const bool still = is_still<acc>(a, eps) | is_still<acc>(b, eps);
          const double scale = still ? 0 : 1 / (std::sqrt(a) * std::sqrt(b));
          const double s = still ? 0 : sums.dot[slot] * scale;
          across[here][slot] = still ? 0 : h * scale;
          along[here][slot] = still ? 0 : h * s;
          factors.grad[slot] = static_cast<acc>(1 - s);
        }
      }
      const int64_t here = t % 2, before = 1 - here;
      for (int64_t slot = 0; slot < block.slots(); ++slot) {
        const double square = sums.square[here][slot];
        const double sum = (t > 0 ? along[before][slot] : 0) + (t + 1 < T ? along[here][slot] : 0);
        factors.here[slot] = static_cast<acc>(is_still<acc>(square, eps) ? 0 : -sum / square);
        factors.previous[slot] = static_cast<acc>(across[before][slot]);
        factors.next[slot] = static_cast<acc>(across[here][slot]);
      }
      if (t == 0)
        write_gradient<gate, false, true, scalar>(block, factors, dx, grad, x, n, t);
      else if (t + 1 == T)
        write_gradient<gate, true, false, scalar>(block, factors, dx, grad, x, n, t);
      else
        write_gradient<gate, true, true, scalar>(block, factors, dx, grad, x, n, t);
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

Clip checked_clips(const Tensor& x, Segments n_segment, double eps) {
  const Clip clip = clips(x, n_segment);
  TEMPOPS_CHECK(clip.T >= 2, "x must have at least 2 frames a clip, got T = ", clip.T);
  TEMPOPS_CHECK(eps >= 0, "eps must be at least 0, got ", eps);
  return clip;
}

// The similarity [N*T, 1, H, W] or [N, 1, T, H, W] is dense in this order, whatever the layout of x.
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
  const Clip ds = clips(dense_argument(grad, x.tensor, "grad"), n_segment, "grad");
  TEMPOPS_CHECK(ds.rank == x.rank && ds.N == x.N && ds.T == x.T && ds.C == 1 && ds.H == x.H && ds.W == x.W,
                "grad has the wrong shape");
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
