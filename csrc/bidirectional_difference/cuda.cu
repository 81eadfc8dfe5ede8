// bidirectional_difference on CUDA.
//
// The 3x3 product of frame t is computed once and subtracted from frame t - 1 (`forward`) and frame t + 1 (`backward`).
// A block has a tile of a frame and walks T. Frames come into shared memory by asynchronous copies while the one before
// is computed, and results leave through it, so that memory sees whole packs however narrow the plane is. A thread has
// some rows of a column, or of two columns or channels that share a word, and reads each row once. Likewise the
// backward adds up what the two gradients say of the product of frame t, transposes the product once, and correlates
// the same window with x for the weight.
#include <cuda_pipeline_primitives.h>

#include <algorithm>

#include "../cuda.h"
#include "arguments.h"

namespace tempops {
namespace {

constexpr int kTaps = 9;
constexpr int kBlock = 128;                                   // threads
constexpr int kColumns = 7, kSlab = 64;                       // of a box: pixels side by side, bytes of their channels
constexpr int kTileBytes = (7 + 2) * (kColumns + 2) * kSlab;  // of one frame in shared memory
constexpr int64_t kEnoughBlocks = 2048;  // more than that would only be more partial sums of the weight's gradient

template <class scalar>
constexpr int kRows = sizeof(scalar) == 8 ? 4 : 7;  // of a thread, at most
template <class scalar>
constexpr int kTile = kTileBytes / sizeof(scalar);
template <class scalar>
constexpr int kPack = kWidestBytes / sizeof(scalar);

// How blocks cut a frame: into bands of rows, a thread's each, and those into tiles. A tile is a run of memory where
// planes are narrow: whole channels, or some bands of one, whole rows in either case. Else it is a box: some bands of
// some columns, and channels that are adjacent, or one.
struct Tiles {
  int64_t N, T, C, H, W;
  int64_t bands, channel_tiles, column_tiles, pixel_tiles;
  int lanes;                              // adjacent elements of a thread
  int rows;                               // of a band
  int of_channels, of_bands, of_columns;  // of a tile
  bool channels_last, run, whole;         // whole: packs may be copied

  Tiles(const Clip& x, int lanes, int most_rows, bool run, bool whole)
      : N(x.N), T(x.T), C(x.C), H(x.H), W(x.W), lanes(lanes), channels_last(x.channels_last), run(run), whole(whole) {
    const auto even = [](int64_t all, int64_t most) {
      return static_cast<int>(blocks_for(all, blocks_for(all, std::max<int64_t>(1, most))));
    };
    const int64_t bytes = x.tensor.element_size();
    rows = even(H, most_rows);
    bands = blocks_for(H, rows);
    of_channels = channels_last ? static_cast<int>(std::min({C, kSlab / bytes, int64_t{16} * lanes})) : 1;
    of_columns = run ? static_cast<int>(W) : even(W, channels_last ? kColumns : 16);
    const int64_t threads = channels_last ? of_channels / lanes * of_columns : of_columns / lanes;
    int64_t most_bands = kBlock / threads;
    if (run) {
      of_channels = static_cast<int>(std::clamp<int64_t>(most_bands / bands, 1, C));
    } else {
      const int64_t fit = kTileBytes / bytes / (of_columns + 2) / of_channels - 2;
      most_bands = std::min(most_bands, fit / rows);
    }
    of_bands = even(bands, most_bands);
    channel_tiles = blocks_for(C, of_channels);
    column_tiles = blocks_for(W, of_columns);
    pixel_tiles = blocks_for(bands, of_bands) * column_tiles;
  }
  // Whether a tile may be a run, for frames that are one.
  static bool fits_run(const Clip& x, int lanes, int most_rows) {
    const int64_t bytes = x.tensor.element_size();
    return x.W % lanes == 0 && x.W <= kBlock * lanes &&
           (kBlock * lanes * most_rows + 2 * x.W) * bytes + 5 * kWidestBytes <= kTileBytes;
  }
  int64_t blocks() const {
    return channel_tiles * pixel_tiles;
  }
};

// A block's tile, and where its elements are in shared memory.
struct Tile {
  int64_t channel, row, column, pixel_tile;  // the first
  int along, across;                         // from a pixel to the next one, and to that in the next row
  // Of a run: what comes first in shared memory, how much there is, and what of it the tile has results for.
  int64_t first;
  int size, begin, end;

