// bidirectional_difference on CUDA.
//
// The 3x3 product of frame t is computed once and subtracted from frame t - 1 (`forward`) and frame t + 1 (`backward`).
// A thread has V channels of a pixel (V = 1 where planar) and walks T. It reads its window through the first-level
// cache, as the threads of a tile read much the same pixels. Likewise the backward adds up what the two gradients say
// of the product of frame t, transposes the product once, and correlates the same window with x for the weight.
#include <algorithm>

#include "../cuda.h"
#include "arguments.h"

namespace tempops {
namespace {

constexpr int kTaps = 9;
constexpr int kSector = 32;              // bytes that memory moves at least
constexpr int64_t kEnoughBlocks = 2048;  // more than that would only be more partial sums of the weight's gradient

// The most channels that a thread may have: what leaves registers beside the weights, and the backward's sums too.
constexpr int kForward = 4, kBackward = 2;

// How blocks cut a frame: into packs of V channels, and into pixels, taken row by row of a strip of columns, so that a
// tile is about as high as it is wide and few windows reach out of it.
struct Tiles {
  int64_t N, T, C, H, W;
  int64_t columns, pixels;  // of a strip; of all strips, with those past the last column
  int64_t channel_tiles, pixel_tiles;
  int of_channels, of_pixels;  // packs and pixels of a tile
  bool channels_last;

  Tiles(const Clip& x, int V) : N(x.N), T(x.T), C(x.C), H(x.H), W(x.W), channels_last(x.channels_last) {
    const int64_t packs = C / V, strips = blocks_for(W, channels_last ? 8 : 64);
    columns = blocks_for(W, strips);
    pixels = strips * H * columns;
    const int64_t least = channels_last ? std::min<int64_t>(packs, kSector / (V * x.tensor.element_size())) : 1;
    of_pixels = static_cast<int>(std::min(pixels, kThreads / least));
    of_channels = static_cast<int>(std::min(packs, kThreads / of_pixels / least * least));
    channel_tiles = blocks_for(packs, of_channels);
    pixel_tiles = blocks_for(pixels, of_pixels);
  }
  int64_t blocks() const {
    return channel_tiles * pixel_tiles;
  }
};

// The channels from c on of one pixel, which a thread has.
template <int V>
struct Spot {
  int m;  // the pixel's place in the tile, past its end where the thread has none
  uint32_t c, p, pixel_tile;
  bool inside, above, below, left, right;  // the frame; has such neighbours

  __device__ explicit Spot(const Tiles& tiles) {
    const int thread = threadIdx.x;
    const int k = tiles.channels_last ? thread % tiles.of_channels : thread / tiles.of_pixels;
    m = tiles.channels_last ? thread / tiles.of_channels : thread % tiles.of_pixels;
    if (k >= tiles.of_channels) m = tiles.of_pixels;
    const int64_t tile = quotient(blockIdx.x, tiles.channel_tiles);
    pixel_tile = static_cast<uint32_t>(tile);
    c = static_cast<uint32_t>(((blockIdx.x - tile * tiles.channel_tiles) * tiles.of_channels + k) * V);
    const int64_t at = tile * tiles.of_pixels + m, strip = quotient(at, tiles.H * tiles.columns);
    const int64_t rest = at - strip * tiles.H * tiles.columns, i = quotient(rest, tiles.columns);
    const int64_t j = strip * tiles.columns + rest - i * tiles.columns;
    p = static_cast<uint32_t>(i * tiles.W + j);
    inside = m < tiles.of_pixels && at < tiles.pixels && j < tiles.W && c < tiles.C;
    above = i > 0;
    below = i + 1 < tiles.H;
    left = j > 0;
    right = j + 1 < tiles.W;
  }
  // Whether a tap reads a pixel of the frame.
  __device__ bool reads(int tap) const {
    return (tap >= 3 || above) && (tap < 6 || below) && (tap % 3 != 0 || left) && (tap % 3 != 2 || right);
  }
};

// A tensor of clips. Where an element is within a frame takes 32 bits: a window has nine such places.
template <class scalar>
struct Places {
  scalar* data;
  int64_t sn, st;
  uint32_t sc, sp, row;

