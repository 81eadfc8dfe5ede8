// shift_conv1x1 on CUDA: a matrix product on tensor cores in which the shift is an address. The forward loads each
// block of channels from the frame that the shift names, the gradient of x is stored to it, and the gradient of the
// weight loads x as the forward does. Nothing but the results is written.
//
// Where ATen's convolution after a shift is expected to be faster, that is what runs: see kMostOutputs.
#include <cuda_pipeline_primitives.h>

#include <algorithm>

#include "convolution.h"
#include "tensor_cores.h"

namespace tempops {
namespace {

// A block's part of a product is kLong pixels (of the gradient of the weight, input channels) by 64 or 128 output
// channels, and it takes 128 bytes of the summed dimension at a time, in kParts parts. 128 are for products that
// arithmetic may bound: with fewer, more would be loaded from shared memory and from the second-level cache than those
// deliver.
constexpr int kLong = 256;
constexpr int kParts = 4;
template <class scalar>
constexpr int kWide = kWidestBytes / sizeof(scalar);
template <class scalar>
constexpr int kDepth = 128 / sizeof(scalar);
template <int outputs>
constexpr int kBlocks = outputs == 64 ? 2 : 1;  // of a multiprocessor
template <int outputs>
constexpr int kStages = outputs == 64 ? 2 : 3;  // of shared memory: all but one are on their way

// Clips as the kernels go through them: pixels count through all frames, and a channel's frame is moved by `shift`. The
// stride of a dimension of size 1 may be any: it is left out, as addresses outside of the clip have to be aligned too.
template <class scalar>
struct Pixels {
  scalar* data;
  int64_t sn, st, sc, sp;
  int64_t to_frame, to_clip;  // from behind the last pixel of a frame, the last frame of a clip, to the next one
  uint32_t count, T, P;
  int C, fold, first, second;

  Pixels(const Clip& x, const Shift& shift)
      : data(x.data<std::remove_const_t<scalar>>()), sn(x.N > 1 ? x.sn : 0), st(x.T > 1 ? x.st : 0), sc(x.sc), sp(x.sp),
        to_frame(st - x.P * sp), to_clip(sn - x.T * st), count(x.N * x.T * x.P), T(x.T), P(x.P), C(x.C),
        fold(shift.fold), first(shift.first), second(shift.second) {}

  __device__ int offset(int c) const {
    return c < fold ? first : c < 2 * fold ? second : 0;
  }
};

// A pixel: where channel 0 of it is, and its frame. Going on takes no division.
template <class scalar>
struct Cursor {
  scalar* at;
  uint32_t q, p, t;

  __device__ Cursor(const Pixels<scalar>& x, uint32_t start) : q(start) {
    const uint32_t frame = q / x.P, n = frame / x.T;
    p = q - frame * x.P;
    t = frame - n * x.T;
    at = x.data + n * x.sn + t * x.st + p * x.sp;
  }
  __device__ void advance(const Pixels<scalar>& x, int pixels) {
    q += pixels;
    p += pixels;
    at += pixels * x.sp;
    while (p >= x.P) {
      p -= x.P;
      at += x.to_frame;
      if (++t < x.T) continue;
      t = 0;
      at += x.to_clip;
    }
  }
};

// V elements from global to shared memory while the threads go on; zeros where `there` is false.
template <int V, class scalar>
__device__ void load_async(scalar* shared, const scalar* from, bool there) {
  constexpr int bytes = V * sizeof(scalar);
  __pipeline_memcpy_async(shared, from, bytes, there ? 0 : bytes);
}

// A tile in shared memory, loaded by all threads: each takes kItems times V elements, kPass lines apart, in kParts
// parts. Padding puts what one instruction reads of it on different banks: 16 bytes of eight lines, or, where float32's
// lines are not along the sum, eight elements of four lines.
template <class scalar, int V, bool summed_along, int lines, int length>
struct Tile {
  static constexpr int pitch = length + (sizeof(scalar) == 4 && !summed_along ? 8 : kWide<scalar>);
  static constexpr int size = lines * pitch;
  static constexpr int kPacks = length / V, kPass = kThreads / kPacks, kItems = lines / kPass;
  static_assert(kThreads % kPacks == 0 && lines % kPass == 0 && size * sizeof(scalar) % 32 == 0);

