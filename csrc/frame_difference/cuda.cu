// frame_difference on CUDA. What is pooled are differences, not frames: the difference of two means of frames that are
// alike would lose digits.
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

// Planar maps pooled by 2: a thread has V columns of two rows and walks the frames of a channel with the last one in
// registers.
template <class scalar, int V>
__global__ void __launch_bounds__(kThreads)
    difference_rows_kernel(Maps<scalar> y, Maps<const scalar> x, Frames f, int64_t N, int64_t W) {
  using acc = acc_t<scalar>;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, packs = W / V;
  const int64_t row = quotient(at, packs), c = quotient(row, f.height), h = row - c * f.height;
  const int64_t column = at - row * packs;
  if (c >= f.C) return;
  for (int64_t n = blockIdx.y; n < N; n += gridDim.y) {
    Pack<scalar, V> before[2];
    for (int64_t j = 0; j < f.F; ++j) {
      const scalar* from = x.at(n, j * f.C + c, 2 * h * W + column * V);
      const Pack<scalar, V> here[2] = {Pack<scalar, V>::load(from), Pack<scalar, V>::load(from + W)};
      if (j > 0) {
        Pack<scalar, V / 2> out;
        for (int k = 0; k < V / 2; ++k) {
          acc sum[2];
          for (int a = 0; a < 2; ++a)
            sum[a] = (static_cast<acc>(here[a].v[2 * k]) - static_cast<acc>(before[a].v[2 * k])) +
                     (static_cast<acc>(here[a].v[2 * k + 1]) - static_cast<acc>(before[a].v[2 * k + 1]));
          out.v[k] = static_cast<scalar>((sum[0] + sum[1]) * acc(0.25));
        }
        out.store(y.at(n, (j - 1) * f.C + c, h * f.width + column * (V / 2)));
      }
      before[0] = here[0];
      before[1] = here[1];
    }
  }
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
// has V adjacent elements of a row of dx, which is dense: pixels of a channel (planar) or channels of the row's pixels
// (channels_last). It writes them to all rows of a window.
template <class scalar, int V, int fixed>
__global__ void __launch_bounds__(kThreads) gradient_kernel(scalar* dx, Maps<const scalar> dy, Frames f, int64_t rows,
                                                            int64_t H, int64_t W, bool channels_last) {
  using acc = acc_t<scalar>;
  const int64_t pool = fixed ? fixed : f.pool, FC = f.F * f.C, moving = FC - f.C;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V;
  const int64_t length = channels_last ? W * FC : W, maps = channels_last ? 1 : FC, windows = (H + pool - 1) / pool;
  if (begin >= length) return;
  const int64_t pixel = channels_last ? quotient(begin, FC) : begin, channel = channels_last ? begin - pixel * FC : 0;
  for (int64_t i = blockIdx.y; i < rows * windows; i += gridDim.y) {
    const int64_t row = quotient(i, windows), h = i - row * windows, n = quotient(row, maps);
    int64_t w = pixel, c = channels_last ? channel : row - n * maps;
    Pack<scalar, V> out;
    for (int k = 0; k < V; ++k) {
      const int64_t window = quotient(w, pool);
      acc share = 0;
      if (h < f.height && window < f.width) {
        const scalar* later = dy.at(n, c, h * f.width + window);
        if (c >= f.C) share = static_cast<acc>(*(later - f.C * dy.sc));
        if (c < moving) share -= static_cast<acc>(*later);
      }
      out.v[k] = static_cast<scalar>(fixed == 2 ? share * acc(0.25) : share / static_cast<acc>(pool * pool));
      if (!channels_last) {
        ++w;
      } else if (++c == FC) {
        c = 0;
        ++w;
      }
    }
    for (int64_t a = 0; a < pool; ++a)
      if (h * pool + a < H) out.store(dx + (row * H + h * pool + a) * length + begin);
  }
}

// Kernels divide in 32 bits: positions in a map's channels, and rows.
void check_size(const Clip& x) {
  TEMPOPS_CHECK(x.C * x.P <= 0xffffffff && x.N * x.C * x.H <= 0xffffffff,
                "maps of more than 2^32 elements, or of more than 2^32 rows, are not supported");
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
    const int64_t length = dy.channels_last ? width * dx.C : width, rows = dy.channels_last ? dx.N : dx.N * dx.C;
    const bool aligned = reinterpret_cast<uintptr_t>(dx.address) % kWidestBytes == 0;
    constexpr int64_t kWide = kWidestBytes / sizeof(scalar);
    by_width<scalar>(aligned && length % kWide == 0 ? kWide : 1, [&](auto V) {
      const auto run = [&](auto kernel) {
        launch(guard, kernel, {blocks_for(length, kThreads * V), rows * ((height + pool - 1) / pool)},
               dx.data<scalar>(), Maps<const scalar>(dy), f, rows, height, width, dy.channels_last);
      };
      pool == 2 ? run(gradient_kernel<scalar, V, 2>) : run(gradient_kernel<scalar, V, 0>);
    });
  });
  return dx.tensor;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tempops, CUDA, m) {
  m.impl("frame_difference", TORCH_BOX(&frame_difference));
  m.impl("frame_difference_backward", TORCH_BOX(&frame_difference_backward));
}

}  // namespace tempops