  __device__ explicit Tile(const Tiles& tiles) {
    pixel_tile = quotient(blockIdx.x, tiles.channel_tiles);
    const int64_t band_tile = quotient(pixel_tile, tiles.column_tiles);
    channel = (blockIdx.x - pixel_tile * tiles.channel_tiles) * tiles.of_channels;
    row = band_tile * tiles.of_bands * tiles.rows;
    column = (pixel_tile - band_tile * tiles.column_tiles) * tiles.of_columns;
    along = tiles.run ? 1 : tiles.of_channels;
    across = (tiles.run ? static_cast<int>(tiles.W) : tiles.of_columns + 2) * along;
    size = end = (tiles.of_bands * tiles.rows + 2) * across;
    first = begin = 0;
    if (tiles.run) {
      const int64_t P = tiles.H * tiles.W, from = channel * P + row * tiles.W;
      const int64_t bottom = row + tiles.of_bands * tiles.rows;
      const int64_t channels = tiles.C - channel < tiles.of_channels ? tiles.C - channel : tiles.of_channels;
      const int64_t to = (channel + channels - 1) * P + (bottom < tiles.H ? bottom : tiles.H) * tiles.W;
      first = from - (row > 0 ? tiles.W : 0);
      first -= first % (kWidestBytes / 2);  // a multiple of any pack
      begin = static_cast<int>(from - first);
      end = static_cast<int>(to - first);
      size = end + (bottom < tiles.H ? static_cast<int>(tiles.W) : 0);
    }
  }
};

// A tensor of clips. Where an element is within a frame takes 32 bits.
template <class scalar>
struct Places {
  scalar* data;
  int64_t sn, st;
  uint32_t sc, sp;

  explicit Places(const Clip& x)
      : data(x.data<std::remove_const_t<scalar>>()), sn(x.sn), st(x.st), sc(static_cast<uint32_t>(x.sc)),
        sp(static_cast<uint32_t>(x.sp)) {
    TEMPOPS_CHECK((x.C - 1) * x.sc + (x.P - 1) * x.sp < 0xffffffff, "frames across 2^32 elements are not supported");
  }
  __device__ scalar* frame(int64_t n, int64_t t) const {
    return data + n * sn + t * st;
  }
};

// Where element `at` of a tile is in a frame.
struct Spot {
  uint32_t c = 0, p;
  bool inside, has_result;

