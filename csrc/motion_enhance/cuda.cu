// motion_enhance on CUDA.
//
// Kernel size 3: a thread has V adjacent elements of kRows rows, and walks T. They are pixels of a row (kAlong) or
// channels of a pixel. The maximum around an element is that along each of three rows, then that of the three;
// neighbours are read through the first-level cache. Reads outside the plane are moved to its edge: an element of the
// window read twice leaves the maximum as it is. Of equals the first wins, and of NaNs the last, as in F.max_pool2d.
//
// The backward gathers: dR goes from each window to the row that won it, which stays in a thread's own columns, and
// then from each row's centre to the column that won there, which neighbours tell one another in shared memory.
//
// Other sizes: a thread has one element and looks at all of its window.
#include "../cuda.h"
#include "arguments.h"

namespace tempops {
namespace {

constexpr int kRows = 4;

struct Shape {
  int64_t N, T, C;
  int H, W;
  bool channels_last;

  explicit Shape(const Clip& x)
      : N(x.N), T(x.T), C(x.C), H(static_cast<int>(x.H)), W(static_cast<int>(x.W)), channels_last(x.channels_last) {
    TEMPOPS_CHECK(x.H == H && x.W == W, "x has too many rows or columns: ", x.H, " x ", x.W);
  }
  __device__ int64_t pixel(int i, int j) const {
    return static_cast<int64_t>(i) * W + j;
  }
};

// One direction in which frames are cut into tiles: `of_tile` each, of which `margin` on either side are read for their
// neighbours only, their results being another tile's.
struct Cut {
  int64_t all, tiles;
  int of_tile, margin = 0;

  Cut(int64_t all, int64_t widest, bool margins = false) : all(all) {
    margin = margins && all > widest ? 1 : 0;
    tiles = blocks_for(all, widest - 2 * margin);
    of_tile = static_cast<int>(blocks_for(all, tiles)) + 2 * margin;
  }
  __device__ int64_t first(int64_t tile) const {
    return tile * (of_tile - 2 * margin) - margin;
  }
};

// A block's tile: some columns of threads by some strips of kRows rows by some groups of channels, a group being V
// channels where channels are adjacent, else one. Where they are, 64 bytes of a pixel stay together if V > 1, and a
// tile has about as many rows as columns, so that little is read by two blocks.
struct Tiles {
  Shape shape;
  Cut columns, strips, groups;

  Tiles(const Clip& x, int V, bool exchange)
      : shape(x), columns(x.channels_last ? x.W : x.W / V, x.channels_last ? 16 : 64, exchange),
        strips(blocks_for(x.H, kRows), kThreads / least_groups(x, V) / columns.of_tile),
        groups(channel_groups(x, V), kThreads / columns.of_tile / strips.of_tile) {}

  static int64_t channel_groups(const Clip& x, int V) {
    return x.channels_last ? x.C / V : x.C;
  }
  static int64_t least_groups(const Clip& x, int V) {
    const int64_t bytes = x.tensor.element_size() * V;
    return x.channels_last ? std::min<int64_t>({8, 64 / bytes, channel_groups(x, V)}) : 1;
  }
  int64_t count() const {
    return columns.tiles * strips.tiles * groups.tiles;
  }
};

// What a thread has of a frame: V elements of kRows rows, or of as many as there are.
template <int V, bool kAlong>
struct Site {
  int64_t c, pixel;          // the first
  int up, down;              // how many rows there are above and below, counted as far as needed
  int step;                  // from this thread to the one of the next column
  bool inside, writes;       // has elements; has results
  bool leftmost, rightmost;  // of the plane

  __device__ explicit Site(const Tiles& tiles) {
    const bool channels_last = tiles.shape.channels_last;
    const auto &columns = tiles.columns, &strips = tiles.strips, &groups = tiles.groups;
    int id = threadIdx.x, group = 0;
    if (channels_last) group = id % groups.of_tile, id /= groups.of_tile;
    const int j = id % columns.of_tile, i = id / columns.of_tile % strips.of_tile;
    id /= columns.of_tile * strips.of_tile;
    if (!channels_last) group = id;
    const int64_t block = blockIdx.x, rest = quotient(block, groups.tiles), band = quotient(rest, columns.tiles);
    const int64_t at_group = groups.first(block - rest * groups.tiles) + group;
    const int64_t at_column = columns.first(rest - band * columns.tiles) + j;
    c = at_group * (kAlong ? 1 : V);
    const int64_t row = (strips.first(band) + i) * kRows, more = tiles.shape.H - 1 - row;
    pixel = row * tiles.shape.W + at_column * (kAlong ? V : 1);
    up = row == 0 ? 0 : kRows;
    down = more < 2 * kRows ? static_cast<int>(more) : 2 * kRows;
    step = channels_last ? groups.of_tile : 1;
    inside = (channels_last ? id == 0 : group < groups.of_tile) && at_group < groups.all && at_column >= 0 &&
             at_column < columns.all && more >= 0;
    writes = inside && j >= columns.margin && j < columns.of_tile - columns.margin;
    leftmost = at_column == 0;
    rightmost = at_column == columns.all - 1;
  }

