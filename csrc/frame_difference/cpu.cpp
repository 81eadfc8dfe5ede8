// frame_difference on the CPU. A run of rows is subtracted into a buffer of the first-level cache and pooled from there,
// for one pair of frames after the other: the later frame of a pair is read from the cache as the earlier of the next.
#include "../cpu.h"

namespace tempops {
namespace {

// F frames of C channels each, side by side in x's channels; pooled maps of `height` x `width`.
struct Frames {
  int64_t F, C, pool, height, width;
};

constexpr int64_t kRun = 1024;  // elements of the buffer: with both frames' rows it fits the first-level cache

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

// The sum of `pool` columns. A constant `pool` vectorises.
template <class acc>
TEMPOPS_INLINE inline void add_columns(acc* __restrict sum, const acc* __restrict row, int64_t pool, int64_t width,
                                       bool first) {
  for (int64_t w = 0; w < width; ++w) {
    acc s = first ? 0 : sum[w];
    for (int64_t i = 0; i < pool; ++i) s += row[w * pool + i];
    sum[w] = s;
  }
}

// out [rows, width] = means over the pool x pool windows of buffer [rows * pool, W].
template <class scalar, class acc>
TEMPOPS_INLINE inline void pool_rows(scalar* __restrict out, const acc* __restrict buffer, acc* __restrict sum,
                                     int64_t rows, int64_t W, const Frames& f) {
  const acc count = static_cast<acc>(f.pool * f.pool);
  for (int64_t h = 0; h < rows; ++h) {
    const acc* from = buffer + h * f.pool * W;
    if (f.pool == 2) {
      for (int64_t w = 0; w < f.width; ++w)
        out[h * f.width + w] = store<scalar>(
            ((from[2 * w] + from[2 * w + 1]) + (from[W + 2 * w] + from[W + 2 * w + 1])) * acc(0.25));
      continue;
    }
    for (int64_t i = 0; i < f.pool; ++i) add_columns(sum, from + i * W, f.pool, f.width, i == 0);
    for (int64_t w = 0; w < f.width; ++w) out[h * f.width + w] = store<scalar>(sum[w] / count);
  }
}

template <class scalar>
void difference_planar(const Clip& y, const Clip& x, const Frames& f) {
  using acc = acc_t<scalar>;
  const Cut cut = cut_of(f, x.H, x.W);
  parallel(cut.items(x.N), f.F * cut.channels * cut.rows * f.pool * x.W, [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    std::vector<acc> buffer(std::max(cut.channels * x.P, cut.rows * f.pool * x.W)), sum(f.width);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / (cut.channel_blocks * cut.row_blocks), block = item % (cut.channel_blocks * cut.row_blocks);
      const int64_t c0 = block / cut.row_blocks * cut.channels, channels = std::min(cut.channels, f.C - c0);
      const int64_t h0 = block % cut.row_blocks * cut.rows, rows = std::min(cut.rows, f.height - h0);
      const int64_t each = channels == 1 ? rows * f.pool * x.W : x.P;  // elements to subtract, a channel
      const bool together = x.sc == x.P;                               // the channels are one run of memory
      for (int64_t j = 0; j + 1 < f.F; ++j) {
        const scalar* here = x.frame<scalar>(n, 0) + (j * f.C + c0) * x.sc + h0 * f.pool * x.W;
        const scalar* next = here + f.C * x.sc;
        const int64_t runs = together ? 1 : channels, length = together ? channels * each : each;
        for (int64_t r = 0; r < runs; ++r) {
          acc* __restrict d = buffer.data() + r * each;
          for (int64_t i = 0; i < length; ++i) d[i] = load(next[r * x.sc + i]) - load(here[r * x.sc + i]);
        }
        for (int64_t c = 0; c < channels; ++c)
          pool_rows(y.frame<scalar>(n, 0) + (j * f.C + c0 + c) * y.sc + h0 * f.width, buffer.data() + c * each,
                    sum.data(), rows, x.W, f);
      }
    }
  });
}

// A row of pixels is subtracted from itself, C channels on: [x_1 - x_0, x_2 - x_1, ...] a pixel, with C values between
// two pixels that nobody reads.
template <class scalar>
void difference_channels_last(const Clip& y, const Clip& x, const Frames& f) {
  using acc = acc_t<scalar>;
  const int64_t moving = (f.F - 1) * f.C, columns = std::max<int64_t>(1, kRun / (f.pool * x.C));
  const int64_t blocks = (f.width + columns - 1) / columns;
  const acc count = static_cast<acc>(f.pool * f.pool);
  parallel(x.N * f.height * blocks, columns * f.pool * f.pool * x.C, [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    std::vector<acc> buffer(columns * f.pool * x.C);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / (f.height * blocks), h = item / blocks % f.height;
      const int64_t w0 = item % blocks * columns, pixels = std::min(columns, f.width - w0) * f.pool;
      const bool together = x.sp == x.C;
      const int64_t runs = together ? 1 : pixels, length = together ? pixels * x.C - f.C : moving;
      for (int64_t i = 0; i < f.pool; ++i) {
        const scalar* row = x.frame<scalar>(n, 0) + ((h * f.pool + i) * x.W + w0 * f.pool) * x.sp;
        for (int64_t r = 0; r < runs; ++r) {
          const scalar* __restrict here = row + r * x.sp;
          acc* __restrict d = buffer.data() + r * x.C;
          if (i == 0)
            for (int64_t k = 0; k < length; ++k) d[k] = load(here[k + f.C]) - load(here[k]);
          else
            for (int64_t k = 0; k < length; ++k) d[k] += load(here[k + f.C]) - load(here[k]);
        }
      }
      for (int64_t w = 0; w < pixels / f.pool; ++w) {
        scalar* __restrict out = y.frame<scalar>(n, 0) + (h * f.width + w0 + w) * y.sp;
        acc* __restrict sum = buffer.data() + w * f.pool * x.C;
        if (f.pool == 2) {
          for (int64_t k = 0; k < moving; ++k) out[k] = store<scalar>((sum[k] + sum[x.C + k]) * acc(0.25));
          continue;
        }
        for (int64_t i = 1; i < f.pool; ++i)
          for (int64_t k = 0; k < moving; ++k) sum[k] += sum[i * x.C + k];
        for (int64_t k = 0; k < moving; ++k) out[k] = store<scalar>(sum[k] / count);
      }
    }
  });
}

