// temporal_cosine_similarity and cosine_gate on CUDA.
//
// All sums are over the channels of one pixel, so a block takes a tile of pixels of one clip, with all their channels,
// and walks its frames. What a thread has of a frame comes from memory once and stays in registers until the frame is
// no more needed. Where that is more than 64 bytes a frame, the rest comes from a cache again.
//
// Sums are of a few items, these of a thread, those of a warp, all in the accumulation type, and at last in float64, so
// that thousands of channels lose no digits.
#include <algorithm>

#include "../cuda.h"
#include "arguments.h"

namespace tempops {
namespace {

constexpr int64_t kBlocks = 264;  // clips are cut into segments of frames until there are that many
constexpr int kSector = 32;       // bytes that memory gives at least

// Threads of a block. Planar, the pixels of a tile have their channels far apart: it takes more threads to have both
// many channels and whole sectors of them.
template <int A>
constexpr int kBlock = A > 1 ? 512 : kThreads;

// Items of a frame that a thread keeps in registers, by their bytes.
__host__ __device__ constexpr int held_items(int bytes) {
  return 64 / bytes < 8 ? 64 / bytes : 8;
}

template <class scalar, int V, bool held>
constexpr int kItems = held_items(sizeof(scalar) * V) / (held ? 1 : 2);

// How a block shares a tile. A place is a pixel, or A adjacent pixels (planar). `members` threads each take every
// members-th item of one of `positions` places; an item is V elements of a place, V adjacent channels of a pixel or a
// channel of V = A adjacent pixels. Members are neighbours in a warp (channels_last), or their places are, and members
// are in all warps (planar).
//
// Planar rows of an odd length begin anywhere, but `flat` frames are one run of items. There position i has every
// positions-th item from the i-th on, which are always the same pixels.
struct Tile {
  int64_t N, T, P, items, count;  // count: tiles of a frame
  int positions, members, pixels;
  int nearest, farthest;    // lanes of a warp that share a place are the multiples of `nearest` apart, below `farthest`
  int parts;                // what is left of the sums of a pixel then
  bool planar, flat, held;  // held: whether a thread's items of a frame fit in registers

  Tile(const Clip& x, int V, int threads, bool flat_) : N(x.N), T(x.T), P(x.P), planar(!x.channels_last), flat(flat_) {
    const auto power_of_two = [](int64_t least, int64_t most) {
      int power = 1;
      while (power < least && power < most) power *= 2;
      return power;
    };
    const int bytes = static_cast<int>(V * x.tensor.element_size()), most = held_items(bytes);
    const int A = planar ? V : 1;
    if (flat) {
      items = x.C * P / V;
      positions = threads / period(P, V) * period(P, V);
      members = 1;
    } else if (planar) {
      items = x.C;
      positions = threads / power_of_two(blocks_for(items, most), threads * bytes / kSector);
      positions = std::min({positions, kWarp, power_of_two(P / A, kWarp)});
      members = threads / positions;
    } else {
      items = x.C / V;
      members = power_of_two(std::max(blocks_for(items, most), std::min<int64_t>(items, 2 * kSector / bytes)), threads);
      positions = threads / members;
    }
    nearest = flat ? kWarp : planar ? positions : 1;
    farthest = planar ? kWarp : std::min(members, kWarp);
    pixels = flat ? static_cast<int>(P) : positions * A;
    parts = flat ? static_cast<int>(positions * V / P) : planar ? threads / kWarp : std::max(members / kWarp, 1);
    count = blocks_for(P, pixels);
    held = items <= int64_t(most) * (flat ? positions : members);
  }

  // Items after which the pixels of the first come again.
  static int period(int64_t P, int V) {
    while (P % 2 == 0 && V % 2 == 0) P /= 2, V /= 2;
    return static_cast<int>(P);
  }
  static bool can_be_flat(const Clip& x, int V) {
    return !x.channels_last && x.P >= V && x.P <= kThreads && x.dense_frames() &&
           whole_packs(x, V, x.C * x.P, x.C * x.P);
  }
};

// A tensor of clips: item q of pixel p of frame t of clip n begins at data + n*sn + t*st + p*sp + q*step.
template <class scalar>
struct Items {
  scalar* data = nullptr;
  int64_t sn = 0, st = 0, sp = 0, step = 0;