  __device__ static int line() {
    return kPacks == kThreads ? 0 : threadIdx.x / kPacks;
  }
  __device__ static int at() {
    return threadIdx.x % kPacks * V;
  }
  // The factor's part in the block of 16 lines from `line` on, or of elements where the sum is not along the lines.
  template <bool left>
  __device__ static Block block(const scalar* shared, int line, int k) {
    return Block::load<scalar, left, summed_along, pitch>(shared +
                                                          (summed_along ? line * pitch + k : k * pitch + line));
  }
  // Calls f(item, where it belongs in shared memory) for each item of a part.
  template <int unrolled = kItems, class F>
  __device__ static void items(scalar* shared, int part, const F& f) {
#pragma unroll unrolled
    for (int item = part * kItems / kParts; item < (part + 1) * kItems / kParts; ++item)
      f(item, shared + (line() + item * kPass) * pitch + at());
  }
};

// Of clips, lines as in global memory: pixels of `length` adjacent channels (channels_last) or channels of `length`
// adjacent pixels.
template <class scalar, int V, bool channels_last, bool summed_along, int lines, int length>
struct ClipTile : Tile<scalar, V, summed_along, lines, length> {
  using Base = Tile<scalar, V, summed_along, lines, length>;

  // What a thread loads. Where lines are pixels, it goes on with them as it does.
  struct Loader {
    Cursor<const scalar> place;
    int c, offset;
    int64_t move;

    // Of the tile that begins with pixel q and channel c0.
    __device__ Loader(const Pixels<const scalar>& x, uint32_t q, int c0)
        : place(x, q + (channels_last ? Base::line() : Base::at())) {
      go_to(x, c0);
    }
    __device__ void go_to(const Pixels<const scalar>& x, int c0) {
      c = c0 + (channels_last ? Base::at() : Base::line());
      offset = x.offset(c);
      move = (channels_last ? c : c * x.sc) + offset * x.st;
    }
    __device__ void load(scalar* shared, const Pixels<const scalar>& x, int part) {
      // Where all steps have the same channels, one for each item, the items' addresses would all stay in registers.
      constexpr int unrolled = channels_last || !summed_along ? Base::kItems : 1;
      Base::template items<unrolled>(shared, part, [&](int item, scalar* to) {
        if constexpr (channels_last) {
          load_async<V>(to, place.at + move, c < x.C && place.q < x.count && place.t + offset < x.T);
          place.advance(x, Base::kPass);
        } else {
          const int channel = c + item * Base::kPass, offset = x.offset(channel);
          const bool there = channel < x.C && place.q < x.count && place.t + offset < x.T;
          load_async<V>(to, place.at + channel * x.sc + offset * x.st, there);
        }
      });
    }
  };
};

// Of the weight [rows, depth].
template <class scalar, int lines>
struct WeightTile : Tile<scalar, kWide<scalar>, true, lines, kDepth<scalar>> {
  using Base = Tile<scalar, kWide<scalar>, true, lines, kDepth<scalar>>;

  struct Loader {
    const scalar* from;
    int row, k;

    __device__ Loader(const scalar* weight, int depth, int row0) : row(row0 + Base::line()), k(Base::at()) {
      from = weight + static_cast<int64_t>(row) * depth + k;
    }
    __device__ void load(scalar* shared, int rows, int depth, int part) {
      Base::items(shared, part, [&](int item, scalar* to) {
        load_async<kWide<scalar>>(to, from + item * Base::kPass * static_cast<int64_t>(depth),
                                  row + item * Base::kPass < rows && k < depth);
      });
    }
    __device__ void advance() {
      k += kDepth<scalar>;
      from += kDepth<scalar>;
    }
  };
};

// The product of a block, [M, N], of two tiles in shared memory. Four warps share the longer side and two the other.
template <class scalar, class A, class B, int M, int N>
class Product {
  static constexpr int kWarpsAcross = N == kLong ? 4 : 2, kWarps = kThreads / kWarp;
  static constexpr int kRows = M / (kWarps / kWarpsAcross);
  static constexpr int kStep = kDepth<scalar> / kParts;

