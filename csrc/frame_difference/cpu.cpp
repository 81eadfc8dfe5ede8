// frame_difference on the CPU. A run of rows is subtracted into a buffer of the first-level cache and pooled from
// there, for one pair of frames after the other: the later frame of a pair is read from the cache as the earlier of the
// next.
#include "../cpu.h"
#include "arguments.h"

namespace tempops {
namespace {

constexpr int64_t kRun = 4096;  // elements subtracted at a time: with both frames they fit the second-level cache

// How a planar map is cut: `channels` whole maps where they are small, else `rows` pooled rows of one channel.
struct Cut {
  int64_t channels, rows, channel_blocks, row_blocks;

  int64_t items(int64_t N) const {
    return N * channel_blocks * row_blocks;
  }
};

Cut cut_of(const Frames& f, int64_t H, int64_t W) {
  const int64_t P = H * W;
  const int64_t channels = std::max<int64_t>(1, std::min(f.C, kRun / P));
  const int64_t rows = P <= kRun ? f.height : std::max<int64_t>(1, kRun / (W * f.pool));
  return {channels, rows, (f.C + channels - 1) / channels, (f.height + rows - 1) / rows};
}

// One item of a cut: rows [h0, h0 + rows) of the pooled maps of channels [c0, c0 + channels).
struct Block {
  int64_t n, c0, channels, h0, rows;