  explicit Places(const Clip& x)
      : data(x.data<std::remove_const_t<scalar>>()), sn(x.sn), st(x.st), sc(static_cast<uint32_t>(x.sc)),
        sp(static_cast<uint32_t>(x.sp)), row(static_cast<uint32_t>(x.W * x.sp)) {
    TEMPOPS_CHECK((x.C - 1) * x.sc + (x.P - 1) * x.sp <= 0xffffffff, "frames across 2^32 elements are not supported");
  }

  __device__ scalar* frame(int64_t n, int64_t t) const {
    return data + n * sn + t * st;
  }
  // Where a tap reads.
  template <int V>
  __device__ uint32_t place(const Spot<V>& spot, int tap = kTaps / 2) const {
    return spot.c * sc + spot.p * sp + (tap / 3 - 1) * row + (tap % 3 - 1) * sp;
  }
};

// The weights of V channels; turned around for the transposed product.
template <class scalar, int V>
__device__ void load_taps(acc_t<scalar> (&taps)[kTaps][V], const scalar* weight, int64_t c, bool transposed) {
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      taps[tap][k] = static_cast<acc_t<scalar>>(weight[(c + k) * kTaps + (transposed ? kTaps - 1 - tap : tap)]);
    }
  }
}

template <class scalar, int V>
__global__ void __launch_bounds__(kThreads)
    difference_kernel(Places<scalar> forward, Places<scalar> backward, Places<const scalar> x, const scalar* weight,
                      Tiles tiles, acc_t<scalar> sign) {
  using acc = acc_t<scalar>;
  using Values = Pack<scalar, V>;
  const Spot<V> spot(tiles);
  if (!spot.inside) return;
  acc taps[kTaps][V];
  load_taps<scalar, V>(taps, weight, spot.c, false);
  for (int64_t n = blockIdx.y; n < tiles.N; n += gridDim.y) {
    Values past{};  // of frame t - 1, as is the product until that of frame t is there
    acc product[V] = {};
    for (int64_t t = 0; t < tiles.T; ++t) {
      const scalar* frame = x.frame(n, t);
      Values window[kTaps];
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        window[tap] = spot.reads(tap) ? Values::load(frame + x.place(spot, tap)) : Values{};
      }
      const Values centre = window[kTaps / 2];
      Values out{};
      if (t > 0) {
#pragma unroll
        for (int k = 0; k < V; ++k) {
          out.v[k] = static_cast<scalar>(sign * (static_cast<acc>(centre.v[k]) - product[k]));
        }
      }
      out.store(backward.frame(n, t) + backward.place(spot));
#pragma unroll
      for (int k = 0; k < V; ++k) {
        product[k] = 0;
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) product[k] += taps[tap][k] * static_cast<acc>(window[tap].v[k]);
      }
      if (t > 0) {
#pragma unroll
        for (int k = 0; k < V; ++k) {
          out.v[k] = static_cast<scalar>(sign * (static_cast<acc>(past.v[k]) - product[k]));
        }
        out.store(forward.frame(n, t - 1) + forward.place(spot));
      }
      past = centre;
    }
    Values{}.store(forward.frame(n, tiles.T - 1) + forward.place(spot));
  }
}

// Adds up the sums of the pixels of a tile, pairwise; pixel 0 gets them. Thread + step has the next pixel.
template <class acc, int V>
__device__ void add_pixels(acc (&sums)[kTaps][V], int m, int pixels, int step) {
  __shared__ acc others[kTaps * V][kThreads];
  const int thread = threadIdx.x;
  while (pixels > 1) {
    const int half = (pixels + 1) / 2;
    if (m >= half && m < pixels) {
#pragma unroll
      for (int i = 0; i < kTaps * V; ++i) others[i][thread] = sums[i / V][i % V];
    }
    __syncthreads();
    if (m + half < pixels) {
#pragma unroll
      for (int i = 0; i < kTaps * V; ++i) sums[i / V][i % V] += others[i][thread + half * step];
    }
    pixels = half;  // the next round writes where none of this one reads
  }
}