 public:
  static constexpr int kAcross = N / kWarpsAcross;  // columns of a warp

 private:
  float sum_[kRows / 16][kAcross / 8][4];

  // What one part multiplies.
  struct Factors {
    Block left[kRows / 16], right[kAcross / 16];

    __device__ void load(const scalar* a, const scalar* b, int k) {
#pragma unroll
      for (int i = 0; i < kRows / 16; ++i) left[i] = A::template block<true>(a, row() + 16 * i, k);
#pragma unroll
      for (int j = 0; j < kAcross / 16; ++j) right[j] = B::template block<false>(b, column() + 16 * j, k);
    }
    __device__ void round() {
      if constexpr (std::is_same_v<scalar, float>) {
        for (Block& block : left) block.round();
        for (Block& block : right) block.round();
      }
    }
  };

 public:
  // The first row and column of the warp.
  __device__ static int row() {
    return threadIdx.x / kWarp / kWarpsAcross * kRows;
  }
  __device__ static int column() {
    return threadIdx.x / kWarp % kWarpsAcross * kAcross;
  }

  // Each sum begins with start(column), or with start(row).
  template <bool by_column, class F>
  __device__ void begin(const F& start) {
    const int lane = threadIdx.x % kWarp;
    if constexpr (by_column) {
#pragma unroll
      for (int j = 0; j < kAcross / 4; ++j) {
        const float value = start(column() + j / 2 * 8 + lane % 4 * 2 + j % 2);
        for (auto& row : sum_) row[j / 2][j % 2] = row[j / 2][j % 2 + 2] = value;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRows / 8; ++i) {
        const float value = start(row() + 8 * i + lane / 4);
        for (auto& sums : sum_[i / 2]) sums[i % 2 * 2] = sums[i % 2 * 2 + 1] = value;
      }
    }
  }

  // Calls f(row, column, two adjacent sums) for those that the lane has of rows [16 i, 16 i + 16) of the warp.
  template <class F>
  __device__ void each(int i, const F& f) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int j = 0; j < kAcross / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        f(row() + 16 * i + 8 * e + lane / 4, column() + 8 * j + lane % 4 * 2, &sum_[i][j][2 * e]);
  }
  template <class F>
  __device__ void all(const F& f) const {
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) each(i, f);
  }