  __device__ bool has_row(int r) const {
    return r >= -up && r <= down;
  }
  // The first row, or the nearest to row r < 0 that there is.
  template <class scalar>
  __device__ scalar* start(const Elements<scalar>& x, int64_t n, int64_t t, int r) const {
    return x.at(n, t, c, pixel) - (up < -r ? up : -r) * x.row;
  }
  // From row r to the next, or to what is nearest to the next. Pointers that walk take fewer registers than offsets.
  template <class scalar>
  __device__ scalar* next(const Elements<scalar>& x, scalar* from, int r) const {
    return r >= -up && r < down ? from + x.row : from;
  }
};

// A thread's elements of one row between their left and right neighbours.
template <class scalar, int V, bool kAlong>
struct Row {
  Pack<scalar, V> here;
  acc_t<scalar> left[V], centre[V], right[V];

  __device__ Row(const scalar* from, int64_t sp, const Site<V, kAlong>& at) : here(Pack<scalar, V>::load(from)) {
    using acc = acc_t<scalar>;
#pragma unroll
    for (int k = 0; k < V; ++k) centre[k] = static_cast<acc>(here.v[k]);
    if constexpr (kAlong) {
      left[0] = static_cast<acc>(from[at.leftmost ? 0 : -1]);
      right[V - 1] = static_cast<acc>(from[at.rightmost ? V - 1 : V]);
#pragma unroll
      for (int k = 1; k < V; ++k) left[k] = centre[k - 1], right[k - 1] = centre[k];
    } else {
      const auto before = Pack<scalar, V>::load(from - (at.leftmost ? 0 : sp));
      const auto after = Pack<scalar, V>::load(from + (at.rightmost ? 0 : sp));
#pragma unroll
      for (int k = 0; k < V; ++k) left[k] = static_cast<acc>(before.v[k]), right[k] = static_cast<acc>(after.v[k]);
    }
  }
};

// Whether v wins over m, which comes before it.
template <class acc>
__device__ bool wins(acc v, acc m) {
  return v > m || v != v;
}

template <class acc>
__device__ acc larger(acc a, acc b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<acc, float>) {  // one instruction, which the compiler does not find by itself
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
    return a;
  }
#endif
  return wins(b, a) ? b : a;
}

template <class scalar, int V, bool kAlong>
__global__ void __launch_bounds__(kThreads, 2)
    enhance_kernel(Elements<scalar> y, Elements<const scalar> x, Tiles tiles) {
  using acc = acc_t<scalar>;
  const Site<V, kAlong> at(tiles);
  if (!at.writes) return;
  for (int64_t n = blockIdx.y; n < tiles.shape.N; n += gridDim.y) {
    Pack<scalar, V> past[kRows];
    const scalar* first = at.start(x, n, 0, 0);
#pragma unroll
    for (int r = 0; r < kRows; first = at.next(x, first, r), ++r) past[r] = Pack<scalar, V>::load(first);
    for (int64_t t = 1; t < tiles.shape.T; ++t) {
      const scalar* from = at.start(x, n, t, -1);
      scalar* to = at.start(y, n, t - 1, 0);
      acc above[V]{}, middle[V]{}, below[V]{};  // maxima along three rows
      Pack<scalar, V> last;                     // the row before
#pragma unroll
      for (int r = -1; r <= kRows; from = at.next(x, from, r), ++r) {
        const Row<scalar, V, kAlong> row(from, x.sp, at);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          above[k] = middle[k], middle[k] = below[k];
          below[k] = larger(larger(row.left[k], row.centre[k]), row.right[k]);
        }
        if (r >= 1) {
          Pack<scalar, V> out;
#pragma unroll
          for (int k = 0; k < V; ++k) {
            const acc maximum = larger(larger(above[k], middle[k]), below[k]);
            out.v[k] = static_cast<scalar>(maximum - static_cast<acc>(past[r - 1].v[k]));
          }
          if (at.has_row(r - 1)) out.store(to);
          to += y.row;
          past[r - 1] = last;
        }
        last = row.here;
      }
    }
  }
}

