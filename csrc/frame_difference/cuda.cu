// frame_difference on CUDA. What is pooled are differences, not frames: the difference of two means of frames that are
// alike would lose digits.
#include <cuda_pipeline_primitives.h>

#include "../cuda.h"
#include "arguments.h"

namespace tempops {
namespace {

// A tensor of maps: channel c of pixel p is at data + n*sn + c*sc + p*sp.
template <class scalar>
struct Maps {
  scalar* data;
  int64_t sn, sc, sp;

  explicit Maps(const Clip& x) : data(x.data<std::remove_const_t<scalar>>()), sn(x.sn), sc(x.sc), sp(x.sp) {}

  __device__ scalar* at(int64_t n, int64_t c, int64_t p) const {
    return data + n * sn + c * sc + p * sp;
  }
};

// Planar maps pooled by 2: a thread has V columns of two rows and walks the frames of a channel. What comes after a
// pair is on its way while the pair is subtracted.
template <class scalar, int V>
__global__ void __launch_bounds__(kThreads, 4)
    difference_rows_kernel(Maps<scalar> y, Maps<const scalar> x, Frames f, int64_t N, int64_t W) {
  using acc = acc_t<scalar>;
  struct Rows {
    Pack<scalar, V> row[2];
  };
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, packs = W / V;
  const int64_t row = quotient(at, packs), c = quotient(row, f.height), h = row - c * f.height;
  const int64_t column = at - row * packs;
  if (c >= f.C) return;
  for (int64_t n = blockIdx.y; n < N; n += gridDim.y) {
    const scalar* from = x.at(n, c, 2 * h * W + column * V);
    scalar* to = y.at(n, c, h * f.width + column * (V / 2));
    const auto load = [&] {
      const Rows rows{{Pack<scalar, V>::load(from), Pack<scalar, V>::load(from + W)}};
      from += f.C * x.sc;
      return rows;
    };
    Rows before = load(), here = load(), next = here;
#pragma unroll 1
    for (int64_t j = 1; j < f.F; ++j) {
      if (j + 1 < f.F) next = load();
      Pack<scalar, V / 2> out;
      for (int k = 0; k < V / 2; ++k) {
        acc sum[2];
        for (int a = 0; a < 2; ++a) {
          const scalar *minus = before.row[a].v + 2 * k, *plus = here.row[a].v + 2 * k;
          sum[a] = (static_cast<acc>(plus[0]) - static_cast<acc>(minus[0])) +
                   (static_cast<acc>(plus[1]) - static_cast<acc>(minus[1]));
        }
        out.v[k] = static_cast<scalar>((sum[0] + sum[1]) * acc(0.25));
      }
      out.store(to);
      to += f.C * y.sc;
      before = here;
      here = next;
    }
  }
}

// The transpose: dx_j = (dy_{j-1} - dy_j) / 4 in both rows. A row left over gets zero.
template <class scalar, int V>
__global__ void __launch_bounds__(kThreads, 5)
    gradient_rows_kernel(Maps<scalar> dx, Maps<const scalar> dy, Frames f, int64_t N, int64_t H, int64_t W) {
  using acc = acc_t<scalar>;
  using Pooled = Pack<scalar, V / 2>;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, packs = W / V;
  const int64_t row = quotient(at, packs), windows = (H + 1) / 2, c = quotient(row, windows), h = row - c * windows;
  const int64_t column = at - row * packs;
  if (c >= f.C) return;
  for (int64_t n = blockIdx.y; n < N; n += gridDim.y) {
    const scalar* from = dy.at(n, c, h * f.width + column * (V / 2));
    scalar* to = dx.at(n, c, 2 * h * W + column * V);
    const auto load = [&](int64_t j) {
      return h < f.height && j < f.F - 1 ? Pooled::load(from + j * f.C * dy.sc) : Pooled{};
    };
    Pooled earlier = {}, later = load(0);
#pragma unroll 1
    for (int64_t j = 0; j < f.F; ++j) {
      const Pooled next = load(j + 1);
      Pack<scalar, V> out;
      for (int k = 0; k < V; ++k)
        out.v[k] =
            static_cast<scalar>((static_cast<acc>(earlier.v[k / 2]) - static_cast<acc>(later.v[k / 2])) * acc(0.25));
      out.store(to);
      if (2 * h + 1 < H) out.store(to + W);
      to += f.C * dx.sc;
      earlier = later;
      later = next;
    }
  }
}

// How dense channels_last maps of few channels, pooled by 2, are cut: a block takes `windows` adjacent windows of a
// row. They go through shared memory: a channel's pixels and results are too far apart for wide accesses.
struct Tile {
  static constexpr int kBytes = 16384;  // of the windows' pixels