  // Calls between(part) after each part, while tensor cores are busy with it.
  template <class Between>
  __device__ void add(const scalar* a, const scalar* b, const Between& between) {
    constexpr bool ahead = M * N > 64 * kLong;  // else another block is busy while this one waits
    Factors factors[2];
    if (ahead) factors[0].load(a, b, 0);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      Factors& now = factors[part % 2];
      if (!ahead)
        now.load(a, b, part * kStep);
      else if (part + 1 < kParts)
        factors[(part + 1) % 2].load(a, b, (part + 1) * kStep);
      now.round();
#pragma unroll
      for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
        for (int j = 0; j < kAcross / 16; ++j) {
          multiply<scalar, 0>(sum_[i][2 * j], now.left[i], now.right[j]);
          multiply<scalar, 1>(sum_[i][2 * j + 1], now.left[i], now.right[j]);
        }
      between(part);
    }
  }

  // What slices() gives a lane: V elements from column at() of row line() on, kPass rows apart, and where a row is more
  // than a warp takes at a time, also what is further along.
  template <int V>
  struct Slices {
    static constexpr int kPacks = std::min(kAcross / V, kWarp), kPass = kWarp / kPacks;

    __device__ static int line() {
      return threadIdx.x % kWarp / kPacks;
    }
    __device__ static int at() {
      return threadIdx.x % kPacks * V;
    }
  };
  // The warp's part through shared memory that nothing else is in, 16 rows at a time: calls f(row, column, from) for
  // what the lane takes of convert(sum). The pitch keeps rows on different banks, put and taken.
  template <int V, class Convert, class F>
  __device__ void slices(scalar* shared, const Convert& convert, const F& f) {
    using Lane = Slices<V>;
    constexpr int pitch = kAcross + 8, slice = 16 * pitch;
    static_assert(kWarps * slice <= A::size + B::size);
    shared += threadIdx.x / kWarp * slice;
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) {
      const int first = row() + 16 * i;
      each(i, [&](int row, int across, const float* sums) {
        auto* const to = shared + (row - first) * pitch + across - column();
        *reinterpret_cast<typename Pack<scalar, 2>::word*>(to) = pair<scalar>(convert(sums[0]), convert(sums[1]));
      });
      __syncwarp();
#pragma unroll V == 1 ? 1 : 16
      for (int line = Lane::line(); line < Lane::line() + 16; line += Lane::kPass)
#pragma unroll
        for (int at = Lane::at(); at < Lane::at() + kAcross; at += Lane::kPacks * V)
          f(first + line, column() + at, shared + line * pitch + at);
      __syncwarp();
    }
  }
};

// For each step, calls multiply(stage, between), which is to call between(part) for each part; meanwhile
// load(stage, part) is called for a later step.
template <int stages, class Load, class Multiply>
__device__ void pipelined(int64_t steps, const Load& load, const Multiply& multiply) {
  int into = 0, stage = 0;
  for (; into < stages - 1; ++into) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) load(into, part);
    __pipeline_commit();
  }
  for (int64_t step = 0; step < steps; ++step) {
    __pipeline_wait_prior(stages - 2);
    __syncthreads();  // this stage is there, and the one before has been multiplied by all
    multiply(stage, [&](int part) { load(into, part); });
    __pipeline_commit();
    stage = stage + 1 == stages ? 0 : stage + 1;
    into = into + 1 == stages ? 0 : into + 1;
  }
}

// What a kernel has in shared memory: kStages of a tile of clips and one of another factor.
template <class scalar, class Other, class Clips, int outputs>
struct Stages {
  static constexpr int bytes = (Other::size + Clips::size) * sizeof(scalar);
  static constexpr size_t all = kStages<outputs> * bytes;

  __device__ static scalar* other(int stage) {
    return reinterpret_cast<scalar*>(dynamic_memory() + stage * bytes);
  }
  __device__ static scalar* clips(int stage) {
    return other(stage) + Other::size;
  }
};

// The rows of the product are what is not adjacent in y: pixels (channels_last) or output channels.
template <class scalar, int V, bool channels_last, int outputs>
struct ConvolutionTiles {
  static constexpr int depth = kDepth<scalar>;
  using Weight = WeightTile<scalar, outputs>;
  using Clips =
      ClipTile<scalar, V, channels_last, channels_last, channels_last ? kLong : depth, channels_last ? depth : kLong>;
  using Sum = std::conditional_t<channels_last, Product<scalar, Clips, Weight, kLong, outputs>,
                                 Product<scalar, Weight, Clips, outputs, kLong>>;
  using Memory = Stages<scalar, Weight, Clips, outputs>;
};