  __device__ Spot(const Tiles& tiles, const Tile& tile, int at) {
    if (tiles.run) {
      p = static_cast<uint32_t>(tile.first) + at;  // through all channels
      inside = at < tile.size;
      has_result = at < tile.end;
    } else {
      const int pixel = at / tile.along, i = at / tile.across;
      const int64_t row = tile.row + i - 1, column = tile.column + pixel - i * (tiles.of_columns + 2) - 1;
      c = static_cast<uint32_t>(tile.channel + at - pixel * tile.along);
      p = static_cast<uint32_t>(row * tiles.W + column);
      inside = at < tile.size && row >= 0 && row < tiles.H && column >= 0 && column < tiles.W && c < tiles.C;
      has_result = inside && i > 0 && i <= tiles.of_bands * tiles.rows && column >= tile.column &&
                   column < tile.column + tiles.of_columns;
    }
  }
  template <class scalar>
  __device__ uint32_t in(const Places<scalar>& x) const {
    return c * x.sc + p * x.sp;
  }
};

// Q adjacent elements in shared memory.
template <int Q, class scalar>
__device__ void read(acc_t<scalar> (&v)[Q], const scalar* from) {
  if constexpr (std::is_same_v<scalar, BFloat16> && Q % 2 == 0) {  // the upper half of a float is its bfloat16
    const auto pack = Pack<uint32_t, Q / 2>::load(reinterpret_cast<const uint32_t*>(from));
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      const uint32_t bits = q % 2 == 0 ? pack.v[q / 2] << 16 : pack.v[q / 2] & 0xffff0000;
      memcpy(&v[q], &bits, sizeof(bits));
    }
  } else {
    const auto pack = Pack<scalar, Q>::load(from);
#pragma unroll
    for (int q = 0; q < Q; ++q) v[q] = static_cast<acc_t<scalar>>(pack.v[q]);
  }
}
template <int Q, class scalar>
__device__ void write(scalar* to, const acc_t<scalar> (&v)[Q]) {
  Pack<scalar, Q> pack;
#pragma unroll
  for (int q = 0; q < Q; ++q) pack.v[q] = static_cast<scalar>(v[q]);
  typename Pack<scalar, Q>::word bits;
  memcpy(&bits, &pack, sizeof(bits));
  *reinterpret_cast<decltype(bits)*>(to) = bits;
}

// Copies a tile between shared memory and a tensor: which packs a thread copies is the same for all frames.
template <class scalar>
struct Copies {
  static constexpr int V = kPack<scalar>, kCount = (kTile<scalar> / V + kBlock - 1) / kBlock;
  static constexpr uint32_t kNone = 0xffffffff;
  const Tiles& tiles;
  const Tile& tile;
  uint32_t place[kCount], edge = kNone;
  int first = threadIdx.x * V, at_edge = 0;

  // All that is inside of the frame, or the results only. A run's first and last pack may be shared with other tiles:
  // of results, threads store these element by element.
  template <class element>
  __device__ Copies(const Tiles& tiles, const Tile& tile, const Places<element>& x, bool results)
      : tiles(tiles), tile(tile) {
    const int begin = tile.begin + (V - 1) & -V, end = tile.end & -V;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const Spot spot(tiles, tile, at(k));
      const bool has = results ? spot.has_result && at(k) >= begin && at(k) < end : spot.inside;
      place[k] = has ? spot.in(x) : kNone;
      keep(place[k]);
    }
    keep(first);
    const int thread = threadIdx.x;
    at_edge = thread < V ? tile.begin + thread : (begin < end ? end : begin) + thread - V;
    if (results && tiles.run && thread < 2 * V && at_edge < (thread < V && begin < tile.end ? begin : tile.end))
      edge = Spot(tiles, tile, at_edge).in(x);
    keep(edge);
  }
  __device__ int at(int k) const {
    return first + k * kBlock * V;
  }

  __device__ void load(scalar* to, const Places<const scalar>& x, int64_t n, int64_t t) const {
    const scalar* frame = x.frame(n, t);
    keep(frame);
    if (tiles.whole) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if (place[k] != kNone) __pipeline_memcpy_async(to + at(k), frame + place[k], kWidestBytes);
      }
    } else {
      for (int i = threadIdx.x; i < tile.size; i += kBlock) {
        const Spot spot(tiles, tile, i);
        if (spot.inside) to[i] = frame[spot.in(x)];
      }
    }
  }
  // sums = a + b throughout the tile.
  __device__ void add(acc_t<scalar>* sums, const scalar* a, const scalar* b) const {
    using acc = acc_t<scalar>;
    constexpr int kSum = kWidestBytes / sizeof(acc);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (at(k) >= tile.size) continue;
      acc v[V], w[V];
      read<V>(v, a + at(k));
      read<V>(w, b + at(k));
#pragma unroll
      for (int i = 0; i < V; i += kSum) {
        acc sum[kSum];
#pragma unroll
        for (int q = 0; q < kSum; ++q) sum[q] = v[i + q] + w[i + q];
        write<kSum>(sums + at(k) + i, sum);
      }
    }
  }
  __device__ void store(const Places<scalar>& y, int64_t n, int64_t t, const scalar* from) const {
    store_each(y, n, t, [&](int i) { return Pack<scalar, V>::load(from + i); }, [&](int i) { return from[i]; });
  }
  __device__ void store_zeros(const Places<scalar>& y, int64_t n, int64_t t) const {
    store_each(y, n, t, [](int) { return Pack<scalar, V>{}; }, [](int) { return scalar{}; });
  }

 private:
  template <class Packs, class Singles>
  __device__ void store_each(const Places<scalar>& y, int64_t n, int64_t t, const Packs& pack,
                             const Singles& single) const {
    scalar* frame = y.frame(n, t);
    keep(frame);
    if (tiles.whole) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if (place[k] != kNone) pack(at(k)).store(frame + place[k]);
      }
      if (edge != kNone) frame[edge] = single(at_edge);
    } else {
      for (int i = threadIdx.x; i < tile.end; i += kBlock) {
        const Spot spot(tiles, tile, i);
        if (spot.has_result && i >= tile.begin) frame[spot.in(y)] = single(i);
      }
    }
  }
};

