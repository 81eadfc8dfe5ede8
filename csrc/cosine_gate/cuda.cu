// temporal_cosine_similarity and cosine_gate on CUDA.
//
// All sums are over the channels of one pixel, so a block takes a tile of pixels of one clip and walks its frames. A
// frame's tile comes from memory once, for the sums of the pair that it ends. It comes from a cache where it begins the
// next pair and where it is written: tiles are small enough that those of all running blocks stay there.
//
// A few channels are added in the accumulation type and these subtotals in float64, so that thousands of channels lose
// no digits.
#include <limits>

#include "../cuda.h"
#include "arguments.h"

namespace tempops {
namespace {

constexpr int kWarps = kThreads / kWarp;
constexpr int kRowBytes = 128;    // of a channel in a tile, planar
constexpr int64_t kBlocks = 528;  // clips are cut into segments of frames until there are that many

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// A tensor of clips. Item q of pixel p of frame t of clip n begins at data + n*sn + t*st + p*sp + q*step. An item has V
// elements: V adjacent channels of a pixel, or a channel of V adjacent pixels.
template <class scalar>
struct Items {
  scalar* data = nullptr;
  int64_t sn = 0, st = 0, sp = 0, step = 0;

  Items() = default;
  Items(const Clip& x, int V)
      : data(x.data<std::remove_const_t<scalar>>()), sn(x.sn), st(x.st), sp(x.sp), step(x.channels_last ? V : x.sc) {}

  __device__ scalar* at(int64_t n, int64_t t, int64_t p) const {
    return data + n * sn + t * st + p * sp;
  }
};

// How a block shares a tile: `members` threads each take every members-th item of one of `positions` places. A place is
// a pixel, or as many adjacent pixels as an item has (planar). Members are neighbours in a warp (channels_last), or
// their places are, and members are in all warps (planar).
struct Tile {
  int64_t N, T, P, items, count;  // count: tiles of a frame
  int positions, members, pixels;
  bool planar;

  Tile(const Clip& x, int V, int A) : N(x.N), T(x.T), P(x.P), planar(!x.channels_last) {
    const auto power_of_two = [](int64_t least, int most) {
      int power = 1;
      while (power < least && power < most) power *= 2;
      return power;
    };
    const int size = static_cast<int>(x.tensor.element_size());
    items = planar ? x.C : x.C / V;
    positions = planar ? power_of_two(P / A, A > 1 ? kRowBytes / size / A : kWarp)
                       : kThreads / power_of_two((items + 1) / 2, kWarp);
    members = kThreads / positions;
    pixels = positions * A;
    count = blocks_for(P, pixels);
  }
};

// How the frames (or pairs) of a clip are cut where there are too few tiles: into `count` segments of `length` each, of
// which the last may be shorter.
struct Cut {
  int64_t frames, length, count;

  Cut(const Tile& tile, int64_t frames_) : frames(frames_) {
    const int64_t wanted = kBlocks / (tile.count * tile.N);
    length = wanted > 1 ? blocks_for(frames, wanted) : frames;
    count = blocks_for(frames, length);
  }
  __device__ int64_t begin(int64_t segment) const {
    return segment * length;
  }
  __device__ int64_t end(int64_t segment) const {
    return (segment + 1) * length < frames ? (segment + 1) * length : frames;
  }
};

// What a thread has of a tile: items of V elements at a place of A pixels.
template <int V, int A>
struct Share {
  int position, member;
  int64_t first, pixel, items;  // first: of the tile

  __device__ explicit Share(const Tile& tile) {
    const int i = static_cast<int>(threadIdx.x);
    position = tile.planar ? i % tile.positions : i / tile.members;
    member = tile.planar ? i / tile.positions : i % tile.members;
    first = static_cast<int64_t>(blockIdx.x) * tile.pixels;
    pixel = first + position * A;
    items = pixel < tile.P ? tile.items : 0;
  }
};

// Adds to sums[0] <here, next>, to sums[1] |next|^2, to sums[2] (where there is one) <grad, next>, per pixel.
template <class scalar, int V, int A, int count>
__device__ void add(double (&sums)[count][A], const scalar* here, const scalar* next, int64_t step, const scalar* grad,
                    int64_t grad_step, const Share<V, A>& share, int members) {
  using acc = acc_t<scalar>;
  constexpr int kBatch = count == 3 ? 2 : 4;  // items that are loaded before the first is used: as registers allow
  for (int64_t begin = share.member; begin < share.items; begin += kBatch * members) {
    Pack<scalar, V> a[kBatch] = {}, b[kBatch] = {}, g[kBatch] = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t q = begin + i * members;
      if (q >= share.items) continue;
      a[i] = Pack<scalar, V>::load(here + q * step);
      b[i] = Pack<scalar, V>::load(next + q * step);
      if constexpr (count == 3) g[i] = Pack<scalar, V>::load(grad + q * grad_step);
    }
    acc subtotals[count][A] = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const acc value = static_cast<acc>(b[i].v[k]);
        subtotals[0][k % A] += static_cast<acc>(a[i].v[k]) * value;
        subtotals[1][k % A] += value * value;
        if constexpr (count == 3) subtotals[2][k % A] += static_cast<acc>(g[i].v[k]) * value;
      }
    }
#pragma unroll
    for (int s = 0; s < count; ++s)
#pragma unroll
      for (int k = 0; k < A; ++k) sums[s][k] += subtotals[s][k];
  }
}