// y = weight x + bias at each pixel, clamped at 0 with `relu`. x's shift moves the frames that it is read from, y's
// those that it is written to, where the frames that nothing moves to become zero. A block goes through tiles of
// `outputs` channels by kLong pixels, and loads ahead of what it multiplies also from one to the next.
template <class scalar, int V, bool channels_last, int outputs>
__global__ void __launch_bounds__(kThreads, kBlocks<outputs>)
    convolution_kernel(Pixels<scalar> y, Pixels<const scalar> x, const scalar* weight, const scalar* bias, bool relu) {
  using Tiles = ConvolutionTiles<scalar, V, channels_last, outputs>;
  using Sum = typename Tiles::Sum;
  using Memory = typename Tiles::Memory;

  // The tiles that share pixels are neighbours, so that the second-level cache serves all but one of them.
  const uint32_t sharing = (y.C + outputs - 1) / outputs, tiles = (y.count + kLong - 1) / kLong * sharing;
  const int steps = (x.C + Tiles::depth - 1) / Tiles::depth;

  uint32_t loading = blockIdx.x;
  typename Tiles::Weight::Loader weights(weight, x.C, loading % sharing * outputs);
  typename Tiles::Clips::Loader clips(x, loading / sharing * kLong, 0);
  auto first = clips.place;
  int k = 0;
  const auto load = [&](int stage, int part) {
    if (loading >= tiles) return;
    weights.load(Memory::other(stage), y.C, x.C, part);
    clips.load(Memory::clips(stage), x, part);
    if (part < kParts - 1) return;
    k += Tiles::depth;
    if (k < x.C) {
      weights.advance();
      clips.place = first;
      clips.go_to(x, k);
    } else {
      k = 0;
      loading += gridDim.x;
      weights = {weight, x.C, static_cast<int>(loading % sharing * outputs)};
      clips = {x, loading / sharing * kLong, 0};
      first = clips.place;
    }
  };

  Sum sum;
  uint32_t tile = blockIdx.x, q0 = 0;
  int c0 = 0, step = 0;
  pipelined<kStages<outputs>>(int64_t(steps) * ((tiles - tile - 1) / gridDim.x + 1), load,
                              [&](int stage, auto between) {
    if (step == 0) {
      q0 = tile / sharing * kLong;
      c0 = tile % sharing * outputs;
      sum.template begin<channels_last>(
          [&](int output) { return bias && c0 + output < y.C ? static_cast<float>(bias[c0 + output]) : 0; });
    }
    scalar *weights = Memory::other(stage), *clips = Memory::clips(stage);
    channels_last ? sum.add(clips, weights, between) : sum.add(weights, clips, between);
    if (++step < steps) return;

    __syncthreads();  // the stage has been multiplied by all, and is not loaded to before the next step
    using Lane = typename Sum::template Slices<V>;
    using Word = word_t<V * sizeof(scalar)>;
    const int first = channels_last ? Sum::row() + Lane::line() : Sum::column() + Lane::at();
    Cursor<scalar> place(y, q0 + first);
    const auto convert = [&](float value) { return relu && value < 0 ? 0 : value; };
    const auto store = [&](int row, int column, const scalar* from) {
      const int c = c0 + (channels_last ? column : row);
      auto to = place;
      if (!channels_last && Lane::kPacks * V < Sum::kAcross) to.advance(y, column - first);
      if (c < y.C && to.q < y.count) {
        scalar* at = to.at + (channels_last ? c : c * y.sc);
        bool there = true;
        if (y.fold > 0) {
          const int offset = y.offset(c), T = y.T, t = to.t + offset;
          there = t >= 0 && t < T;
          at += (there ? offset : t < 0 ? offset + T : offset - T) * y.st;
        }
        store_word(reinterpret_cast<Word*>(at), there ? *reinterpret_cast<const Word*>(from) : Word{});
      }
      if (channels_last) place.advance(y, Lane::kPass);
    };
    if (c0 + (channels_last ? Sum::column() : Sum::row()) < y.C)
      sum.template slices<V>(Memory::other(stage), convert, store);
    step = 0;
    tile += gridDim.x;
  });
}

template <class scalar, int V, bool channels_last, int outputs>
struct WeightTiles {
  static constexpr int depth = kDepth<scalar>;
  template <int side>
  using Tile =
      ClipTile<scalar, V, channels_last, !channels_last, channels_last ? depth : side, channels_last ? side : depth>;
  using Memory = Stages<scalar, Tile<outputs>, Tile<kLong>, outputs>;
};