  TEMPOPS_INLINE Block(int64_t item, const Cut& cut, const Frames& f) {
    n = item / (cut.channel_blocks * cut.row_blocks);
    c0 = item / cut.row_blocks % cut.channel_blocks * cut.channels;
    h0 = item % cut.row_blocks * cut.rows;
    channels = std::min(cut.channels, f.C - c0);
    rows = std::min(cut.rows, f.height - h0);
  }
};

// Short rows are handled a vector at a time, past their end: what is written there is written again by the next row.
// Every buffer has room for one vector more.
constexpr int64_t kVector = 16;

template <class T>
std::vector<T> buffer_of(int64_t size) {
  return std::vector<T>(size + 2 * kVector);
}

template <class scalar, class acc>
TEMPOPS_INLINE inline void subtract(acc* __restrict difference, const scalar* __restrict here,
                                    const scalar* __restrict next, int64_t count) {
  for (int64_t i = 0; i < count; ++i) difference[i] = load(next[i]) - load(here[i]);
}

// The same summed over `pool` rows, `row` elements apart. `fixed` is the pool where it is a constant.
template <int fixed, class scalar, class acc>
TEMPOPS_INLINE inline void subtract_rows(acc* __restrict sum, const scalar* __restrict here,
                                         const scalar* __restrict next, int64_t row, int64_t pool, int64_t count) {
  if constexpr (fixed == 2) {
    for (int64_t i = 0; i < count; ++i)
      sum[i] = (load(next[i]) - load(here[i])) + (load(next[i + row]) - load(here[i + row]));
  } else {
    subtract(sum, here, next, count);
    for (int64_t a = 1; a < pool; ++a)
      for (int64_t i = 0; i < count; ++i) sum[i] += load(next[i + a * row]) - load(here[i + a * row]);
  }
}

// sum / pool^2. A quarter is exact, so four need no division.
template <int fixed, class acc>
TEMPOPS_INLINE inline acc mean(acc sum, int64_t pool) {
  return fixed == 2 ? sum * acc(0.25) : sum / static_cast<acc>(pool * pool);
}

template <int fixed, class scalar, class acc>
TEMPOPS_INLINE inline void put_means(scalar* __restrict out, const acc* __restrict sum, int64_t pool, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = store<scalar>(mean<fixed>(sum[i], pool));
}

// out [width] = the sums of the windows of `pool` rows of W elements.
template <int fixed, class acc>
TEMPOPS_INLINE inline void add_windows(acc* __restrict out, const acc* __restrict row, int64_t W, int64_t pool,
                                       int64_t width) {
  if constexpr (fixed == 2) {
    for (int64_t w = 0; w < width; w += kVector)
      for (int64_t i = w; i < w + kVector; ++i)
        out[i] = (row[2 * i] + row[2 * i + 1]) + (row[W + 2 * i] + row[W + 2 * i + 1]);
  } else {
    for (int64_t w = 0; w < width; ++w) {
      out[w] = 0;
      for (int64_t a = 0; a < pool; ++a)
        for (int64_t i = 0; i < pool; ++i) out[w] += row[a * W + w * pool + i];
    }
  }
}

// The reverse: each element `pool` times.
template <int fixed, class scalar>
TEMPOPS_INLINE inline void repeat_columns(scalar* __restrict out, const scalar* __restrict row, int64_t pool,
                                          int64_t width) {
  if constexpr (fixed == 2) {
    for (int64_t w = 0; w < width; w += kVector)
      for (int64_t i = w; i < w + kVector; ++i) out[2 * i] = out[2 * i + 1] = row[i];
  } else {
    for (int64_t w = 0; w < width; ++w)
      for (int64_t i = 0; i < pool; ++i) out[w * pool + i] = row[w];
  }
}

template <int fixed, class scalar>
void difference_planar(const Clip& y, const Clip& x, const Frames& f) {
  using acc = acc_t<scalar>;
  const Cut cut = cut_of(f, x.H, x.W);
  parallel(cut.items(x.N), f.F * cut.channels * cut.rows * f.pool * x.W,
           [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    const int64_t pool = fixed ? fixed : f.pool, W = x.W;
    auto differences = buffer_of<acc>(std::max(cut.channels * x.P, cut.rows * pool * W));
    auto sums = buffer_of<acc>(cut.channels * cut.rows * f.width);
    for (int64_t item = begin; item < end; ++item) {
      const Block b(item, cut, f);
      const int64_t each = b.rows * f.width;                          // results a channel
      const int64_t map = b.channels == 1 ? b.rows * pool * W : x.P;  // differences a channel
      const bool together = x.sc == x.P;
      for (int64_t j = 0; j + 1 < f.F; ++j) {
        const scalar* here = x.frame<scalar>(b.n, 0) + (j * f.C + b.c0) * x.sc + b.h0 * pool * W;
        for (int64_t c = 0; c < (together ? 1 : b.channels); ++c)
          subtract(&differences[c * map], here + c * x.sc, here + (f.C + c) * x.sc, together ? b.channels * map : map);
        for (int64_t c = 0; c < b.channels; ++c)
          for (int64_t h = 0; h < b.rows; ++h)
            add_windows<fixed>(&sums[c * each + h * f.width], &differences[c * map + h * pool * W], W, pool, f.width);
        scalar* out = y.frame<scalar>(b.n, 0) + (j * f.C + b.c0) * y.sc + b.h0 * f.width;
        put_means<fixed>(out, sums.data(), pool, b.channels * each);
      }
    }
  });
}

// A row of pixels is subtracted from itself, C channels on: [x_1 - x_0, x_2 - x_1, ...] a pixel, with C values between
// two pixels that nobody reads.
template <int fixed, class scalar>
void difference_channels_last(const Clip& y, const Clip& x, const Frames& f) {
  using acc = acc_t<scalar>;
  const int64_t pool = fixed ? fixed : f.pool;
  const int64_t moving = (f.F - 1) * f.C;
  const bool many = fixed == 2 && moving >= 2 * kVector;  // channels enough that a pixel fills vectors by itself
  const int64_t columns = many ? f.width : std::max<int64_t>(1, kRun / (pool * x.C));
  const int64_t blocks = (f.width + columns - 1) / columns;
  parallel(x.N * f.height * blocks, columns * pool * pool * x.C, [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    auto differences = buffer_of<acc>(columns * pool * x.C);
    auto sums = buffer_of<acc>(columns * moving);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / (f.height * blocks), h = item / blocks % f.height;
      const int64_t w0 = item % blocks * columns, results = std::min(columns, f.width - w0), pixels = results * pool;
      const scalar* row = x.frame<scalar>(n, 0) + (h * pool * x.W + w0 * pool) * x.sp;
      scalar* out = y.frame<scalar>(n, 0) + (h * f.width + w0) * y.sp;
      if (many) {
        const int64_t below = x.W * x.sp;
        for (int64_t w = 0; w < results; ++w) {
          const scalar* __restrict a = row + 2 * w * x.sp;
          const scalar* __restrict b = a + x.sp;
          scalar* __restrict to = out + w * y.sp;
          for (int64_t k = 0; k < moving; ++k) {
            const acc above = (load(a[k + f.C]) - load(a[k])) + (load(b[k + f.C]) - load(b[k]));
            const acc under =
                (load(a[below + k + f.C]) - load(a[below + k])) + (load(b[below + k + f.C]) - load(b[below + k]));
            to[k] = store<scalar>(mean<fixed>(above + under, pool));
          }
        }
        continue;
      }
      const bool together = x.sp == x.C;
      for (int64_t p = 0; p < (together ? 1 : pixels); ++p) {
        const scalar* here = row + p * x.sp;
        subtract_rows<fixed>(&differences[p * x.C], here, here + f.C, x.W * x.sp, pool,
                             together ? pixels * x.C - f.C : moving);
      }
      for (int64_t w = 0; w < results; ++w) {
        acc* __restrict to = &sums[w * moving];
        const acc* __restrict from = &differences[w * pool * x.C];
        for (int64_t k = 0; k < moving; k += kVector)
          for (int64_t i = k; i < k + kVector; ++i) {
            to[i] = from[i];
            for (int64_t p = 1; p < pool; ++p) to[i] += from[p * x.C + i];
          }
      }
      put_means<fixed>(out, sums.data(), pool, results * moving);
    }
  });
}

// dx_j = (dy_{j-1} - dy_j) / pool^2, the same for all pixels of a window; rows and columns left over get zero.
template <int fixed, class scalar>
void gradient_planar(const Clip& dx, const Clip& dy, const Frames& f) {
  const Cut cut = cut_of(f, dx.H, dx.W);
  parallel(cut.items(dx.N), f.F * cut.channels * cut.rows * f.pool * dx.W,
           [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    const int64_t pool = fixed ? fixed : f.pool, W = dx.W;
    auto shares = buffer_of<scalar>(cut.channels * cut.rows * f.width);
    auto maps = buffer_of<scalar>(std::max(cut.channels * dx.P, (cut.rows + 1) * pool * W));
    for (int64_t item = begin; item < end; ++item) {
      const Block b(item, cut, f);
      const int64_t each = b.rows * f.width;
      const bool bottom = b.h0 + b.rows == f.height;
      const int64_t height = bottom ? dx.H - b.h0 * pool : b.rows * pool;
      const bool together = dy.sc == dy.P && b.rows == f.height;
      const int64_t runs = together ? 1 : b.channels, count = together ? b.channels * each : each;
      for (int64_t j = 0; j < f.F; ++j) {
        const scalar* later = dy.frame<scalar>(b.n, 0) + (j * f.C + b.c0) * dy.sc + b.h0 * f.width;
        const scalar* earlier = later - f.C * dy.sc;
        for (int64_t r = 0; r < runs; ++r) {
          scalar* __restrict e = &shares[r * each];
          const scalar* __restrict plus = earlier + r * dy.sc;
          const scalar* __restrict minus = later + r * dy.sc;
          if (j == 0)
            for (int64_t i = 0; i < count; ++i) e[i] = store<scalar>(mean<fixed>(-load(minus[i]), pool));
          else if (j + 1 == f.F)
            for (int64_t i = 0; i < count; ++i) e[i] = store<scalar>(mean<fixed>(load(plus[i]), pool));
          else
            for (int64_t i = 0; i < count; ++i) e[i] = store<scalar>(mean<fixed>(load(plus[i]) - load(minus[i]), pool));
        }
        for (int64_t c = 0; c < b.channels; ++c) {
          scalar* row = &maps[c * height * W];
          for (int64_t h = 0; h < b.rows * pool; ++h, row += W) {
            repeat_columns<fixed>(row, &shares[c * each + h / pool * f.width], pool, f.width);
            if (fixed == 2 && W % 2) row[W - 1] = scalar(0);
            for (int64_t w = f.width * pool; fixed != 2 && w < W; ++w) row[w] = scalar(0);
          }
          if (bottom) std::memset(row, 0, (height - b.rows * pool) * W * sizeof(scalar));
        }
        scalar* out = dx.frame<scalar>(b.n, 0) + (j * f.C + b.c0) * dx.sc + b.h0 * pool * W;
        std::memcpy(out, maps.data(), b.channels * height * W * sizeof(scalar));
      }
    }
  });
}

template <int fixed, class scalar>
void gradient_channels_last(const Clip& dx, const Clip& dy, const Frames& f) {
  using acc = acc_t<scalar>;
  const int64_t pool = fixed ? fixed : f.pool, FC = dx.C, moving = dy.C;
  const int64_t columns = std::max<int64_t>(1, std::min(f.width, kRun / (pool * FC)));
  const bool many = FC >= 4 * kVector;  // channels enough that a pixel fills vectors by itself
  parallel(dx.N * f.height, pool * dx.W * FC, [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    auto padded = buffer_of<acc>(columns * FC + f.C);
    auto shares = buffer_of<scalar>(columns * FC), repeated = buffer_of<scalar>(columns * pool * FC);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / f.height, h = item % f.height;
      scalar* top = dx.frame<scalar>(n, 0) + h * pool * dx.W * FC;
      for (int64_t w = 0; many && w < f.width; ++w) {
        const scalar* __restrict from = dy.frame<scalar>(n, 0) + (h * f.width + w) * dy.sp;
        scalar* __restrict share = shares.data();
        for (int64_t k = 0; k < f.C; ++k) share[k] = store<scalar>(mean<fixed>(-load(from[k]), pool));
        for (int64_t k = f.C; k < moving; ++k)
          share[k] = store<scalar>(mean<fixed>(load(from[k - f.C]) - load(from[k]), pool));
        for (int64_t k = moving; k < FC; ++k) share[k] = store<scalar>(mean<fixed>(load(from[k - f.C]), pool));
        for (int64_t a = 0; a < pool; ++a)
          for (int64_t p = 0; p < pool; ++p) {
            scalar* __restrict to = top + (a * dx.W + w * pool + p) * FC;
            for (int64_t k = 0; k < FC; ++k) to[k] = share[k];
          }
      }
      for (int64_t w0 = many ? f.width : 0; w0 < f.width; w0 += columns) {
        const int64_t windows_here = std::min(columns, f.width - w0);
        const scalar* from = dy.frame<scalar>(n, 0) + (h * f.width + w0) * dy.sp;
        // dy with C zeros before each pixel and after the last: a pixel's gradient is this minus itself, C channels on.
        acc* __restrict wide = padded.data();
        for (int64_t w = 0; w <= windows_here; ++w) {
          for (int64_t k = 0; k < f.C; ++k) wide[w * FC + k] = 0;
          if (w == windows_here) break;
          for (int64_t k = 0; k < moving; ++k) wide[w * FC + f.C + k] = load(from[w * dy.sp + k]);
        }
        scalar* __restrict share = shares.data();
        for (int64_t i = 0; i < windows_here * FC; ++i)
          share[i] = store<scalar>(mean<fixed>(wide[i] - wide[i + f.C], pool));
        scalar* __restrict to = repeated.data();
        for (int64_t w = 0; w < windows_here; ++w)
          for (int64_t p = 0; p < pool; ++p, to += FC)
            for (int64_t k = 0; k < FC; k += kVector)
              for (int64_t i = k; i < k + kVector; ++i) to[i] = share[w * FC + i];
        for (int64_t a = 0; a < pool; ++a)
          std::memcpy(top + (a * dx.W + w0 * pool) * FC, repeated.data(), windows_here * pool * FC * sizeof(scalar));
      }
      const int64_t rows = h + 1 == f.height ? dx.H - h * pool : pool;
      for (int64_t a = 0; a < rows; ++a) {
        const int64_t filled = a < pool ? f.width * pool : 0;
        std::memset(top + (a * dx.W + filled) * FC, 0, (dx.W - filled) * FC * sizeof(scalar));
      }
    }
  });
}