// How many numbers the threads of a block exchange: planar, a number a pixel and warp.
template <class scalar, int A, int count>
constexpr int kPartials = count * (A > 1 ? kWarps * kRowBytes / sizeof(scalar) : kThreads);

// Adds up what the members have. Thread i gets the sums of pixel i of the tile.
template <int V, int A, int count>
__device__ void meet(double (&mine)[count], double (&sums)[count][A], double* partials, const Share<V, A>& share,
                     const Tile& tile) {
  const int i = static_cast<int>(threadIdx.x), end = tile.planar ? kWarp : tile.members;
  for (int mask = tile.planar ? tile.positions : 1; mask < end; mask *= 2)
#pragma unroll
    for (int s = 0; s < count; ++s)
#pragma unroll
      for (int k = 0; k < A; ++k) sums[s][k] += __shfl_xor_sync(0xffffffffu, sums[s][k], mask);
  const int parts = tile.planar ? kWarps : 1, part = tile.planar ? i / kWarp : 0;
  if (tile.planar ? i % kWarp < tile.positions : share.member == 0)
#pragma unroll
    for (int s = 0; s < count; ++s)
#pragma unroll
      for (int k = 0; k < A; ++k) partials[(s * parts + part) * tile.pixels + share.position * A + k] = sums[s][k];
  __syncthreads();
#pragma unroll
  for (int s = 0; s < count; ++s) {
    mine[s] = 0;
    for (int p = 0; p < parts && i < tile.pixels; ++p) mine[s] += partials[(s * parts + p) * tile.pixels + i];
  }
}

// out += factors * frame for a batch of items, in the accumulation type.
template <class scalar, int V, int A>
__device__ void mix(acc_t<scalar> (&out)[V], const Pack<scalar, V>& frame, const acc_t<scalar>* factors) {
#pragma unroll
  for (int k = 0; k < V; ++k) out[k] += factors[k % A] * static_cast<acc_t<scalar>>(frame.v[k]);
}

// |frame| at a pixel; infinite, so that its inverse is 0, where it counts as zero. That is decided in the type that
// eager computes in.
template <class acc>
__device__ double norm(double square, double eps) {
  const double root = sqrt(square);
  return static_cast<acc>(root) <= static_cast<acc>(eps) ? kInfinity : root;
}

// Writes the similarity to `map` [N, T, P] where there is one, else the gated frames to y.
template <class scalar, int V, int A>
__global__ void __launch_bounds__(kThreads, 2)
    forward_kernel(Items<scalar> y, scalar* map, Items<const scalar> x, Tile tile, Cut cut, double eps) {
  using acc = acc_t<scalar>;
  __shared__ double partials[kPartials<scalar, A, 2>];
  __shared__ acc gates[kThreads];
  const Share<V, A> share(tile);
  const int64_t T = tile.T, p = share.first + threadIdx.x;
  const bool owner = threadIdx.x < tile.pixels && p < tile.P;
  for (int64_t i = blockIdx.y; i < tile.N * cut.count; i += gridDim.y) {
    const int64_t n = quotient(i, cut.count), segment = i - n * cut.count;
    const int64_t first = cut.begin(segment), end = cut.end(segment);
    double square = 0;  // of the pair's first frame
    // The first turn is there for that sum alone.
    for (int64_t t = first - 1; t < end; ++t) {
      double sums[2][A] = {}, mine[2];
      const scalar* here = x.at(n, t < first ? first : t, share.pixel);
      add<scalar, V, A, 2>(sums, here, x.at(n, t + 1, share.pixel), x.step, nullptr, 0, share, tile.members);
      meet<V, A, 2>(mine, sums, partials, share, tile);
      if (owner && t >= first) {
        const double s = mine[0] / (norm<acc>(square, eps) * norm<acc>(mine[1], eps));
        if (map) {
          map[(n * T + t) * tile.P + p] = static_cast<scalar>(static_cast<acc>(s));
          if (t + 2 == T) map[(n * T + t + 1) * tile.P + p] = static_cast<scalar>(static_cast<acc>(s));
        } else {
          gates[threadIdx.x] = static_cast<acc>(1 - s);
        }
      }
      square = mine[1];
      __syncthreads();
      if (map || t < first) continue;
      for (int64_t frame = t; frame < (t + 2 == T ? T : t + 1); ++frame) {
        const scalar* from = x.at(n, frame, share.pixel);
        scalar* to = y.at(n, frame, share.pixel);
#pragma unroll 2
        for (int64_t q = share.member; q < share.items; q += tile.members) {
          acc sum[V] = {};
          mix<scalar, V, A>(sum, Pack<scalar, V>::load(from + q * x.step), gates + share.position * A);
          Pack<scalar, V> out;
          for (int k = 0; k < V; ++k) out.v[k] = static_cast<scalar>(sum[k]);
          out.store(to + q * y.step);
        }
      }
    }
  }
}