// What is some bytes after p.
template <class scalar>
__device__ scalar* beyond(scalar* p, int bytes) {
  using byte = std::conditional_t<std::is_const_v<scalar>, const char, char>;
  return reinterpret_cast<scalar*>(reinterpret_cast<byte*>(p) + bytes);
}

// A thread's rows of Q adjacent elements: pixels (planar) or channels. Distances are in bytes of shared memory.
template <class scalar, int Q, bool planar>
struct Segment {
  int64_t c;
  int m, segments;        // its place among the segments of its channels in this tile, and their number
  int at, along, across;  // where it begins in a frame's slot; from a pixel to the next, to that in the next row
  int rows, first, last;  // how many; which of those around them can be read: a box has zeros around it
  unsigned left, right;   // all bits where there are such neighbours
  bool inside;

  __device__ Segment(const Tiles& tiles, const Tile& tile) {
    constexpr int bytes = sizeof(scalar);
    const int columns = planar ? tiles.of_columns / Q : tiles.of_columns;
    const int channels = planar ? tiles.of_channels : tiles.of_channels / Q;
    segments = tiles.of_bands * columns;
    const int id = threadIdx.x, channel = planar ? id / segments : id % channels;
    m = planar ? id % segments : id / channels;
    const int band = m / columns, column = (m - band * columns) * (planar ? Q : 1);
    const int64_t i = tile.row + band * tiles.rows, j = tile.column + column;
    c = tile.channel + channel * (planar ? 1 : Q);
    if (m >= segments || channel >= channels) m = segments;
    inside = m < segments && c < tiles.C && i < tiles.H && j < tiles.W;
    at = tiles.run ? static_cast<int>(c * tiles.H * tiles.W + i * tiles.W + j - tile.first)
                   : (band * tiles.rows + 1) * tile.across + (column + 1) * tile.along + channel * (planar ? 1 : Q);
    at *= bytes;
    along = tile.along * bytes;
    across = tile.across * bytes;
    rows = tiles.H - i < tiles.rows ? static_cast<int>(tiles.H - i) : tiles.rows;
    first = tiles.run && i == 0 ? 0 : -1;
    last = tiles.run && i + rows == tiles.H ? rows - 1 : rows;
    left = tiles.run && j == 0 ? 0 : ~0u;
    right = tiles.run && j + Q == tiles.W ? 0 : ~0u;
    keep(at);
    keep(rows);
    keep(first);
    keep(last);
    keep(left);
    keep(right);
  }
  __device__ int row(int i) const {
    return at + i * across;
  }
  // Where row r is in a slot; where there is none, `zeros`.
  __device__ int row(int r, int zeros) const {
    return r >= first && r <= last ? at + r * across : zeros;
  }
};

template <class scalar>
__device__ acc_t<scalar> masked(scalar v, unsigned mask) {
  using word = std::conditional_t<sizeof(scalar) == 8, uint64_t, word_t<sizeof(scalar)>>;
  word bits;
  memcpy(&bits, &v, sizeof(v));
  bits &= sizeof(scalar) == 8 ? mask | static_cast<uint64_t>(mask) << 32 : mask;
  memcpy(&v, &bits, sizeof(v));
  return static_cast<acc_t<scalar>>(v);
}