// dx[t] = what the windows of R[t - 1] give to the elements that won them - dR[t].
template <class scalar, int V, bool kAlong>
__global__ void __launch_bounds__(kThreads, 2)
    enhance_backward_kernel(Elements<scalar> dx, Elements<const scalar> dy, Elements<const scalar> x, Tiles tiles) {
  using acc = acc_t<scalar>;
  // Of each row: what the windows of an element's column give it, and who wins the row around each of the V elements,
  // two bits each: 0 the left neighbour, 1 itself, 2 the right one.
  __shared__ acc sums[kRows][V][kThreads];
  __shared__ int winners[kRows][kThreads];
  const Site<V, kAlong> at(tiles);
  const int self = threadIdx.x;
  const int64_t T = tiles.shape.T;
  for (int64_t n = blockIdx.y; n < tiles.shape.N; n += gridDim.y) {
    Pack<scalar, V> grads[kRows + 2]{};  // from the row above on; dR[t - 1], then dR[t]
    for (int64_t t = 0; t < T; ++t) {
      if (at.inside && t > 0) {
        const scalar* from = at.start(x, n, t, -2);
        acc above[V]{}, middle[V]{}, below[V]{};  // maxima along three rows
        acc sum[kRows][V]{};
#pragma unroll
        for (int r = -2; r <= kRows + 1; from = at.next(x, from, r), ++r) {
          const Row<scalar, V, kAlong> row(from, x.sp, at);
          int row_winners = 0;
#pragma unroll
          for (int k = 0; k < V; ++k) {
            above[k] = middle[k], middle[k] = below[k];
            int winner = at.leftmost && (!kAlong || k == 0) ? 1 : 0;
            below[k] = row.left[k];
            if (wins(row.centre[k], below[k])) below[k] = row.centre[k], winner = 1;
            const bool last = at.rightmost && (!kAlong || k == V - 1);
            if (!last && wins(row.right[k], below[k])) below[k] = row.right[k], winner = 2;
            row_winners |= winner << (2 * k);
          }
          if (r >= 0 && r < kRows) winners[r][self] = row_winners;
          if (r < 0) continue;
          const int i = r - 1;  // the row of the windows
          if (at.has_row(i)) {
#pragma unroll
            for (int k = 0; k < V; ++k) {
              int winner = at.has_row(i - 1) ? 0 : 1;
              acc maximum = above[k];
              if (wins(middle[k], maximum)) maximum = middle[k], winner = 1;
              if (at.has_row(i + 1) && wins(below[k], maximum)) winner = 2;
              const acc grad = static_cast<acc>(grads[i + 1].v[k]);
#pragma unroll
              for (int d = 0; d < 3; ++d) {
                const int to = i - 1 + d;
                if (to >= 0 && to < kRows && winner == d) sum[to][k] += grad;
              }
            }
          }
          if (i >= 1) {
#pragma unroll
            for (int k = 0; k < V; ++k) sums[i - 1][k][self] = sum[i - 1][k];
          }
        }
      }
      if (at.inside && t + 1 < T) {
        const scalar* from = at.start(dy, n, t, -1);
#pragma unroll
        for (int r = -1; r <= kRows; from = at.next(dy, from, r), ++r) grads[r + 1] = Pack<scalar, V>::load(from);
      }
      __syncthreads();
      if (at.writes) {
        scalar* to = at.start(dx, n, t, 0);
#pragma unroll
        for (int r = 0; r < kRows; to += dx.row, ++r) {
          if (!at.has_row(r)) continue;
          // What the windows of column k of a thread give element `place` of the row around it.
          const auto from = [&](int thread, int k, int place) -> acc {
            return (winners[r][thread] >> (2 * k) & 3) == place ? sums[r][k][thread] : acc(0);
          };
          Pack<scalar, V> out;
#pragma unroll
          for (int k = 0; k < V; ++k) {
            acc total = 0;
            if (t > 0) {
              total = from(self, k, 1);
              if (kAlong && k > 0)
                total += from(self, k - 1, 2);
              else if (!at.leftmost)
                total += from(self - at.step, kAlong ? V - 1 : k, 2);
              if (kAlong && k + 1 < V)
                total += from(self, k + 1, 0);
              else if (!at.rightmost)
                total += from(self + at.step, kAlong ? 0 : k, 0);
            }
            if (t + 1 < T) total -= static_cast<acc>(grads[r + 1].v[k]);
            out.v[k] = static_cast<scalar>(total);
          }
          out.store(to);
        }
      }
      __syncthreads();
    }
  }
}