// partials [slots, outputs, channels] in whole tiles: dy [outputs, pixels] x [channels, pixels]^T over the slot's
// pixels.
template <class scalar, int V, bool channels_last, int outputs>
__global__ void __launch_bounds__(kThreads, kBlocks<outputs>)
    weight_kernel(float* partials, Pixels<const scalar> dy, Pixels<const scalar> x, int64_t steps) {
  using Tiles = WeightTiles<scalar, V, channels_last, outputs>;
  using A = typename Tiles::template Tile<outputs>;
  using B = typename Tiles::template Tile<kLong>;
  using Memory = typename Tiles::Memory;

  const uint32_t row_tiles = (dy.C + outputs - 1) / outputs, column_tiles = (x.C + kLong - 1) / kLong;
  const int row0 = blockIdx.x % row_tiles * outputs, column0 = blockIdx.x / row_tiles * kLong;
  const uint32_t q0 = blockIdx.y * steps * Tiles::depth;
  typename A::Loader a(dy, q0, row0);
  typename B::Loader b(x, q0, column0);
  int64_t left = steps;
  const auto load = [&](int stage, int part) {
    if (left == 0) return;
    a.load(Memory::other(stage), dy, part);
    b.load(Memory::clips(stage), x, part);
    if (part < kParts - 1) return;
    --left;
    if constexpr (!channels_last) {
      a.place.advance(dy, Tiles::depth);
      b.place.advance(x, Tiles::depth);
    }
  };
  Product<scalar, A, B, outputs, kLong> sum;
  sum.template begin<false>([](int) { return 0.0f; });
  pipelined<kStages<outputs>>(
      steps, load, [&](int stage, auto between) { sum.add(Memory::other(stage), Memory::clips(stage), between); });
  const int64_t pitch = column_tiles * kLong;
  partials += (int64_t(blockIdx.y) * row_tiles * outputs + row0) * pitch + column0;
  sum.all([&](int row, int column, const float* sums) {
    Pack<float, 2>{sums[0], sums[1]}.store(partials + row * pitch + column);
  });
}

// The sum over the slots: a warp adds up each eighth slot of 32 elements, then one adds the eight sums.
template <class scalar>
__global__ void __launch_bounds__(kThreads) sum_kernel(scalar* dweight, const float* partials, int64_t slots,
                                                       int64_t slot, int64_t pitch, int64_t rows, int64_t columns) {
  constexpr int warps = kThreads / kWarp;
  __shared__ double sums[warps][kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarp + lane, row = quotient(i, columns);
  double total = 0;
  if (row < rows) {
    partials += row * pitch + i - row * columns;
#pragma unroll 4
    for (int64_t s = warp; s < slots; s += warps) total += partials[s * slot];
  }
  sums[warp][lane] = total;
  __syncthreads();
  if (warp > 0 || row >= rows) return;
  for (int w = 1; w < warps; ++w) total += sums[w][lane];
  dweight[i] = static_cast<scalar>(total);
}

// Output channels up to which the product is here; above that, it takes so much longer than moving x that a shift and
// cuDNN's product are faster. Not measured yet: a shift moves x twice (its transpose, in place, a quarter as much), and
// these kernels multiply at about 0.7 of cuDNN's rate, as they do without wgmma.
constexpr int64_t kMostOutputs = 768, kMostOutputsOfBackward = 256;

// How many elements an access of clips may have in planar clips whose channels are no multiple of 16 bytes.
template <class scalar>
constexpr int kNarrow = sizeof(scalar) == 2 ? 4 : 1;

// How many elements accesses of clips have: as many as there are within one frame and one group of channels, 0 where
// the kernels do not take these clips. The weight's have 16 bytes.
int width(const Clip& x, const Clip& y, const Shift& shift, bool allow_tf32) {
  if (x.dtype == ScalarType::Double || (x.dtype == ScalarType::Float && !allow_tf32)) return 0;
  const int wide = kWidestBytes / x.tensor.element_size(), narrow = wide == 8 ? kNarrow<Half> : kNarrow<float>;
  const auto fits = [&](int V) { return whole_packs(x, V, x.P) && whole_packs(y, V, y.P); };
  if (x.empty() || y.empty() || x.C % wide != 0 || y.C % wide != 0) return 0;
  if (x.N * x.T * x.P >= 0x7fffffff || x.C * y.C >= 0x7fffffff) return 0;
  if (x.channels_last) return shift.fold % wide == 0 && fits(wide) ? wide : 0;
  return fits(wide) ? wide : fits(narrow) ? narrow : 0;
}

int attribute(const DeviceGuard& guard, cudaDeviceAttr which) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, guard.device()));
  return value;
}