// dx where it is asked for, and the tile's part of the weight's gradient, [C, 9, parts], where that is. Both gradients
// have the same strides within a frame, so that one set of places does for both.
template <class scalar, int V>
__global__ void __launch_bounds__(kThreads, 2)
    backward_kernel(Places<scalar> dx, double* partials, Places<const scalar> forward, Places<const scalar> backward,
                    Places<const scalar> x, const scalar* weight, Tiles tiles, acc_t<scalar> sign) {
  using acc = acc_t<scalar>;
  using Values = Pack<scalar, V>;
  const Spot<V> spot(tiles);
  acc sums[kTaps][V] = {};
  if (spot.inside) {
    acc taps[kTaps][V];
    load_taps<scalar, V>(taps, weight, spot.c, true);
    for (int64_t n = blockIdx.y; n < tiles.N; n += gridDim.y) {
      for (int64_t t = 0; t < tiles.T; ++t) {
        const bool has_past = t > 0, has_future = t + 1 < tiles.T;
        const scalar *past = forward.frame(n, t - 1), *future = backward.frame(n, t + 1);
        Values of_forward{}, of_backward{}, here{};
        if (has_future) of_forward = Values::load(forward.frame(n, t) + forward.place(spot));
        if (has_past) of_backward = Values::load(backward.frame(n, t) + forward.place(spot));
        if (partials && (has_past || has_future)) here = Values::load(x.frame(n, t) + x.place(spot));
        acc product[V] = {};
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) {
          const bool reads = spot.reads(tap);
          Values a{}, b{};
          if (reads && has_past) a = Values::load(past + forward.place(spot, tap));
          if (reads && has_future) b = Values::load(future + forward.place(spot, tap));
#pragma unroll
          for (int k = 0; k < V; ++k) {
            const acc sum = static_cast<acc>(a.v[k]) + static_cast<acc>(b.v[k]);
            product[k] += taps[tap][k] * sum;
            if (reads) sums[tap][k] += static_cast<acc>(here.v[k]) * sum;
          }
        }
        if (dx.data) {
          Values out;
#pragma unroll
          for (int k = 0; k < V; ++k) {
            const acc sum = static_cast<acc>(of_forward.v[k]) + static_cast<acc>(of_backward.v[k]);
            out.v[k] = static_cast<scalar>(sign * (sum - product[k]));
          }
          out.store(dx.frame(n, t) + dx.place(spot));
        }
      }
    }
  }
  if (!partials) return;
  add_pixels<acc, V>(sums, spot.m, tiles.of_pixels, tiles.channels_last ? tiles.of_channels : 1);
  if (spot.m != 0 || spot.c >= tiles.C) return;
  const int64_t c = spot.c, parts = tiles.pixel_tiles * gridDim.y;
  double* part = partials + static_cast<int64_t>(spot.pixel_tile) * gridDim.y + blockIdx.y;
#pragma unroll
  for (int i = 0; i < kTaps * V; ++i) {  // the window was that of the transposed product
    part[((c + i % V) * kTaps + kTaps - 1 - i / V) * parts] = sums[i / V][i % V];
  }
}

// A warp adds up the parts of one element of the weight's gradient.
template <class scalar>
__global__ void __launch_bounds__(kThreads)
    weight_kernel(scalar* dweight, const double* partials, int64_t elements, int64_t parts, acc_t<scalar> sign) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (i >= elements) return;
  double sum = 0;
  for (int64_t part = threadIdx.x % kWarp; part < parts; part += kWarp) sum += partials[i * parts + part];
  for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  if (threadIdx.x % kWarp == 0) dweight[i] = static_cast<scalar>(static_cast<acc_t<scalar>>(-sign * sum));
}

// Calls f with a null pointer of the element type and with the channels of a thread as a constant.
template <int most, class F, class... Clips>
void by_channels(const F& f, const Clip& x, const Clips&... others) {
  by_dtype(x.dtype, [&](auto* type) {
    constexpr int kWide = sizeof(*type) == 8 ? most / 2 : most;
    const Frame frame(x, others...);
    const bool wide = x.channels_last && x.C % kWide == 0 && frame.width(x, others...) > 1;
    wide ? f(type, std::integral_constant<int, kWide>()) : f(type, std::integral_constant<int, 1>());
  });
}