// Element `id` of a frame, in the order in which its elements lie in memory.
struct Spot {
  int64_t c;
  int i, j;

  __device__ Spot(const Shape& shape, int64_t id) {
    const int64_t inner = shape.channels_last ? shape.C : shape.pixel(shape.H, 0), outer = quotient(id, inner);
    const int64_t p = shape.channels_last ? outer : id - outer * inner;
    c = shape.channels_last ? id - outer * inner : outer;
    i = static_cast<int>(quotient(p, shape.W));
    j = static_cast<int>(p - shape.pixel(i, 0));
  }
};

// The pixels around one, as far as there are some.
struct Window {
  int top, bottom, left, right;

  __device__ Window(const Shape& shape, int i, int j, int radius)
      : top(i > radius ? i - radius : 0), bottom(radius < shape.H - i ? i + radius : shape.H - 1),
        left(j > radius ? j - radius : 0), right(radius < shape.W - j ? j + radius : shape.W - 1) {}
};

// The pixel that wins a window.
template <class scalar>
__device__ int64_t winner_of(const Window& window, const scalar* plane, int64_t sp, const Shape& shape) {
  using acc = acc_t<scalar>;
  int64_t winner = shape.pixel(window.top, window.left);
  acc maximum = static_cast<acc>(plane[winner * sp]);
  for (int i = window.top; i <= window.bottom; ++i) {
    for (int j = window.left; j <= window.right; ++j) {
      const int64_t p = shape.pixel(i, j);
      const acc v = static_cast<acc>(plane[p * sp]);
      if (wins(v, maximum)) maximum = v, winner = p;
    }
  }
  return winner;
}

// y[t] = other[t + 1], at the elements that won the windows of R[t], - other[t].
template <class scalar>
__global__ void __launch_bounds__(kThreads, 4)
    gather_kernel(Elements<scalar> y, Elements<const scalar> other, Elements<const scalar> x, Shape shape, int radius) {
  using acc = acc_t<scalar>;
  const int64_t id = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (id >= shape.C * shape.pixel(shape.H, 0)) return;
  const Spot at(shape, id);
  const Window window(shape, at.i, at.j, radius);
  for (int64_t f = blockIdx.y; f < shape.N * (shape.T - 1); f += gridDim.y) {
    const int64_t n = quotient(f, shape.T - 1), t = f - n * (shape.T - 1);
    const int64_t winner = winner_of(window, x.at(n, t + 1, at.c, 0), x.sp, shape);
    const int64_t p = shape.pixel(at.i, at.j);
    const acc maximum = static_cast<acc>(*other.at(n, t + 1, at.c, winner));
    *y.at(n, t, at.c, p) = static_cast<scalar>(maximum - static_cast<acc>(*other.at(n, t, at.c, p)));
  }
}

// Whether the element at (i, j) wins a window: none before it is as large, none after it is larger.
template <class scalar>
__device__ bool is_winner(int i, int j, const Window& window, const scalar* plane, int64_t sp, const Shape& shape) {
  using acc = acc_t<scalar>;
  const acc e = static_cast<acc>(plane[shape.pixel(i, j) * sp]);
#pragma unroll 1
  for (int h = window.top; h <= window.bottom; ++h) {
#pragma unroll 1
    for (int w = window.left; w <= window.right; ++w) {
      const acc v = static_cast<acc>(plane[shape.pixel(h, w) * sp]);
      const bool before = h < i || (h == i && w < j), itself = h == i && w == j;
      if (before ? !wins(e, v) : !itself && wins(v, e)) return false;
    }
  }
  return true;
}

// The backward for any size: an element asks of each window around it whether it won there, which mostly some of the
// first few elements deny.
template <class scalar>
__global__ void __launch_bounds__(kThreads, 4)
    gather_windows_kernel(Elements<scalar> dx, Elements<const scalar> dy, Elements<const scalar> x, Shape shape,
                          int radius) {
  using acc = acc_t<scalar>;
  const int64_t id = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (id >= shape.C * shape.pixel(shape.H, 0)) return;
  const Spot at(shape, id);
  const Window around(shape, at.i, at.j, radius);
  const int64_t p = shape.pixel(at.i, at.j);
  for (int64_t f = blockIdx.y; f < shape.N * shape.T; f += gridDim.y) {
    const int64_t n = quotient(f, shape.T), t = f - n * shape.T;
    acc sum = 0;
    if (t > 0) {
      const scalar* plane = x.at(n, t, at.c, 0);
      for (int i = around.top; i <= around.bottom; ++i) {
        for (int j = around.left; j <= around.right; ++j) {
          if (is_winner(at.i, at.j, Window(shape, i, j, radius), plane, x.sp, shape))
            sum += static_cast<acc>(*dy.at(n, t - 1, at.c, shape.pixel(i, j)));
        }
      }
    }
    if (t + 1 < shape.T) sum -= static_cast<acc>(*dy.at(n, t, at.c, p));
    *dx.at(n, t, at.c, p) = static_cast<scalar>(sum);
  }
}