// Calls f with the element type, the width, whether the clips are channels_last and the output channels of a tile, as
// types. Where a block cannot have the shared memory for tiles of 128, it has fewer of 64.
template <class F>
void by_kernel(const DeviceGuard& guard, const Clip& x, int width, int64_t Cout, const F& f) {
  const auto by_outputs = [&](auto* type, auto V, auto channels_last) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    constexpr size_t bytes = std::max(ConvolutionTiles<scalar, V, channels_last, 128>::Memory::all,
                                      WeightTiles<scalar, V, channels_last, 128>::Memory::all);
    const bool fits = attribute(guard, cudaDevAttrMaxSharedMemoryPerBlockOptin) >= static_cast<int>(bytes);
    Cout > 64 && fits ? f(type, V, channels_last, std::integral_constant<int, 128>())
                      : f(type, V, channels_last, std::integral_constant<int, 64>());
  };
  const auto by_layout = [&](auto* type) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    constexpr std::integral_constant<int, kWide<scalar>> wide;
    constexpr std::integral_constant<int, kNarrow<scalar>> narrow;
    x.channels_last   ? by_outputs(type, wide, std::true_type())
    : width == narrow ? by_outputs(type, narrow, std::false_type())
                      : by_outputs(type, wide, std::false_type());
  };
  switch (x.dtype) {
    case ScalarType::Half: return by_layout(static_cast<Half*>(nullptr));
    case ScalarType::BFloat16: return by_layout(static_cast<BFloat16*>(nullptr));
    default: return by_layout(static_cast<float*>(nullptr));
  }
}

int64_t resident_blocks(const DeviceGuard& guard, int of_multiprocessor) {
  return attribute(guard, cudaDevAttrMultiProcessorCount) * of_multiprocessor;
}

void convolve(const DeviceGuard& guard, const Clip& y, const Shift& out, const Clip& x, const Shift& in,
              const Tensor& weight, const std::optional<Tensor>& bias, bool relu, int width) {
  by_kernel(guard, x, width, y.C, [&](auto* type, auto V, auto channels_last, auto outputs) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    const int64_t tiles = blocks_for(y.N * y.T * y.P, kLong) * blocks_for(y.C, outputs);
    const Grid grid{std::min(tiles, resident_blocks(guard, kBlocks<outputs>)), 1, kThreads,
                    ConvolutionTiles<scalar, V, channels_last, outputs>::Memory::all};
    launch(guard, convolution_kernel<scalar, V, channels_last, outputs>, grid, Pixels<scalar>(y, out),
           Pixels<const scalar>(x, in), static_cast<const scalar*>(weight.data_ptr()),
           bias ? static_cast<const scalar*>(bias->data_ptr()) : static_cast<const scalar*>(nullptr), relu);
  });
}

// A tensor that begins at a multiple of 16 bytes.
Tensor aligned(const Tensor& x) {
  const bool is_aligned = reinterpret_cast<uintptr_t>(x.data_ptr()) % kWidestBytes == 0;
  return is_aligned ? x : torch::stable::clone(x);
}