  Items() = default;
  Items(const Clip& x, int V, const Tile& tile)
      : data(x.data<std::remove_const_t<scalar>>()), sn(x.sn), st(x.st), sp(x.sp), step(tile.flat ? tile.positions * V
                                                                                        : x.channels_last ? V
                                                                                                          : x.sc) {}

  __device__ scalar* at(int64_t n, int64_t t, int64_t p, int64_t q) const {
    return data + n * sn + t * st + p * sp + q * step;
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

// What a thread has of a tile: `count` items of a place of A pixels, which begins at `pixel`.
template <int A>
struct Share {
  int member, count;
  int place;             // in the tile
  int64_t first, pixel;  // first: of the tile

  __device__ Share(const Tile& tile, int64_t which) {
    const int i = static_cast<int>(threadIdx.x);
    const int position = tile.flat ? i : tile.planar ? i % tile.positions : i / tile.members;
    member = tile.flat ? 0 : tile.planar ? i / tile.positions : i % tile.members;
    first = which * tile.pixels;
    pixel = first + position * A;
    if (tile.flat) {
      count = i < tile.positions ? static_cast<int>((tile.items - i + tile.positions - 1) / tile.positions) : 0;
      place = position * A % tile.pixels;
    } else {
      count = pixel < tile.P ? static_cast<int>((tile.items - member + tile.members - 1) / tile.members) : 0;
      place = position * A;
    }
  }

  // The factors of the place's pixels.
  template <class acc>
  struct Few {
    acc of[A];
  };
  template <class acc>
  __device__ Few<acc> factors(const acc* of_tile) const {
    Few<acc> few;
#pragma unroll
    for (int k = 0; k < A; ++k) few.of[k] = of_tile[place + k];
    return few;
  }
};

// K of a thread's items of a frame, as they are in memory: 16-bit elements would take a register each.
template <class scalar, int V, int K>
struct Held {
  typename Pack<scalar, V>::word items[K] = {};

  __device__ void load(const scalar* from, int64_t step, int count) {
#pragma unroll
    for (int i = 0; i < K; ++i, from += step)
      if (i < count) items[i] = *reinterpret_cast<const typename Pack<scalar, V>::word*>(from);
  }
  __device__ Pack<scalar, V> operator[](int i) const {
    Pack<scalar, V> pack;
    memcpy(&pack, &items[i], sizeof(pack));
    return pack;
  }
};

// The elements of a pack in the accumulation type. bfloat16 is the upper half of a float32: widened by pairs, it takes
// one instruction an element and no register between.
template <class scalar, int V>
struct Wide {
  acc_t<scalar> v[V];

  __device__ Wide(const Pack<scalar, V>& pack) {
    if constexpr (std::is_same_v<scalar, BFloat16> && V % 2 == 0) {
      uint32_t pairs[V / 2], bits[V];
      memcpy(pairs, &pack, sizeof(pairs));
#pragma unroll
      for (int k = 0; k < V; ++k) bits[k] = k % 2 ? pairs[k / 2] & 0xffff0000u : pairs[k / 2] << 16;
      memcpy(v, bits, sizeof(v));
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k) v[k] = static_cast<acc_t<scalar>>(pack.v[k]);
    }
  }
};

// Adds to sums[0] <here, next>, to sums[1] |next|^2, to sums[2] (where there is one) <grad, here>, per pixel.
template <class scalar, int V, int K, int A, int count>
__device__ void add(acc_t<scalar> (&sums)[count][A], const Held<scalar, V, K>& here, const Held<scalar, V, K>& next,
                    const Held<scalar, V, K>& grad) {
  using acc = acc_t<scalar>;
  acc subtotals[count][A] = {};
#pragma unroll
  for (int i = 0; i < K; ++i) {
    const Wide<scalar, V> a = here[i], b = next[i], g = grad[i];
#pragma unroll
    for (int k = 0; k < V; ++k) {
      subtotals[0][k % A] += a.v[k] * b.v[k];
      subtotals[1][k % A] += b.v[k] * b.v[k];
      if constexpr (count == 3) subtotals[2][k % A] += g.v[k] * a.v[k];
    }
  }
#pragma unroll
  for (int s = 0; s < count; ++s)
#pragma unroll
    for (int k = 0; k < A; ++k) sums[s][k] += subtotals[s][k];
}

// Adds <grad, frame> to sums. Both are read again: to have them at hand would cost the other frames registers.
template <class scalar, int V, int A>
__device__ void add_product(acc_t<scalar> (&sums)[A], const scalar* frame, int64_t step, const scalar* grad,
                            int64_t grad_step, int count) {
#pragma unroll 4
  for (int i = 0; i < count; ++i, frame += step, grad += grad_step) {
    const Wide<scalar, V> a = Pack<scalar, V>::load(frame), g = Pack<scalar, V>::load(grad);
#pragma unroll
    for (int k = 0; k < V; ++k) sums[k % A] += g.v[k] * a.v[k];
  }
}

// Adds up what the members in a warp have, and shows it to the block.
template <class acc, int A, int count>
__device__ void meet(acc* partials, acc (&sums)[count][A], const Share<A>& share, const Tile& tile) {
  for (int mask = tile.nearest; mask < tile.farthest; mask *= 2)
#pragma unroll
    for (int s = 0; s < count; ++s)
#pragma unroll
      for (int k = 0; k < A; ++k) sums[s][k] += __shfl_xor_sync(0xffffffffu, sums[s][k], mask);
  const int i = static_cast<int>(threadIdx.x), part = (tile.planar ? i : share.member) / kWarp;
  const bool leads = tile.flat     ? i < tile.positions
                     : tile.planar ? i % kWarp < tile.positions
                                   : share.member % kWarp == 0;
  acc* const mine = partials + (tile.flat ? i * A : part * tile.pixels + share.place);
  if (leads)
#pragma unroll
    for (int s = 0; s < count; ++s)
#pragma unroll
      for (int k = 0; k < A; ++k) mine[s * tile.parts * tile.pixels + k] = sums[s][k];
  __syncthreads();
}

// Sum s of a pixel of the tile, the thread's.
template <class acc>
__device__ double total(const acc* partials, int s, const Tile& tile) {
  double sum = 0;
#pragma unroll 4
  for (int part = 0; part < tile.parts; ++part)
    sum += static_cast<double>(partials[(s * tile.parts + part) * tile.pixels + threadIdx.x]);
  return sum;
}

// A factor for each pixel of a tile. After the last one the first ones come again: a flat place may begin at the last
// pixels and end at the first.
template <class acc, int A>
struct Factors {
  acc of[kThreads + A - 1];