Tensor frame_difference(const Tensor& x_, int64_t n_frames, int64_t pool) {
  check(n_frames, pool);
  const Clip x = maps(x_, "x");
  const Frames f = frames_of(x, n_frames, pool);
  const Clip y = empty_clips(x, 1, (f.F - 1) * f.C, f.height, f.width);
  if (y.empty()) return y.tensor;
  by_dtype(x.dtype, [&](auto* type) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    if (pool == 2)
      x.channels_last ? difference_channels_last<2, scalar>(y, x, f) : difference_planar<2, scalar>(y, x, f);
    else
      x.channels_last ? difference_channels_last<0, scalar>(y, x, f) : difference_planar<0, scalar>(y, x, f);
  });
  return y.tensor;
}

Tensor frame_difference_backward(const Tensor& grad, int64_t n_frames, int64_t pool, int64_t height, int64_t width) {
  check(n_frames, pool);
  const Clip dy = maps(grad, "grad");
  const Frames f = frames_of_gradient(dy, n_frames, pool, height, width);
  const Clip dx = empty_clips(dy, 1, f.F * f.C, height, width);
  if (dx.empty()) return dx.tensor;
  if (dy.empty()) return torch::stable::zero_(const_cast<Tensor&>(dx.tensor));
  by_dtype(dy.dtype, [&](auto* type) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    if (pool == 2)
      dy.channels_last ? gradient_channels_last<2, scalar>(dx, dy, f) : gradient_planar<2, scalar>(dx, dy, f);
    else
      dy.channels_last ? gradient_channels_last<0, scalar>(dx, dy, f) : gradient_planar<0, scalar>(dx, dy, f);
  });
  return dx.tensor;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tempops, m) {
  m.def("frame_difference(Tensor x, int n_frames=5, int pool=2) -> Tensor");
  m.def("frame_difference_backward(Tensor grad, int n_frames, int pool, SymInt height, SymInt width) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tempops, CPU, m) {
  m.impl("frame_difference", TORCH_BOX(&frame_difference));
  m.impl("frame_difference_backward", TORCH_BOX(&frame_difference_backward));
}

}  // namespace tempops