Tensor weight_gradient(const DeviceGuard& guard, const Clip& dy, const Clip& x, const Shift& shift, int width) {
  const Tensor dweight = empty_contiguous(std::array<int64_t, 2>{dy.C, x.C}, x.tensor);
  by_kernel(guard, x, width, dy.C, [&](auto* type, auto V, auto channels_last, auto outputs) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    const int64_t row_tiles = blocks_for(dy.C, outputs), column_tiles = blocks_for(x.C, kLong);
    const int64_t tiles = row_tiles * column_tiles, all_steps = blocks_for(dy.N * dy.T * dy.P, kDepth<scalar>);
    // As many slots as all blocks run at once: more would only be more partial sums.
    const int64_t steps = blocks_for(all_steps, std::max<int64_t>(resident_blocks(guard, kBlocks<outputs>) / tiles, 1));
    const int64_t slots = blocks_for(all_steps, steps), slot = tiles * outputs * kLong;
    const Tensor partials = torch::stable::empty({slots, slot}, ScalarType::Float, std::nullopt, x.tensor.device());
    float* const sums = static_cast<float*>(partials.data_ptr());
    launch(guard, weight_kernel<scalar, V, channels_last, outputs>,
           Grid{tiles, slots, kThreads, WeightTiles<scalar, V, channels_last, outputs>::Memory::all}, sums,
           Pixels<const scalar>(dy, {0, 0, 0}), Pixels<const scalar>(x, shift), steps);
    launch(guard, sum_kernel<scalar>, {blocks_for(dy.C * x.C, kWarp)}, static_cast<scalar*>(dweight.data_ptr()), sums,
           slots, slot, column_tiles * kLong, dy.C, x.C);
  });
  return dweight;
}

Tensor shift_conv1x1(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, Segments n_segment,
                     int64_t fold_div, const std::string& mode, const std::optional<std::string>& activation,
                     bool allow_tf32) {
  const DeviceGuard guard(x);
  const Convolution c(x, weight, bias, n_segment, fold_div, mode, activation);
  if (c.x.empty() || c.Cout == 0) return c.empty_result().tensor;
  const Clip y = c.empty_result();
  const int V = width(c.x, y, c.shift, allow_tf32);
  if (V == 0 || c.Cout > kMostOutputs) return by_aten(c);
  convolve(guard, y, Shift{0, 0, 0}, c.x, c.shift, aligned(c.weight), c.bias, c.relu, V);
  return y.tensor;
}

std::tuple<Tensor, Tensor, Tensor> shift_conv1x1_backward(const Tensor& grad, const std::optional<Tensor>& x,
                                                          const std::optional<Tensor>& weight, Segments n_segment,
                                                          int64_t fold_div, const std::string& mode, bool channels_last,
                                                          bool need_bias, bool allow_tf32) {
  const DeviceGuard guard(grad);
  const ConvolutionBackward b(grad, x, weight, n_segment, fold_div, mode, channels_last);
  const auto fused_dx = [&]() -> std::optional<Tensor> {
    const Clip dx = b.empty_dx();
    const int V = width(b.dy, dx, b.shift, allow_tf32);
    if (V == 0 || b.Cout > kMostOutputsOfBackward) return std::nullopt;
    const Tensor flat = torch::stable::view(b.weight, std::array<int64_t, 2>{b.Cout, b.C});
    const Tensor transposed = aligned(torch::stable::contiguous(torch::stable::transpose(flat, 0, 1)));
    convolve(guard, dx, b.shift, b.dy, Shift{0, 0, 0}, transposed, std::nullopt, false, V);
    return dx.tensor;
  };
  // At every size: cuDNN's may add up in another order each time.
  const auto fused_dweight = [&]() -> std::optional<Tensor> {
    const int V = width(*b.x, b.dy, b.shift, allow_tf32);
    if (V == 0) return std::nullopt;
    return weight_gradient(guard, b.dy, *b.x, b.shift, V);
  };
  return b.gradients(fused_dx, fused_dweight, need_bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tempops, CUDA, m) {
  m.impl("shift_conv1x1", TORCH_BOX(&shift_conv1x1));
  m.impl("shift_conv1x1_backward", TORCH_BOX(&shift_conv1x1_backward));
}

}  // namespace tempops