// dx_j = (dy_{j-1} - dy_j) / pool^2, the same for all pixels of a window; rows and columns left over get zero.
template <class scalar>
void gradient_planar(const Clip& dx, const Clip& dy, const Frames& f) {
  using acc = acc_t<scalar>;
  const Cut cut = cut_of(f, dx.H, dx.W);
  const acc count = static_cast<acc>(f.pool * f.pool);
  parallel(cut.items(dx.N), f.F * cut.channels * cut.rows * f.pool * dx.W,
           [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    std::vector<scalar> buffer(std::max(cut.channels * f.height, cut.rows) * f.width);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / (cut.channel_blocks * cut.row_blocks), block = item % (cut.channel_blocks * cut.row_blocks);
      const int64_t c0 = block / cut.row_blocks * cut.channels, channels = std::min(cut.channels, f.C - c0);
      const int64_t h0 = block % cut.row_blocks * cut.rows, rows = std::min(cut.rows, f.height - h0);
      const int64_t each = rows * f.width;
      const int64_t left_over = h0 + rows == f.height ? dx.H - f.height * f.pool : 0;
      const bool together = dy.sc == dy.P && rows == f.height;
      const int64_t runs = together ? 1 : channels, length = together ? channels * each : each;
      for (int64_t j = 0; j < f.F; ++j) {
        const scalar* later = dy.frame<scalar>(n, 0) + (j * f.C + c0) * dy.sc + h0 * f.width;
        const scalar* earlier = later - f.C * dy.sc;
        for (int64_t r = 0; r < runs; ++r) {
          scalar* __restrict e = buffer.data() + r * each;
          const int64_t at = r * dy.sc;
          if (j == 0)
            for (int64_t i = 0; i < length; ++i) e[i] = store<scalar>(-load(later[at + i]) / count);
          else if (j + 1 == f.F)
            for (int64_t i = 0; i < length; ++i) e[i] = store<scalar>(load(earlier[at + i]) / count);
          else
            for (int64_t i = 0; i < length; ++i)
              e[i] = store<scalar>((load(earlier[at + i]) - load(later[at + i])) / count);
        }
        for (int64_t c = 0; c < channels; ++c) {
          scalar* out = dx.frame<scalar>(n, 0) + (j * f.C + c0 + c) * dx.sc + h0 * f.pool * dx.W;
          for (int64_t h = 0; h < rows; ++h, out += f.pool * dx.W) {
            const scalar* __restrict e = buffer.data() + c * each + h * f.width;
            scalar* __restrict row = out;
            if (f.pool == 2) {
              for (int64_t w = 0; w < f.width; ++w) row[2 * w] = row[2 * w + 1] = e[w];
            } else {
              for (int64_t w = 0; w < f.width; ++w)
                for (int64_t i = 0; i < f.pool; ++i) row[w * f.pool + i] = e[w];
            }
            for (int64_t w = f.width * f.pool; w < dx.W; ++w) row[w] = scalar(0);
            for (int64_t i = 1; i < f.pool; ++i)
              for (int64_t w = 0; w < dx.W; ++w) row[i * dx.W + w] = row[w];
          }
          for (int64_t w = 0; w < left_over * dx.W; ++w) out[w] = scalar(0);
        }
      }
    }
  });
}