// What the three taps of a row read for Q adjacent elements: the pixels on their left, themselves, those on the right.
template <class element, class scalar, int Q, bool planar>
__device__ void read_window(acc_t<scalar> (&v)[3][Q], const element* from, const Segment<scalar, Q, planar>& segment) {
  read<Q>(v[1], from);
  if constexpr (planar) {
    v[0][0] = masked(from[-1], segment.left);
    v[2][Q - 1] = masked(from[Q], segment.right);
    if constexpr (Q == 2) v[0][1] = v[1][0], v[2][0] = v[1][1];
  } else {
    constexpr int kScale = sizeof(element) / sizeof(scalar);
    read<Q>(v[0], beyond(from, -kScale * segment.along));
    read<Q>(v[2], beyond(from, kScale * segment.along));
  }
}

// The weights of a thread's channels; turned around for the transposed product. Pixels of a row share theirs.
template <class scalar, int Q, bool planar>
struct Taps {
  acc_t<scalar> w[kTaps][planar ? 1 : Q];

  __device__ Taps(const scalar* weight, int64_t c, bool transposed, acc_t<scalar> sign) {
#pragma unroll
    for (int i = 0; i < kTaps * (planar ? 1 : Q); ++i) {
      const int tap = i % kTaps, q = i / kTaps;
      w[tap][q] = sign * static_cast<acc_t<scalar>>(weight[(c + q) * kTaps + (transposed ? kTaps - 1 - tap : tap)]);
    }
  }
  // sum += the product of the window's row with row k of the weights.
  __device__ void add(acc_t<scalar> (&sum)[Q], const acc_t<scalar> (&v)[3][Q], int k) const {
#pragma unroll
    for (int d = 0; d < 3; ++d) {
#pragma unroll
      for (int q = 0; q < Q; ++q) sum[q] += w[3 * k + d][planar ? 0 : q] * v[d][q];
    }
  }
};

// Shared memory of a kernel: a tile of zeros, and those of `kFrames` frames. What a box has outside of the plane,
// where no copy goes, is zero too.
template <class scalar, int kFrames>
struct Slots {
  static constexpr int kBytes = (kFrames + 1) * kTileBytes;
  unsigned char* memory;

  __device__ explicit Slots(unsigned char* memory) : memory(memory) {
    for (int i = threadIdx.x; i < kBytes / kWidestBytes; i += kBlock) reinterpret_cast<uint4*>(memory)[i] = uint4{};
    __syncthreads();
  }
  __device__ scalar* operator[](int frame) const {
    return reinterpret_cast<scalar*>(memory + (1 + frame) * kTileBytes);
  }
  __device__ scalar* zeros() const {
    return (*this)[-1];
  }
  // Where there are zeros, with some more around them, from a frame's slot on.
  __device__ static int zeros_from(int frame) {
    return kTileBytes / 2 - (1 + frame) * kTileBytes;
  }
};