// With s = cos of (a, b) and h its gradient, da = h (b / |a||b| - s a / |a|^2), and db likewise. The similarity's h is
// its grad, a `map` [N, T, P]; the gate's is -<grad, x>. The last frame's s is a copy, so its gradient adds to the last
// pair's h.
template <class scalar, int V, int A, bool gate>
__global__ void __launch_bounds__(kThreads, 2)
    backward_kernel(Items<scalar> dx, Items<const scalar> grad, const scalar* map, Items<const scalar> x, Tile tile,
                    Cut cut, double eps) {
  using acc = acc_t<scalar>;
  constexpr int kSums = gate ? 3 : 2;
  __shared__ double partials[kPartials<scalar, A, kSums>];
  __shared__ acc by_grad[kThreads], by_here[kThreads], by_previous[kThreads], by_next[kThreads];
  const Share<V, A> share(tile);
  const int64_t T = tile.T, p = share.first + threadIdx.x;
  const bool owner = threadIdx.x < tile.pixels && p < tile.P;
  const int place = share.position * A;
  for (int64_t i = blockIdx.y; i < tile.N * cut.count; i += gridDim.y) {
    const int64_t n = quotient(i, cut.count), segment = i - n * cut.count;
    const int64_t begin = cut.begin(segment), end = cut.end(segment);
    const int64_t first = begin > 0 ? begin - 1 : 0;  // the pair of the frame before is needed too
    double square = 0, product = 0;                   // of frame t
    double across = 0, along = 0;                     // h / |a||b| and h s of the pair (t, t+1)
    // The first turn is there for the first frame's sums alone.
    for (int64_t t = first - 1; t < end; ++t) {
      const double across_before = across, along_before = along;
      double mine[kSums] = {};
      across = along = 0;
      if (t + 1 < T) {
        double sums[kSums][A] = {};
        const scalar* here = x.at(n, t < first ? first : t, share.pixel);
        add<scalar, V, A, kSums>(sums, here, x.at(n, t + 1, share.pixel), x.step,
                                 gate ? grad.at(n, t + 1, share.pixel) : nullptr, grad.step, share, tile.members);
        meet<V, A, kSums>(mine, sums, partials, share, tile);
      }
      if (owner && t >= first) {
        const double size = norm<acc>(square, eps);
        if (t + 1 < T) {
          const double inverse = 1 / (size * norm<acc>(mine[1], eps)), s = mine[0] * inverse;
          double h;
          if constexpr (gate) {
            h = -product - (t + 2 == T ? mine[2] : 0);
          } else {
            const scalar* ds = map + (n * T + t) * tile.P + p;
            h = static_cast<double>(static_cast<acc>(*ds));
            if (t + 2 == T) h += static_cast<double>(static_cast<acc>(ds[tile.P]));
          }
          across = h * inverse;
          along = h * s;
          if (gate) by_grad[threadIdx.x] = static_cast<acc>(1 - s);  // the last frame's gate is the one before
        }
        by_here[threadIdx.x] = static_cast<acc>(-(along_before + along) / (size * size));
        by_previous[threadIdx.x] = static_cast<acc>(across_before);
        by_next[threadIdx.x] = static_cast<acc>(across);
      }
      square = mine[1];
      if constexpr (gate) product = mine[2];
      __syncthreads();
      if (t < begin) continue;
      const scalar* here = x.at(n, t, share.pixel);
      const scalar* previous = here - x.st;
      const scalar* next = here + x.st;
      const scalar* dy = gate ? grad.at(n, t, share.pixel) : nullptr;
      scalar* to = dx.at(n, t, share.pixel);
#pragma unroll 1
      for (int64_t q = share.member; q < share.items; q += tile.members) {
        acc sum[V] = {};
        mix<scalar, V, A>(sum, Pack<scalar, V>::load(here + q * x.step), by_here + place);
        if constexpr (gate) mix<scalar, V, A>(sum, Pack<scalar, V>::load(dy + q * grad.step), by_grad + place);
        if (t > 0) mix<scalar, V, A>(sum, Pack<scalar, V>::load(previous + q * x.step), by_previous + place);
        if (t + 1 < T) mix<scalar, V, A>(sum, Pack<scalar, V>::load(next + q * x.step), by_next + place);
        Pack<scalar, V> out;
        for (int k = 0; k < V; ++k) out.v[k] = static_cast<scalar>(sum[k]);
        out.store(to + q * dx.step);
      }
    }
  }
}