  __device__ void set(acc value, const Tile& tile) {
    const int i = static_cast<int>(threadIdx.x);
    of[i] = value;
    if (i < A - 1) of[tile.pixels + i] = value;
  }
};

// out += factors * frame.
template <class scalar, int V, int A>
__device__ void mix(acc_t<scalar> (&out)[V], const Pack<scalar, V>& frame, const acc_t<scalar> (&factors)[A]) {
  const Wide<scalar, V> wide = frame;
#pragma unroll
  for (int k = 0; k < V; ++k) out[k] += factors[k % A] * wide.v[k];
}

// Writes K items, or `count` if that is less; make(out, i) adds the i-th to zeros.
template <int V, int K, class scalar, class F>
__device__ void put(scalar* to, int64_t step, int count, const F& make) {
#pragma unroll
  for (int i = 0; i < K; ++i, to += step) {
    if (i >= count) continue;
    acc_t<scalar> sum[V] = {};
    make(sum, i);
    Pack<scalar, V> out;
#pragma unroll
    for (int k = 0; k < V; ++k) out.v[k] = static_cast<scalar>(sum[k]);
    out.store(to);
  }
}

// 1 / sqrt(x) for normal numbers, but for the last place. rsqrt has a function call for the others, and the registers
// around it would be spilled.
__device__ inline double inverse_root(double x) {
#ifdef __CUDA_ARCH__
  double root;
  asm("rsqrt.approx.ftz.f64 %0, %1;" : "=d"(root) : "d"(x));
  const double error = fma(-x * root, root, 1.);  // of about 20 digits; a step of third order leaves its cube
  return fma(fma(0.375, error, 0.5) * error, root, root);
#else
  return 1 / sqrt(x);
#endif
}

// 1 / |frame| at a pixel, 0 where that counts as zero, which is decided in the type that eager computes in.
template <class acc>
__device__ double inverse_norm(double square, double eps) {
  constexpr double kLeast = 2.2250738585072014e-308;  // what is below is no normal number
  constexpr double kMost = 1.7976931348623157e308;    // what is above is infinite, and its inverse_root no number
  const double inverse = inverse_root(square), root = square * inverse;
  const double norm = fma(fma(-root, root, square), 0.5 * inverse, root);  // as sqrt rounds
  return square < kLeast || square > kMost || static_cast<acc>(norm) <= static_cast<acc>(eps) ? 0 : inverse;
}

// Writes the similarity to `map` [N, T, P] where there is one, else the gated frames to y.
template <class scalar, int V, int A, bool held>
__global__ void __launch_bounds__(kBlock<A>, A > 1 ? 2 : 3)
    forward_kernel(Items<scalar> y, scalar* map, Items<const scalar> x, Tile tile, Cut cut, double eps) {
  using acc = acc_t<scalar>;
  constexpr int K = kItems<scalar, V, held>;
  __shared__ acc partials[2 * kBlock<A> * A];
  __shared__ Factors<acc, A> gates;
  const int64_t i = quotient(blockIdx.x, tile.count), n = quotient(i, cut.count);  // segment i of all
  const Share<A> share(tile, blockIdx.x - i * tile.count);
  const int T = tile.T;
  const int at = static_cast<int>(threadIdx.x);
  const int owners = static_cast<int>(tile.P - share.first < tile.pixels ? tile.P - share.first : tile.pixels);
  const int64_t step = tile.members * x.step, y_step = tile.members * y.step;
  const int first = cut.begin(i - n * cut.count), end = cut.end(i - n * cut.count);
  double inverse = 0;  // of the norm of the pair's first frame
  Held<scalar, V, K> here, next;
  // Of frame t, which is the one before the first in the first turn: that is there for the first frame's norm alone.
  const scalar* from = x.at(n, first - 1, share.pixel, share.member);
  scalar* to =
      map ? map + (n * T + first - 1) * tile.P + share.first + at : y.at(n, first - 1, share.pixel, share.member);
  const auto write = [&] {
    const auto gate = share.factors(gates.of);
#pragma unroll 1
    for (int q = 0; q < (held ? 1 : share.count); q += K) {
      if (!held) here.load(from + q * step, step, share.count - q);
      put<V, K>(to + q * y_step, y_step, share.count - q, [&](acc(&out)[V], int j) { mix(out, here[j], gate.of); });
    }
  };
  for (int t = first - 1; t < end; ++t, from += x.st, to += map ? tile.P : y.st) {
    acc sums[2][A] = {};
#pragma unroll 1
    for (int q = 0; q < (held ? 1 : share.count); q += K) {
      if (!held) here = {}, next = {};
      if (!held && t >= first) here.load(from + q * step, step, share.count - q);
      next.load(from + x.st + q * step, step, share.count - q);
      add(sums, here, next, next);
    }
    meet(partials, sums, share, tile);
    if (at < owners) {
      const double inverse_after = inverse_norm<acc>(total(partials, 1, tile), eps);
      const double s = total(partials, 0, tile) * inverse * inverse_after;
      inverse = inverse_after;
      if (map && t >= first) {
        const auto value = static_cast<scalar>(static_cast<acc>(s));
        *to = value;
        if (t + 2 == T) to[tile.P] = value;
      }
      gates.set(static_cast<acc>(1 - s), tile);
    }
    __syncthreads();
    if (!map && t >= first) write();
    if (held) here = next;
  }
  if (!map && end + 1 == T) write();  // the last frame's gate is the one before
}

// With s = cos of (a, b) and h its gradient, da = h (b / |a||b| - s a / |a|^2), and db likewise. The similarity's h is
// its grad, a `map` [N, T, P]; the gate's is -<grad, x>. The last frame's s is a copy, so its gradient adds to the last
// pair's h.
template <class scalar, int V, int A, bool held, bool gate>
__global__ void __launch_bounds__(kBlock<A>, 512 / kBlock<A>)
    backward_kernel(Items<scalar> dx, Items<const scalar> grad, const scalar* map, Items<const scalar> x, Tile tile,
                    Cut cut, double eps) {
  using acc = acc_t<scalar>;
  constexpr int K = kItems<scalar, V, held>, kSums = gate ? 3 : 2;
  __shared__ acc partials[kSums * kBlock<A> * A];
  __shared__ Factors<acc, A> by_grad, by_before, by_here, by_next;
  __shared__ double inverses[kThreads], alongs[kThreads];  // an owner's own: 1 / |frame t|, h s of the pair (t-1, t)
  const int64_t i = quotient(blockIdx.x, tile.count), n = quotient(i, cut.count);  // segment i of all
  const Share<A> share(tile, blockIdx.x - i * tile.count);
  const int T = tile.T;
  const int at = static_cast<int>(threadIdx.x);
  const int owners = static_cast<int>(tile.P - share.first < tile.pixels ? tile.P - share.first : tile.pixels);
  const int64_t step = tile.members * x.step, grad_step = tile.members * grad.step, dx_step = tile.members * dx.step;
  const int begin = cut.begin(i - n * cut.count), end = cut.end(i - n * cut.count);
  const int first = begin > 0 ? begin - 1 : 0;  // the pair of the frame before is needed too
  Held<scalar, V, K> before, here, next, dy;
  // Of frame t, which is the one before the first in the first turn: that is there for the first frame's norm alone.
  const scalar* from = x.at(n, first - 1, share.pixel, share.member);
  const scalar* dy_from =
      gate ? grad.at(n, first - 1, share.pixel, share.member) : map + (n * T + first - 1) * tile.P + share.first + at;
  scalar* to = dx.at(n, first - 1, share.pixel, share.member);
  for (int t = first - 1; t < end; ++t, from += x.st, dy_from += gate ? grad.st : tile.P, to += dx.st) {
    if (held && gate && t >= first) dy.load(dy_from, grad_step, share.count);
    if (t + 1 < T) {
      acc sums[kSums][A] = {};
#pragma unroll 1
      for (int q = 0; q < (held ? 1 : share.count); q += K) {
        if (!held) here = {}, next = {}, dy = {};
        if (!held && t >= first) here.load(from + q * step, step, share.count - q);
        if (!held && gate && t >= first) dy.load(dy_from + q * grad_step, grad_step, share.count - q);
        next.load(from + x.st + q * step, step, share.count - q);
        add(sums, here, next, dy);
      }
      if constexpr (gate)
        if (t + 2 == T) add_product<scalar, V>(sums[2], from + x.st, step, dy_from + grad.st, grad_step, share.count);
      meet(partials, sums, share, tile);
    } else {
      __syncthreads();  // the last turn's factors are read
    }
    if (at < owners) {
      const double inverse = t >= first ? inverses[at] : 0, along_before = t > first ? alongs[at] : 0;
      double inverse_after = 0, across = 0, along = 0;
      if (t + 1 < T) inverse_after = inverse_norm<acc>(total(partials, 1, tile), eps);
      if (t >= first && t + 1 < T) {
        const double s = total(partials, 0, tile) * inverse * inverse_after;
        double h;
        if constexpr (gate) {
          h = -total(partials, 2, tile);
          by_grad.set(static_cast<acc>(1 - s), tile);  // the last frame's gate is the one before
        } else {
          h = static_cast<double>(static_cast<acc>(*dy_from));
          if (t + 2 == T) h += static_cast<double>(static_cast<acc>(dy_from[tile.P]));
        }
        across = h * inverse * inverse_after;
        along = h * s;
      }
      by_before.set(t > first ? by_next.of[at] : acc(0), tile);
      by_here.set(static_cast<acc>(-(along_before + along) * inverse * inverse), tile);
      by_next.set(static_cast<acc>(across), tile);
      inverses[at] = inverse_after;
      alongs[at] = along;
    }
    __syncthreads();
    if (t >= begin) {
      const auto of_before = share.factors(by_before.of), of_here = share.factors(by_here.of),
                 of_next = share.factors(by_next.of), of_grad = share.factors(gate ? by_grad.of : by_here.of);
#pragma unroll 1
      for (int q = 0; q < (held ? 1 : share.count); q += K) {
        if (!held) {
          const int left = share.count - q;
          here.load(from + q * step, step, left);
          if (gate) dy.load(dy_from + q * grad_step, grad_step, left);
          if (t > 0) before.load(from - x.st + q * step, step, left);
          if (t + 1 < T) next.load(from + x.st + q * step, step, left);
        }
        put<V, K>(to + q * dx_step, dx_step, share.count - q, [&](acc(&out)[V], int j) {
          mix(out, here[j], of_here.of);
          if (gate) mix(out, dy[j], of_grad.of);
          if (t > 0) mix(out, before[j], of_before.of);
          if (t + 1 < T) mix(out, next[j], of_next.of);
        });
      }
    }
    if (held) {
      before = here;
      here = next;
    }
  }
}

// Calls f with a pointer of the element type, the tile, and as constants the elements of an item, the pixels that they
// belong to, which are at most four, so that their sums fit in registers, and whether a thread's items do.
template <class... Clips, class F>
void by_item(const F& f, const Clip& x, const Clips&... others) {
  by_dtype(x.dtype, [&](auto* type) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    constexpr int kWide = kWidestBytes / sizeof(scalar);
    constexpr std::integral_constant<int, 1> one;
    constexpr std::integral_constant<int, kWide> channels;
    constexpr std::integral_constant<int, (kWide < 4 ? kWide : 4)> pixels;
    const int V = x.channels_last ? channels : pixels;
    const bool whole = whole_packs(x, V, x.P) && (whole_packs(others, V, others.P) && ...);
    if (x.channels_last) {
      const Tile tile(x, channels, kBlock<1>, false);
      if (whole && tile.held) return f(type, tile, channels, one, std::true_type());
    } else {
      const auto can_be_flat = [&](const Clip& clip) { return Tile::can_be_flat(clip, pixels); };
      const bool flat = !whole && can_be_flat(x) && (can_be_flat(others) && ...);
      if (whole || flat) {
        const Tile tile(x, pixels, kBlock<pixels>, flat);
        return tile.held ? f(type, tile, pixels, pixels, std::true_type())
                         : f(type, tile, pixels, pixels, std::false_type());
      }
    }
    f(type, Tile(x, 1, kBlock<1>, false), one, one, std::false_type());
  });
}

Tensor temporal_cosine_similarity(const Tensor& x_, Segments n_segment, double eps) {
  const DeviceGuard guard(x_);
  const Clip x = checked_clips(x_, n_segment, eps);
  const Clip s = empty_clips(x, x.T, 1, x.H, x.W);
  if (x.C == 0) torch::stable::zero_(const_cast<Tensor&>(s.tensor));
  if (x.empty()) return s.tensor;
  by_item([&](auto* type, const Tile& tile, auto V, auto A, auto held) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    const Cut cut(tile, x.T - 1);
    launch(guard, forward_kernel<scalar, V, A, held>, {tile.count * x.N * cut.count, 1, kBlock<A>}, Items<scalar>(),
           s.data<scalar>(), Items<const scalar>(x, V, tile), tile, cut, eps);
  }, x);
  return s.tensor;
}

Tensor cosine_gate(const Tensor& x_, Segments n_segment, double eps) {
  const DeviceGuard guard(x_);
  const Clip x = checked_clips(x_, n_segment, eps);
  const Clip y = empty_like(x);
  if (x.empty()) return y.tensor;
  by_item([&](auto* type, const Tile& tile, auto V, auto A, auto held) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    const Cut cut(tile, x.T - 1);
    launch(guard, forward_kernel<scalar, V, A, held>, {tile.count * x.N * cut.count, 1, kBlock<A>},
           Items<scalar>(y, V, tile), nullptr, Items<const scalar>(x, V, tile), tile, cut, eps);
  }, x, y);
  return y.tensor;
}