template <class scalar, int Q, bool planar>
__global__ void __launch_bounds__(kBlock, 5)
    difference_kernel(Places<scalar> forward, Places<scalar> backward, Places<const scalar> x, const scalar* weight,
                      Tiles tiles, acc_t<scalar> sign) {
  using acc = acc_t<scalar>;
  constexpr int R = kRows<scalar>;
  // Frame t - 1, t, t + 1, and t + 2, which is on its way; what is subtracted from t - 1 goes in its place, what is
  // from t + 1 into `next`.
  alignas(kWidestBytes) __shared__ unsigned char memory[Slots<scalar, 5>::kBytes];
  const Slots<scalar, 5> slots(memory);
  scalar* const next = slots[4];
  const Tile tile(tiles);
  const Copies<scalar> in(tiles, tile, x, false), out(tiles, tile, forward, true);
  const Segment<scalar, Q, planar> segment(tiles, tile);
  const Taps<scalar, Q, planar> taps(weight, segment.inside ? segment.c : 0, false, -sign);
  const int T = static_cast<int>(tiles.T);
  for (int64_t n = blockIdx.y; n < tiles.N; n += gridDim.y) {
    const auto load = [&](int t) {
      if (t < T) in.load(slots[t % 4], x, n, t);
      __pipeline_commit();
    };
    load(0);
    load(1);
    for (int t = 0; t < T; ++t) {
      __pipeline_wait_prior(0);
      __syncthreads();
      load(t + 2);
      const bool has_past = t > 0, has_future = t + 1 < T;
      scalar *const past = slots[(t + 3) % 4], *const future = slots[(t + 1) % 4];
      if (segment.inside) {
        const scalar* frame = slots[t % 4];
        const int zeros = slots.zeros_from(t % 4);
        acc products[R + 2][Q] = {};  // of the rows, and those around them
#pragma unroll
        for (int r = -1; r <= R; ++r) {
          acc window[3][Q];
          read_window(window, beyond(frame, segment.row(r, zeros)), segment);
#pragma unroll
          for (int k = 0; k < 3; ++k) {
            const int i = r + 1 - k;
            if (i >= 0 && i < R) taps.add(products[i], window, k);
          }
        }
#pragma unroll
        for (int i = 0; i < R; ++i) {
          if (i >= segment.rows) break;
          const int at = segment.row(i);
          const auto subtract = [&](scalar* to, const scalar* from) {
            acc v[Q];
            read<Q>(v, beyond(from, at));
#pragma unroll
            for (int q = 0; q < Q; ++q) v[q] = sign * v[q] + products[i][q];
            write<Q>(beyond(to, at), v);
          };
          subtract(past, past);
          subtract(next, future);
        }
      }
      __syncthreads();
      if (has_past) out.store(forward, n, t - 1, past);
      if (has_future) out.store(backward, n, t + 1, next);
    }
    out.store_zeros(forward, n, T - 1);
    out.store_zeros(backward, n, 0);
    __syncthreads();
  }
}

// Adds up the sums of the segments of a tile's channels, pairwise; the first gets them. Thread + step has the next one.
template <class acc, int n>
__device__ void add_segments(acc (&sums)[n], acc (&others)[n][kBlock], int m, int segments, int step) {
  const int thread = threadIdx.x;
  while (segments > 1) {
    const int half = (segments + 1) / 2;
    if (m >= half && m < segments) {
#pragma unroll
      for (int i = 0; i < n; ++i) others[i][thread] = sums[i];
    }
    __syncthreads();
    if (m + half < segments) {
#pragma unroll
      for (int i = 0; i < n; ++i) sums[i] += others[i][thread + half * step];
    }
    segments = half;  // the next round writes where none of this one reads
  }
}