// Calls f with a pointer of the element type, the elements of an item, and the pixels that they belong to: at most
// four, whose sums fit in registers.
template <class... Clips, class F>
void by_item(const F& f, const Clip& x, const Clips&... others) {
  by_dtype(x.dtype, [&](auto* type) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    constexpr int kWide = kWidestBytes / sizeof(scalar);
    constexpr std::integral_constant<int, 1> one;
    constexpr std::integral_constant<int, kWide> channels;
    constexpr std::integral_constant<int, (kWide < 4 ? kWide : 4)> pixels;
    const int V = x.channels_last ? channels : pixels;
    if (!(whole_packs(x, V, x.P) && (whole_packs(others, V, others.P) && ...))) return f(type, one, one);
    x.channels_last ? f(type, channels, one) : f(type, pixels, pixels);
  });
}

Tensor temporal_cosine_similarity(const Tensor& x_, Segments n_segment, double eps) {
  const DeviceGuard guard(x_);
  const Clip x = checked_clips(x_, n_segment, eps);
  const Clip s = empty_clips(x, x.T, 1, x.H, x.W);
  if (x.C == 0) torch::stable::zero_(const_cast<Tensor&>(s.tensor));
  if (x.empty()) return s.tensor;
  by_item([&](auto* type, auto V, auto A) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    const Tile tile(x, V, A);
    const Cut cut(tile, x.T - 1);
    launch(guard, forward_kernel<scalar, V, A>, {tile.count, x.N * cut.count}, Items<scalar>(), s.data<scalar>(),
           Items<const scalar>(x, V), tile, cut, eps);
  }, x);
  return s.tensor;
}

Tensor cosine_gate(const Tensor& x_, Segments n_segment, double eps) {
  const DeviceGuard guard(x_);
  const Clip x = checked_clips(x_, n_segment, eps);
  const Clip y = empty_like(x);
  if (x.empty()) return y.tensor;
  by_item([&](auto* type, auto V, auto A) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    const Tile tile(x, V, A);
    const Cut cut(tile, x.T - 1);
    launch(guard, forward_kernel<scalar, V, A>, {tile.count, x.N * cut.count}, Items<scalar>(y, V), nullptr,
           Items<const scalar>(x, V), tile, cut, eps);
  }, x, y);
  return y.tensor;
}

Tensor temporal_cosine_similarity_backward(const Tensor& grad, const Tensor& x_, Segments n_segment, double eps) {
  const DeviceGuard guard(x_);
  const Clip x = checked_clips(x_, n_segment, eps);
  const Clip ds = similarity_clips(grad, x, n_segment);
  const Clip dx = empty_like(x);
  if (x.empty()) return dx.tensor;
  by_item([&](auto* type, auto V, auto A) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    const Tile tile(x, V, A);
    const Cut cut(tile, x.T);
    launch(guard, backward_kernel<scalar, V, A, false>, {tile.count, x.N * cut.count}, Items<scalar>(dx, V),
           Items<const scalar>(), ds.data<scalar>(), Items<const scalar>(x, V), tile, cut, eps);
  }, x, dx);
  return dx.tensor;
}

Tensor cosine_gate_backward(const Tensor& grad, const Tensor& x_, Segments n_segment, double eps) {
  const DeviceGuard guard(x_);
  const Clip x = checked_clips(x_, n_segment, eps);
  const Clip dy = clips_like(grad, x, "grad");
  const Clip dx = empty_like(x);
  if (x.empty()) return dx.tensor;
  by_item([&](auto* type, auto V, auto A) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    const Tile tile(x, V, A);
    const Cut cut(tile, x.T);
    launch(guard, backward_kernel<scalar, V, A, true>, {tile.count, x.N * cut.count}, Items<scalar>(dx, V),
           Items<const scalar>(dy, V), nullptr, Items<const scalar>(x, V), tile, cut, eps);
  }, x, dy, dx);
  return dx.tensor;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tempops, CUDA, m) {
  m.impl("temporal_cosine_similarity", TORCH_BOX(&temporal_cosine_similarity));
  m.impl("temporal_cosine_similarity_backward", TORCH_BOX(&temporal_cosine_similarity_backward));
  m.impl("cosine_gate", TORCH_BOX(&cosine_gate));
  m.impl("cosine_gate_backward", TORCH_BOX(&cosine_gate_backward));
}

}  // namespace tempops