std::tuple<Tensor, Tensor> bidirectional_difference(const Tensor& x_, const Tensor& weight_, Segments n_segment,
                                                    bool neighbor_first) {
  const DeviceGuard guard(x_);
  const Clip x = clips(x_, n_segment);
  const Tensor weight = checked_weight(weight_, x);
  const Clip forward = empty_like(x), backward = empty_like(x);
  if (x.empty()) return {forward.tensor, backward.tensor};
  by_channels<kForward>([&](auto* type, auto V) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    const Tiles tiles(x, V);
    launch(guard, difference_kernel<scalar, V>, {tiles.blocks(), x.N}, Places<scalar>(forward),
           Places<scalar>(backward), Places<const scalar>(x), static_cast<const scalar*>(weight.data_ptr()), tiles,
           neighbor_first ? -1 : 1);
  }, x, forward, backward);
  return {forward.tensor, backward.tensor};
}

// x without gaps between its frames' elements, in its layout.
Clip dense(const Clip& x) {
  const Segments n_segment = x.rank == 4 ? Segments(x.T) : std::nullopt;
  return clips(torch::stable::contiguous(x.tensor, memory_format(x.rank, x.channels_last)), n_segment, "x", &x);
}

std::tuple<Tensor, Tensor> bidirectional_difference_backward(const Tensor& grad_forward, const Tensor& grad_backward,
                                                             const Tensor& x_, const Tensor& weight_,
                                                             Segments n_segment, bool neighbor_first, bool need_x,
                                                             bool need_weight) {
  const DeviceGuard guard(x_);
  const Clip x = clips(x_, n_segment);
  const Tensor weight = checked_weight(weight_, x);
  Clip forward = clips_like(grad_forward, x, "grad_forward");
  Clip backward = clips_like(grad_backward, x, "grad_backward");
  if (forward.sc != backward.sc || forward.sp != backward.sp) {  // slices of tensors that differ in width
    forward = dense(forward);
    backward = dense(backward);
  }
  const std::optional<Clip> dx = need_x ? std::optional(empty_like(x)) : std::nullopt;
  const Tensor dweight = need_weight ? torch::stable::new_empty(weight, weight.sizes()) : no_gradient(weight);
  by_channels<kBackward>([&](auto* type, auto V) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    const acc_t<scalar> sign = neighbor_first ? -1 : 1;
    std::optional<Tensor> scratch;
    double* partials = nullptr;
    int64_t parts = 0;
    if (!x.empty() && (need_x || need_weight)) {
      const Tiles tiles(x, V);
      const int64_t groups = need_weight ? std::min(x.N, blocks_for(kEnoughBlocks, tiles.blocks())) : x.N;
      if (need_weight) {
        parts = tiles.pixel_tiles * std::min<int64_t>(groups, 65535);
        scratch = torch::stable::empty({x.C, kTaps, parts}, ScalarType::Double, std::nullopt, x.tensor.device());
        partials = static_cast<double*>(scratch->data_ptr());
      }
      Places<scalar> of_x(dx ? *dx : x);
      if (!dx) of_x.data = nullptr;
      launch(guard, backward_kernel<scalar, V>, {tiles.blocks(), groups}, of_x, partials, Places<const scalar>(forward),
             Places<const scalar>(backward), Places<const scalar>(x), static_cast<const scalar*>(weight.data_ptr()),
             tiles, sign);
    }
    if (!need_weight) return;
    launch(guard, weight_kernel<scalar>, {blocks_for(x.C * kTaps * kWarp)}, static_cast<scalar*>(dweight.data_ptr()),
           static_cast<const double*>(partials), x.C * kTaps, parts, sign);
  }, x, forward, backward, dx ? *dx : x);
  return {dx ? dx->tensor : no_gradient(x.tensor), dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tempops, CUDA, m) {
  m.impl("bidirectional_difference", TORCH_BOX(&bidirectional_difference));
  m.impl("bidirectional_difference_backward", TORCH_BOX(&bidirectional_difference_backward));
}

}  // namespace tempops