// dx where it is asked for, and the tile's part of the weight's gradient, [C, 9, parts], where that is. Both gradients
// have the same strides within a frame.
template <class scalar, int Q, bool planar>
__global__ void __launch_bounds__(kBlock, 4)
    backward_kernel(Places<scalar> dx, double* partials, Places<const scalar> forward, Places<const scalar> backward,
                    Places<const scalar> x, const scalar* weight, Tiles tiles, acc_t<scalar> sign) {
  using acc = acc_t<scalar>;
  constexpr int kChannels = planar ? 1 : Q, R = kRows<scalar>;
  // Of `forward` frame t - 1, the place of which t + 1 takes, and t; of `backward` likewise t and t + 1; x t and t + 1,
  // in the place of which dx is written; and what the gradients say of the product of frame t.
  constexpr int kScale = sizeof(acc) / sizeof(scalar), kFrames = 6 + kScale;
  alignas(kWidestBytes) __shared__ unsigned char memory[Slots<scalar, kFrames>::kBytes];
  const Slots<scalar, kFrames> slots(memory);
  acc* const of_product = reinterpret_cast<acc*>(slots[6]);
  const int zeros = slots.zeros_from(6) / kScale;
  const Tile tile(tiles);
  const Copies<scalar> of_grads(tiles, tile, forward, false), of_x(tiles, tile, x, false), of_dx(tiles, tile, dx, true);
  const Segment<scalar, Q, planar> segment(tiles, tile);
  const Taps<scalar, Q, planar> taps(weight, segment.inside ? segment.c : 0, true, -sign);
  const int T = static_cast<int>(tiles.T);
  acc sums[kTaps * kChannels] = {};
  for (int64_t n = blockIdx.y; n < tiles.N; n += gridDim.y) {
    const auto load = [&](int t) {  // what frame t needs and frame t - 1 does not
      if (t + 1 < T) {
        of_grads.load(slots[t % 2], forward, n, t);
        of_grads.load(slots[2 + (t + 1) % 2], backward, n, t + 1);
      }
      if (partials && t < T) of_x.load(slots[4 + t % 2], x, n, t);
      __pipeline_commit();
    };
    load(0);
    for (int t = 0; t < T; ++t) {
      __pipeline_wait_prior(0);
      __syncthreads();
      const bool has_past = t > 0, has_future = t + 1 < T;
      scalar* const here = slots[4 + t % 2];
      const scalar* const of_past = has_past ? slots[(t + 1) % 2] : slots.zeros();
      const scalar* const of_future = has_future ? slots[2 + (t + 1) % 2] : slots.zeros();
      const scalar* const ours = has_future ? slots[t % 2] : slots.zeros();
      scalar* const theirs = has_past ? slots[2 + t % 2] : slots.zeros();
      typename Pack<scalar, Q>::word last[R] = {};  // of `theirs`, before frame t + 2 takes its place
      if (segment.inside) {
#pragma unroll
        for (int i = 0; i < R; ++i) {
          if (i < segment.rows) last[i] = *reinterpret_cast<decltype(&last[i])>(beyond(theirs, segment.row(i)));
        }
      }
      of_grads.add(of_product, of_past, of_future);
      __syncthreads();
      load(t + 1);
      if (segment.inside) {
        acc products[R][Q] = {}, own[R][Q] = {};
#pragma unroll
        for (int r = -1; r <= R; ++r) {
          if (r + 1 < R && r + 1 < segment.rows) read<Q>(own[r + 1], beyond(here, segment.row(r + 1)));
          acc window[3][Q];
          read_window(window, beyond(of_product, kScale * segment.row(r, zeros)), segment);
#pragma unroll
          for (int k = 0; k < 3; ++k) {
            const int i = r + 1 - k;
            if (i < 0 || i >= R) continue;
            taps.add(products[i], window, k);
            if (i >= segment.rows) continue;
#pragma unroll
            for (int d = 0; d < 3; ++d) {
#pragma unroll
              for (int q = 0; q < Q; ++q) sums[(3 * k + d) * kChannels + q % kChannels] += own[i][q] * window[d][q];
            }
          }
        }
        if (dx.data) {
#pragma unroll
          for (int i = 0; i < R; ++i) {
            if (i >= segment.rows) break;
            acc v[Q], w[Q];
            read<Q>(v, beyond(ours, segment.row(i)));
            read<Q>(w, reinterpret_cast<const scalar*>(&last[i]));
#pragma unroll
            for (int q = 0; q < Q; ++q) v[q] = sign * (v[q] + w[q]) + products[i][q];
            write<Q>(beyond(here, segment.row(i)), v);
          }
        }
      }
      __syncthreads();
      if (dx.data) of_dx.store(dx, n, t, here);
    }
    __syncthreads();
  }
  if (!partials) return;
  __pipeline_wait_prior(0);
  add_segments(sums, *reinterpret_cast<acc(*)[kTaps * kChannels][kBlock]>(memory), segment.m, segment.segments,
               tiles.channels_last ? tiles.of_channels / kChannels : 1);
  if (segment.m != 0 || segment.c >= tiles.C) return;
  const int64_t parts = tiles.pixel_tiles * gridDim.y;
  double* part = partials + tile.pixel_tile * gridDim.y + blockIdx.y;
#pragma unroll
  for (int i = 0; i < kTaps * kChannels; ++i) {  // the window was that of the transposed product
    part[((segment.c + i % kChannels) * kTaps + kTaps - 1 - i / kChannels) * parts] = sums[i];
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

// Calls f with a null pointer of the element type, with how many adjacent elements a thread has and whether they are
// pixels, as constants, and with the tiles.
template <class F, class... Clips>
void by_tiles(const F& f, const Clip& x, const Clips&... others) {
  by_dtype(x.dtype, [&](auto* type) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    constexpr int rows = kRows<scalar>, V = kPack<scalar>, lanes = sizeof(scalar) == 2 ? 2 : 1;
    const Frame frame(x, others...);
    const auto is_run = [&](int Q) { return !x.channels_last && frame.runs == 1 && Tiles::fits_run(x, Q, rows); };
    const bool pairs = lanes == 2 && (x.channels_last ? x.C % 2 == 0 : is_run(lanes));
    const bool whole = x.channels_last ? whole_packs(x, V, x.C) && (whole_packs(others, V, x.C) && ...)
                                       : is_run(pairs ? lanes : 1) && frame.width(x, others...) > 1;
    const auto call = [&](auto Q, auto planar) { f(type, Q, planar, Tiles(x, Q, rows, is_run(Q), whole)); };
    const auto by_layout = [&](auto Q) { x.channels_last ? call(Q, std::false_type()) : call(Q, std::true_type()); };
    pairs ? by_layout(std::integral_constant<int, lanes>()) : by_layout(std::integral_constant<int, 1>());
  });
}

std::tuple<Tensor, Tensor> bidirectional_difference(const Tensor& x_, const Tensor& weight_, Segments n_segment,
                                                    bool neighbor_first) {
  const DeviceGuard guard(x_);
  const Clip x = clips(x_, n_segment);
  const Tensor weight = checked_weight(weight_, x);
  const Clip forward = empty_like(x), backward = empty_like(x);
  if (x.empty()) return {forward.tensor, backward.tensor};
  by_tiles([&](auto* type, auto Q, auto planar, const Tiles& tiles) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    launch(guard, difference_kernel<scalar, Q, planar>, {tiles.blocks(), x.N, kBlock}, Places<scalar>(forward),
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
  Tensor dweight = need_weight ? empty_contiguous(weight.sizes(), weight) : no_gradient(weight);
  const auto gradients = [&] { return std::tuple(dx ? dx->tensor : no_gradient(x.tensor), dweight); };
  if (x.empty()) torch::stable::zero_(dweight);
  if (x.empty() || (!need_x && !need_weight)) return gradients();
  by_tiles([&](auto* type, auto Q, auto planar, const Tiles& tiles) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    const acc_t<scalar> sign = neighbor_first ? -1 : 1;
    const int64_t groups = need_weight ? std::min(x.N, blocks_for(kEnoughBlocks, tiles.blocks())) : x.N;
    std::optional<Tensor> scratch;
    double* partials = nullptr;
    int64_t parts = 0;
    if (need_weight) {
      parts = tiles.pixel_tiles * std::min<int64_t>(groups, 65535);
      scratch = torch::stable::empty({x.C, kTaps, parts}, ScalarType::Double, std::nullopt, x.tensor.device());
      partials = static_cast<double*>(scratch->data_ptr());
    }
    Places<scalar> of_x(dx ? *dx : x);
    if (!dx) of_x.data = nullptr;
    launch(guard, backward_kernel<scalar, Q, planar>, {tiles.blocks(), groups, kBlock}, of_x, partials,
           Places<const scalar>(forward), Places<const scalar>(backward), Places<const scalar>(x),
           static_cast<const scalar*>(weight.data_ptr()), tiles, sign);
    if (!need_weight) return;
    launch(guard, weight_kernel<scalar>, {blocks_for(x.C * kTaps * kWarp)}, static_cast<scalar*>(dweight.data_ptr()),
           static_cast<const double*>(partials), x.C * kTaps, parts, sign);
  }, x, forward, backward, dx ? *dx : x);
  return gradients();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tempops, CUDA, m) {
  m.impl("bidirectional_difference", TORCH_BOX(&bidirectional_difference));
  m.impl("bidirectional_difference_backward", TORCH_BOX(&bidirectional_difference_backward));
}

}  // namespace tempops