// Calls f with how many elements a thread has in a row, and whether they are pixels: whatever the layout, one at a time
// where not all rows (planar) or pixels (channels_last) of the tensors are whole packs.
template <class scalar, int kChannels, class F, class... Clips>
void by_pack(const F& f, const Clip& x, const Clips&... others) {
  constexpr int kPixels = std::min<int>(4, kWidestBytes / sizeof(scalar));
  const int V = x.channels_last ? kChannels : kPixels;
  if (!(whole_packs(x, V, x.W) && ... && whole_packs(others, V, x.W)))
    f(std::integral_constant<int, 1>(), std::false_type());
  else if (x.channels_last)
    f(std::integral_constant<int, kChannels>(), std::false_type());
  else
    f(std::integral_constant<int, kPixels>(), std::true_type());
}

template <class scalar>
void gather(const DeviceGuard& guard, const Clip& y, const Clip& other, const Clip& x, int64_t radius) {
  launch(guard, gather_kernel<scalar>, {blocks_for(x.C * x.P), x.N * (x.T - 1)}, Elements<scalar>(y),
         Elements<const scalar>(other), Elements<const scalar>(x), Shape(x), radius);
}

Tensor motion_enhance(const Tensor& x_, Segments n_segment, int64_t kernel_size) {
  const DeviceGuard guard(x_);
  const Clip x = clips(x_, n_segment);
  const int64_t radius = radius_of(x, kernel_size);
  const Clip y = empty_clips(x, x.T - 1, x.C, x.H, x.W);
  if (y.empty()) return y.tensor;
  by_dtype(x.dtype, [&](auto* type) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    if (radius != 1) return gather<scalar>(guard, y, x, x, radius);
    by_pack<scalar, kWidestBytes / sizeof(scalar)>([&](auto V, auto along) {
      const Tiles tiles(x, V, false);
      launch(guard, enhance_kernel<scalar, V, along>, {tiles.count(), x.N}, Elements<scalar>(y),
             Elements<const scalar>(x), tiles);
    }, x, y);
  });
  return y.tensor;
}

Tensor motion_enhance_backward(const Tensor& grad, const Tensor& x_, Segments n_segment, int64_t kernel_size) {
  const DeviceGuard guard(x_);
  const Clip x = clips(x_, n_segment);
  const int64_t radius = radius_of(x, kernel_size);
  const Clip dy = gradient_of(x, grad);
  const Clip dx = empty_like(x);
  if (dx.empty()) return dx.tensor;
  by_dtype(x.dtype, [&](auto* type) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    const Elements<scalar> to(dx);
    const Elements<const scalar> from_dy(dy), from_x(x);
    if (radius != 1)
      return launch(guard, gather_windows_kernel<scalar>, {blocks_for(x.C * x.P), x.N * x.T}, to, from_dy, from_x,
                    Shape(x), radius);
    // Half of what one load may have, for the registers' sake.
    by_pack<scalar, kWidestBytes / 2 / sizeof(scalar)>([&](auto V, auto along) {
      const Tiles tiles(x, V, true);
      launch(guard, enhance_backward_kernel<scalar, V, along>, {tiles.count(), x.N}, to, from_dy, from_x, tiles);
    }, x, dx, dy);
  });
  return dx.tensor;
}

Tensor motion_enhance_gather(const Tensor& other_, const Tensor& x_, Segments n_segment, int64_t kernel_size) {
  const DeviceGuard guard(x_);
  const Clip x = clips(x_, n_segment);
  const int64_t radius = radius_of(x, kernel_size);
  const Clip other = clips_like(other_, x, "other");
  const Clip y = empty_clips(x, x.T - 1, x.C, x.H, x.W);
  if (y.empty()) return y.tensor;
  by_dtype(x.dtype, [&](auto* type) { gather<std::remove_pointer_t<decltype(type)>>(guard, y, other, x, radius); });
  return y.tensor;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tempops, CUDA, m) {
  m.impl("motion_enhance", TORCH_BOX(&motion_enhance));
  m.impl("motion_enhance_backward", TORCH_BOX(&motion_enhance_backward));
  m.impl("motion_enhance_gather", TORCH_BOX(&motion_enhance_gather));
}

}  // namespace tempops