  int windows = 0;
  int64_t count = 0;  // tiles of a row; 0 where a frame has too many channels

  Tile(const Frames& f, int64_t row, int size) {
    const int V = kWidestBytes / size;
    const int64_t most = kBytes / (4 * f.F * f.C * size) / V * V;  // every tile begins at a multiple of 16 bytes
    if (most == 0) return;
    count = blocks_for(row, most);
    windows = static_cast<int>(blocks_for(blocks_for(row, count), V) * V);
  }
};

// `frames` and `channels` are f's where they are constants, else 0.
template <class scalar, int frames, int channels>
__global__ void __launch_bounds__(kThreads)
    difference_tile_kernel(Maps<scalar> y, Maps<const scalar> x, Frames f, Tile tile, int64_t N, int64_t W) {
  using acc = acc_t<scalar>;
  constexpr int V = kWidestBytes / sizeof(scalar), kPacks = Tile::kBytes / kWidestBytes;  // kPacks / 2 of a row
  __shared__ Pack<scalar, V> pixels[kPacks], results[kPacks / 4];
  const int F = frames ? frames : static_cast<int>(f.F), C = channels ? channels : static_cast<int>(f.C);
  const int FC = F * C, moving = FC - C, i = static_cast<int>(threadIdx.x);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * tile.windows;
  const int windows = static_cast<int>(f.width - first < tile.windows ? f.width - first : tile.windows);
  for (int64_t row = blockIdx.y; row < N * f.height; row += gridDim.y) {
    const int64_t n = quotient(row, f.height), h = row - n * f.height;
    const scalar* from = x.at(n, 0, 2 * (h * W + first));
    for (int at = i; at * V < 2 * windows * FC; at += kThreads)
      for (int a = 0; a < 2; ++a)
        __pipeline_memcpy_async(pixels + a * (kPacks / 2) + at, from + a * W * FC + at * V, kWidestBytes);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
    for (int item = i; item < windows * C; item += kThreads) {
      const int w = item / C, c = item - w * C;
      const scalar* upper = pixels[0].v + 2 * w * FC + c;
      const scalar* lower = upper + kPacks / 2 * V;
      scalar* out = results[0].v + w * moving + c;
      acc before[4];
#pragma unroll
      for (int j = 0; j < F; ++j) {
        const acc here[4] = {static_cast<acc>(upper[j * C]), static_cast<acc>(upper[j * C + FC]),
                             static_cast<acc>(lower[j * C]), static_cast<acc>(lower[j * C + FC])};
        if (j > 0) {
          const acc sum =
              ((here[0] - before[0]) + (here[1] - before[1])) + ((here[2] - before[2]) + (here[3] - before[3]));
          out[(j - 1) * C] = static_cast<scalar>(sum * acc(0.25));
        }
        for (int k = 0; k < 4; ++k) before[k] = here[k];
      }
    }
    __syncthreads();
    scalar* to = y.at(n, 0, h * f.width + first);
    for (int at = i; at * V < windows * moving; at += kThreads) results[at].store(to + at * V);
  }
}

// The transpose, as for planar maps; a column left over gets zero too.
template <class scalar, int frames, int channels>
__global__ void __launch_bounds__(kThreads)
    gradient_tile_kernel(Maps<scalar> dx, Maps<const scalar> dy, Frames f, Tile tile, int64_t N, int64_t H, int64_t W) {
  using acc = acc_t<scalar>;
  constexpr int V = kWidestBytes / sizeof(scalar), kPacks = Tile::kBytes / kWidestBytes;
  __shared__ Pack<scalar, V> gradients[kPacks / 4], pixels[kPacks / 2];
  const int F = frames ? frames : static_cast<int>(f.F), C = channels ? channels : static_cast<int>(f.C);
  const int FC = F * C, moving = FC - C, i = static_cast<int>(threadIdx.x);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * tile.windows, rows = (H + 1) / 2;
  const int columns = static_cast<int>(W - 2 * first < 2 * tile.windows ? W - 2 * first : 2 * tile.windows);
  for (int64_t row = blockIdx.y; row < N * rows; row += gridDim.y) {
    const int64_t n = quotient(row, rows), h = row - n * rows;
    const int windows = h < f.height ? columns / 2 : 0;
    if (i * V < windows * moving) gradients[i] = Pack<scalar, V>::load(dy.at(n, 0, h * f.width + first) + i * V);
    __syncthreads();
    for (int item = i; item < (columns + 1) / 2 * C; item += kThreads) {
      const int w = item / C, c = item - w * C;
      const scalar* from = gradients[0].v + w * moving + c;
      scalar* out = pixels[0].v + 2 * w * FC + c;
      acc earlier = 0;
#pragma unroll
      for (int j = 0; j < F; ++j) {
        const acc later = j < F - 1 && w < windows ? static_cast<acc>(from[j * C]) : acc(0);
        out[j * C] = out[j * C + FC] = static_cast<scalar>((earlier - later) * acc(0.25));
        earlier = later;
      }
    }
    __syncthreads();
    scalar* to = dx.at(n, 0, 2 * (h * W + first));
    for (int at = i; at * V < columns * FC; at += kThreads) {
      pixels[at].store(to + at * V);
      if (2 * h + 1 < H) pixels[at].store(to + W * FC + at * V);
    }
  }
}

// Calls f with frames and channels as constants where they are those of S-TDM, else with zeros.
template <class F>
void by_frames(const Frames& f, const F& call) {
  f.F == 5 && f.C == 3 ? call(std::integral_constant<int, 5>(), std::integral_constant<int, 3>())
                       : call(std::integral_constant<int, 0>(), std::integral_constant<int, 0>());
}

// Any layout and window: a thread has one result of a row, or V adjacent channels of one (channels_last). Frames are
// read twice, the second time from a cache: planar by the thread itself, which walks the frames of its channel,
// channels_last by the thread that is C channels on. `fixed` is the pool where it is a constant. Three blocks a
// processor are enough; the compiler would spill registers to fit a fourth.
template <class scalar, int V, int fixed>
__global__ void __launch_bounds__(kThreads, 3)
    difference_kernel(Maps<scalar> y, Maps<const scalar> x, Frames f, int64_t N, int64_t W, bool channels_last) {
  using acc = acc_t<scalar>;
  const int64_t pool = fixed ? fixed : f.pool, moving = (f.F - 1) * f.C;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t inner = channels_last ? moving / V : f.width, outer = quotient(at, inner), rest = at - outer * inner;
  const int64_t w = channels_last ? outer : rest, first = channels_last ? rest * V : outer;
  if (outer >= (channels_last ? f.width : f.C)) return;
  for (int64_t i = blockIdx.y; i < N * f.height; i += gridDim.y) {
    const int64_t n = quotient(i, f.height), h = i - n * f.height;
    for (int64_t c = first; c < moving; c += channels_last ? moving : f.C) {
      const scalar* here = x.at(n, c, h * pool * W + w * pool);
      const scalar* next = here + f.C * x.sc;
      acc sum[V] = {};
      for (int64_t a = 0; a < pool; ++a) {
        for (int64_t b = 0; b < pool; ++b) {
          const int64_t offset = (a * W + b) * x.sp;
          const auto minus = Pack<scalar, V>::load(here + offset), plus = Pack<scalar, V>::load(next + offset);
          for (int k = 0; k < V; ++k) sum[k] += static_cast<acc>(plus.v[k]) - static_cast<acc>(minus.v[k]);
        }
      }
      Pack<scalar, V> out;
      for (int k = 0; k < V; ++k)
        out.v[k] = static_cast<scalar>(fixed == 2 ? sum[k] * acc(0.25) : sum[k] / static_cast<acc>(pool * pool));
      out.store(y.at(n, c, h * f.width + w));
    }
  }
}

// dx_j = (dy_{j-1} - dy_j) / pool^2, the same for all pixels of a window; rows and columns left over get zero. A thread
// has one window of a channel, or of V adjacent channels (channels_last).
template <class scalar, int V, int fixed>
__global__ void __launch_bounds__(kThreads) gradient_kernel(Maps<scalar> dx, Maps<const scalar> dy, Frames f, int64_t N,
                                                            int64_t H, int64_t W, bool channels_last) {
  using acc = acc_t<scalar>;
  const int64_t pool = fixed ? fixed : f.pool, FC = f.F * f.C;
  const int64_t rows = (H + pool - 1) / pool, columns = (W + pool - 1) / pool;  // of windows
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t inner = channels_last ? FC / V : columns, outer = quotient(at, inner), rest = at - outer * inner;
  const int64_t w = channels_last ? outer : rest, c = channels_last ? rest * V : outer;
  if (outer >= (channels_last ? columns : FC)) return;
  for (int64_t i = blockIdx.y; i < N * rows; i += gridDim.y) {
    const int64_t n = quotient(i, rows), h = i - n * rows;
    Pack<scalar, V> earlier = {}, later = {}, out;
    if (h < f.height && w < f.width) {
      const scalar* from = dy.at(n, c, h * f.width + w);
      if (c >= f.C) earlier = Pack<scalar, V>::load(from - f.C * dy.sc);
      if (c < FC - f.C) later = Pack<scalar, V>::load(from);
    }
    for (int k = 0; k < V; ++k) {
      const acc share = static_cast<acc>(earlier.v[k]) - static_cast<acc>(later.v[k]);
      out.v[k] = static_cast<scalar>(fixed == 2 ? share * acc(0.25) : share / static_cast<acc>(pool * pool));
    }
    for (int64_t a = h * pool; a < (h + 1) * pool && a < H; ++a)
      for (int64_t b = w * pool; b < (w + 1) * pool && b < W; ++b) out.store(dx.at(n, c, a * W + b));
  }
}

// Kernels divide in 32 bits: positions in a map's channels, and rows.
void check_size(const Clip& x) {
  TEMPOPS_CHECK(x.C * x.P <= 0xffffffff && x.N * x.C * x.H <= 0xffffffff,
                "maps of more than 2^32 elements, or of more than 2^32 rows, are not supported");
}

// Whether channels_last maps are dense and their rows begin at multiples of 16 bytes.
bool whole_rows(const Clip& x) {
  const int64_t row = x.W * x.C;
  return x.dense_frames() && whole_packs(x, kWidestBytes / x.tensor.element_size(), row, row);
}

Tensor frame_difference(const Tensor& x_, int64_t n_frames, int64_t pool) {
  check(n_frames, pool);
  const DeviceGuard guard(x_);
  const Clip x = maps(x_, "x");
  const Frames f = frames_of(x, n_frames, pool);
  const Clip y = empty_clips(x, 1, (f.F - 1) * f.C, f.height, f.width);
  if (y.empty()) return y.tensor;
  check_size(x);
  by_dtype(x.dtype, [&](auto* type) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    constexpr int kWide = kWidestBytes / sizeof(scalar);
    const Maps<scalar> out(y);
    const Maps<const scalar> source(x);
    if (pool == 2 && !x.channels_last && whole_packs(x, kWide, x.sc, x.W)) {
      const int64_t blocks = blocks_for(f.C * f.height * (x.W / kWide));
      return launch(guard, difference_rows_kernel<scalar, kWide>, {blocks, x.N}, out, source, f, x.N, x.W);
    }
    const Tile tile(f, f.width, sizeof(scalar));
    if (pool == 2 && x.channels_last && tile.count && whole_rows(x) && whole_rows(y))
      return by_frames(f, [&](auto F, auto C) {
        launch(guard, difference_tile_kernel<scalar, F, C>, {tile.count, x.N * f.height}, out, source, f, tile, x.N,
               x.W);
      });
    const auto results = [&](int V) {
      return Grid{blocks_for(f.width * (x.channels_last ? y.C / V : f.C)), x.N * f.height};
    };
    if (pool != 2)
      launch(guard, difference_kernel<scalar, 1, 0>, results(1), out, source, f, x.N, x.W, x.channels_last);
    else if (x.channels_last && whole_packs(x, kWide, x.sp, f.C))
      launch(guard, difference_kernel<scalar, kWide, 2>, results(kWide), out, source, f, x.N, x.W, x.channels_last);
    else
      launch(guard, difference_kernel<scalar, 1, 2>, results(1), out, source, f, x.N, x.W, x.channels_last);
  });
  return y.tensor;
}

Tensor frame_difference_backward(const Tensor& grad, int64_t n_frames, int64_t pool, int64_t height, int64_t width) {
  check(n_frames, pool);
  const DeviceGuard guard(grad);
  const Clip dy = maps(grad, "grad");
  const Frames f = frames_of_gradient(dy, n_frames, pool, height, width);
  const Clip dx = empty_clips(dy, 1, f.F * f.C, height, width);
  if (dx.empty()) return dx.tensor;
  if (dy.empty()) return torch::stable::zero_(const_cast<Tensor&>(dx.tensor));
  check_size(dx);
  by_dtype(dy.dtype, [&](auto* type) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    constexpr int kWide = kWidestBytes / sizeof(scalar);
    const Maps<scalar> out(dx);
    const Maps<const scalar> source(dy);
    if (pool == 2 && !dy.channels_last && whole_packs(dx, kWide, dx.sc, width) &&
        whole_packs(dy, kWide / 2, dy.sc, dy.W)) {
      const int64_t blocks = blocks_for(f.C * ((height + 1) / 2) * (width / kWide));
      return launch(guard, gradient_rows_kernel<scalar, kWide>, {blocks, dx.N}, out, source, f, dx.N, height, width);
    }
    const Tile tile(f, (width + 1) / 2, sizeof(scalar));
    if (pool == 2 && dy.channels_last && tile.count && whole_rows(dx) && whole_rows(dy))
      return by_frames(f, [&](auto F, auto C) {
        launch(guard, gradient_tile_kernel<scalar, F, C>, {tile.count, dx.N * ((height + 1) / 2)}, out, source, f, tile,
               dx.N, height, width);
      });
    const auto windows = [&](int V) {
      return Grid{blocks_for(blocks_for(width, pool) * (dy.channels_last ? dx.C / V : dx.C)),
                  dx.N * blocks_for(height, pool)};
    };
    if (pool != 2)
      launch(guard, gradient_kernel<scalar, 1, 0>, windows(1), out, source, f, dx.N, height, width, dy.channels_last);
    else if (dy.channels_last && whole_packs(dy, kWide, dy.sp, f.C) && whole_packs(dx, kWide, dx.sp, f.C))
      launch(guard, gradient_kernel<scalar, kWide, 2>, windows(kWide), out, source, f, dx.N, height, width,
             dy.channels_last);
    else
      launch(guard, gradient_kernel<scalar, 1, 2>, windows(1), out, source, f, dx.N, height, width, dy.channels_last);
  });
  return dx.tensor;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tempops, CUDA, m) {
  m.impl("frame_difference", TORCH_BOX(&frame_difference));
  m.impl("frame_difference_backward", TORCH_BOX(&frame_difference_backward));
}

}  // namespace tempops