template <class scalar>
void gradient_channels_last(const Clip& dx, const Clip& dy, const Frames& f) {
  using acc = acc_t<scalar>;
  const int64_t FC = dx.C;
  const acc count = static_cast<acc>(f.pool * f.pool);
  parallel(dx.N * f.height, f.pool * dx.W * FC, [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    std::vector<scalar> buffer(FC);
    scalar* __restrict e = buffer.data();
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / f.height, h = item % f.height;
      scalar* first = dx.frame<scalar>(n, 0) + h * f.pool * dx.W * dx.sp;
      const int64_t rows = h + 1 == f.height ? dx.H - h * f.pool : f.pool;
      for (int64_t w = 0; w < f.width; ++w) {
        const scalar* __restrict d = dy.frame<scalar>(n, 0) + (h * f.width + w) * dy.sp;
        for (int64_t k = 0; k < f.C; ++k) e[k] = store<scalar>(-load(d[k]) / count);
        for (int64_t k = f.C; k < FC - f.C; ++k) e[k] = store<scalar>((load(d[k - f.C]) - load(d[k])) / count);
        for (int64_t k = FC - f.C; k < FC; ++k) e[k] = store<scalar>(load(d[k - f.C]) / count);
        for (int64_t i = 0; i < f.pool; ++i) {
          scalar* __restrict out = first + (i * dx.W + w * f.pool) * dx.sp;
          for (int64_t p = 0; p < f.pool; ++p)
            for (int64_t k = 0; k < FC; ++k) out[p * FC + k] = e[k];
        }
      }
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t from = i < f.pool ? f.width * f.pool : 0;
        std::memset(first + (i * dx.W + from) * FC, 0, (dx.W - from) * FC * sizeof(scalar));
      }
    }
  });
}

// Reads x as maps whose channels are n_frames frames.
Clip maps(const Tensor& x, const char* name) {
  TEMPOPS_CHECK(x.dim() == 4, name, " must be [M, F*C, H, W], got ", x.dim(), "-D");
  return clips(x, 1, name);
}

void check(int64_t n_frames, int64_t pool) {
  TEMPOPS_CHECK(n_frames >= 2, "n_frames must be at least 2, got ", n_frames);
  TEMPOPS_CHECK(pool >= 1, "pool must be at least 1, got ", pool);
}

Tensor frame_difference(const Tensor& x_, int64_t n_frames, int64_t pool) {
  check(n_frames, pool);
  const Clip x = maps(x_, "x");
  TEMPOPS_CHECK(x.C % n_frames == 0, "n_frames=", n_frames, " does not divide ", x.C, " channels");
  const Frames f{n_frames, x.C / n_frames, pool, x.H / pool, x.W / pool};
  const Clip y = empty_clips(x, 1, (f.F - 1) * f.C, f.height, f.width);
  if (y.empty()) return y.tensor;
  by_dtype(x.dtype, [&](auto* type) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    x.channels_last ? difference_channels_last<scalar>(y, x, f) : difference_planar<scalar>(y, x, f);
  });
  return y.tensor;
}

Tensor frame_difference_backward(const Tensor& grad, int64_t n_frames, int64_t pool, int64_t height, int64_t width) {
  check(n_frames, pool);
  const Clip dy = maps(grad, "grad");
  const Frames f{n_frames, dy.C / (n_frames - 1), pool, dy.H, dy.W};
  TEMPOPS_CHECK(f.C * (f.F - 1) == dy.C && height >= 0 && width >= 0 && height / pool == f.height &&
                    width / pool == f.width,
                "grad [", dy.N, ", ", dy.C, ", ", dy.H, ", ", dy.W, "] does not fit n_frames=", n_frames, ", pool=", pool,
                " and frames of ", height, " x ", width);
  const Clip dx = empty_clips(dy, 1, f.F * f.C, height, width);
  if (dx.empty()) return dx.tensor;
  if (dy.empty()) return torch::stable::zero_(const_cast<Tensor&>(dx.tensor));
  by_dtype(dy.dtype, [&](auto* type) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    dy.channels_last ? gradient_channels_last<scalar>(dx, dy, f) : gradient_planar<scalar>(dx, dy, f);
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