Tensor temporal_cosine_similarity_backward(const Tensor& grad, const Tensor& x_, Segments n_segment, double eps) {
  const DeviceGuard guard(x_);
  const Clip x = checked_clips(x_, n_segment, eps);
  const Clip ds = similarity_clips(grad, x, n_segment);
  const Clip dx = empty_like(x);
  if (x.empty()) return dx.tensor;
  by_item([&](auto* type, const Tile& tile, auto V, auto A, auto held) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    const Cut cut(tile, x.T);
    launch(guard, backward_kernel<scalar, V, A, held, false>, {tile.count * x.N * cut.count, 1, kBlock<A>},
           Items<scalar>(dx, V, tile), Items<const scalar>(), ds.data<scalar>(), Items<const scalar>(x, V, tile), tile,
           cut, eps);
  }, x, dx);
  return dx.tensor;
}

Tensor cosine_gate_backward(const Tensor& grad, const Tensor& x_, Segments n_segment, double eps) {
  const DeviceGuard guard(x_);
  const Clip x = checked_clips(x_, n_segment, eps);
  const Clip dy = clips_like(grad, x, "grad");
  const Clip dx = empty_like(x);
  if (x.empty()) return dx.tensor;
  by_item([&](auto* type, const Tile& tile, auto V, auto A, auto held) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    const Cut cut(tile, x.T);
    launch(guard, backward_kernel<scalar, V, A, held, true>, {tile.count * x.N * cut.count, 1, kBlock<A>},
           Items<scalar>(dx, V, tile), Items<const scalar>(dy, V, tile), nullptr, Items<const scalar>(x, V, tile), tile,
           cut, eps);
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
