// bidirectional_difference on the CPU: forward[t] = x[t] - dw(x[t+1]), backward[t] = x[t] - dw(x[t-1]).
//
// The 3x3 product of a frame serves both directions, so each frame is filtered once. A strip of rows of a few channels
// is copied into a buffer with a border of zeros, in which a pixel's eight neighbours are at fixed distances: the filter
// is one long loop however narrow the plane is, and nothing outside the plane is multiplied.
//
// Backward: what reaches the product of frame t is s[t] = forward's gradient at t-1 plus backward's at t+1. Then
// dx[t] = (forward's + backward's gradient at t) - dw'(s[t]) with the kernel turned by 180 degrees, and
// dweight[k] = -sum x[t] * s[t] shifted by tap k.
#include "../cpu.h"

namespace tempops {
namespace {

constexpr int kTaps = 9;

// How a frame is cut into strips of rows of a block of channels: one channel (planar), or as many as a strip holds.
struct Strips {
  int64_t channels, rows, channel_blocks, row_blocks;

  explicit Strips(const Clip& x) {
    constexpr int64_t kElements = 8192;
    channels = x.channels_last ? std::min<int64_t>(x.C, 64) : 1;
    rows = std::clamp<int64_t>(kElements / ((x.W + 1) * channels), std::min<int64_t>(4, x.H), x.H);
    channel_blocks = (x.C + channels - 1) / channels;
    row_blocks = (x.H + rows - 1) / rows;
  }
  int64_t work(const Clip& x) const {
    return x.T * channels * rows * x.W;
  }
};

// One strip of clip n: channels [c, c + channels), rows [h, h + rows).
struct Strip {
  int64_t n, c, channels, h, rows, W;

  Strip(const Clip& x, const Strips& strips, int64_t n_, int64_t channel_block, int64_t row_block)
      : n(n_), c(channel_block * strips.channels), channels(std::min(strips.channels, x.C - c)),
        h(row_block * strips.rows), rows(std::min(strips.rows, x.H - h)), W(x.W) {}

  // Elements from one row of the buffer to the next: W pixels and a zero between them.
  int64_t row() const {
    return (W + 1) * channels;
  }
  int64_t size() const {
    return rows * row();
  }
  template <class scalar>
  scalar* at(const Clip& x, int64_t t, int64_t row) const {
    return x.frame<scalar>(n, t) + c * x.sc + (h + row) * W * x.sp;
  }
  // Calls f(frame offset from the row's start, offset from the buffer row's start, count) for each run of a row.
  template <class F>
  TEMPOPS_INLINE void each_run(const Clip& x, const F& f) const {
    if (!x.channels_last) return f(0, 0, W);
    if (x.sp == channels) return f(0, 0, W * channels);
    for (int64_t w = 0; w < W; ++w) f(w * x.sp, w * channels, channels);
  }
};

// A strip's rows with a border: row r, pixel w is at interior + r * row + w * channels. A row's right zero is the next
// row's left one.
template <class acc>
struct Padded {
  Scratch<acc> memory;
  acc* interior = nullptr;

  Padded(const Clip& x, const Strips& strips) : memory((strips.rows + 2) * (x.W + 1) * strips.channels + 32 + strips.channels) {}

  TEMPOPS_INLINE void clear(const Strip& s) {
    std::fill(memory.begin(), memory.end(), acc(0));
    interior = memory.data() + (s.row() + s.channels + 15) / 16 * 16;
  }
};

template <class acc>
using Kernel = std::array<const acc*, kTaps>;

// out[i] = sum_k kernel[k][channel] * in[i + offset of tap k] over a strip; the elements between rows come out as junk.
template <bool one_channel, class acc>
TEMPOPS_INLINE inline void filter(acc* __restrict out, const acc* __restrict in, const Kernel<acc>& kernel,
                                  const Strip& s) {
  const int64_t row = s.row(), step = s.channels;
  const auto [k0, k1, k2, k3, k4, k5, k6, k7, k8] = kernel;
  const auto at = [&](const acc* p, const acc* k, int64_t i, int64_t c) TEMPOPS_INLINE {
    return k[one_channel ? 0 : c] * p[i];
  };
  for (int64_t pixel = 0; pixel < (one_channel ? 1 : s.size()); pixel += step) {
    const acc *above = in + pixel - row, *here = in + pixel, *below = in + pixel + row;
    acc* to = out + pixel;
    _Pragma("omp simd") for (int64_t i = 0; i < (one_channel ? s.size() : step); ++i) {
      to[i] = at(above - step, k0, i, i) + at(above, k1, i, i) + at(above + step, k2, i, i) +
              at(here - step, k3, i, i) + at(here, k4, i, i) + at(here + step, k5, i, i) + at(below - step, k6, i, i) +
              at(below, k7, i, i) + at(below + step, k8, i, i);
    }
  }
}

// The kernels of a strip's channels in the accumulation type, tap by tap.
template <class scalar>
struct Kernels {
  using acc = acc_t<scalar>;
  const scalar* weight;  // [C, 1, 3, 3]
  bool turned;
  Scratch<acc> values;
  Kernel<acc> taps;

  Kernels(const scalar* weight_, bool turned_, int64_t channels)
      : weight(weight_), turned(turned_), values(kTaps * channels) {}

  void select(const Strip& s) {
    for (int64_t k = 0; k < kTaps; ++k) {
      taps[k] = &values[k * s.channels];
      for (int64_t c = 0; c < s.channels; ++c)
        values[k * s.channels + c] = load(weight[(s.c + c) * kTaps + (turned ? kTaps - 1 - k : k)]);
    }
  }
  TEMPOPS_INLINE void apply(acc* out, const acc* in, const Strip& s) const {
    s.channels == 1 ? filter<true>(out, in, taps, s) : filter<false>(out, in, taps, s);
  }
};

// to[..] = from[..] (- or +) product, row by row; a null product is zero, a null `from` gives zero.
template <class scalar>
TEMPOPS_INLINE inline void difference(const Clip& y, const Clip& x, const Strip& s, int64_t to, int64_t from,
                                      const acc_t<scalar>* product, bool negated) {
  using acc = acc_t<scalar>;
  for (int64_t r = 0; r < s.rows; ++r) {
    scalar* dst_row = s.at<scalar>(y, to, r);
    const scalar* src_row = s.at<scalar>(x, from, r);
    const acc* d_row = product + r * s.row();
    const auto run = [&](int64_t out, int64_t in, int64_t at, int64_t count) TEMPOPS_INLINE {
      scalar* __restrict dst = dst_row + out;
      const scalar* src = src_row + in;
      const acc* d = d_row + at;
      if (negated)
        _Pragma("omp simd") for (int64_t i = 0; i < count; ++i) dst[i] = store<scalar>(d[i] - load(src[i]));
      else
        _Pragma("omp simd") for (int64_t i = 0; i < count; ++i) dst[i] = store<scalar>(load(src[i]) - d[i]);
    };
    if (!x.channels_last) {
      run(0, 0, 0, s.W);
    } else if (x.sp == s.channels && y.sp == s.channels) {
      run(0, 0, 0, s.W * s.channels);
    } else {
      for (int64_t w = 0; w < s.W; ++w) run(w * y.sp, w * x.sp, w * s.channels, s.channels);
    }
  }
}

template <class scalar>
void zero_frame(const Clip& y, int64_t n, int64_t t) {
  scalar* frame = y.frame<scalar>(n, t);
  const int64_t rows = y.channels_last ? y.P : y.C, length = y.channels_last ? y.C : y.P;
  const int64_t pitch = y.channels_last ? y.sp : y.sc;
  for (int64_t r = 0; r < rows; ++r) std::memset(frame + r * pitch, 0, length * sizeof(scalar));
}

template <class scalar>
void differences(const Clip& forward, const Clip& backward, const Clip& x, const scalar* weight, bool negated) {
  using acc = acc_t<scalar>;
  const Strips strips(x);
  const int64_t per_clip = strips.channel_blocks * strips.row_blocks;
  parallel(x.N * per_clip, strips.work(x), [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    Padded<acc> padded(x, strips);
    Scratch<acc> product(strips.rows * (x.W + 1) * strips.channels);
    Kernels<scalar> kernels(weight, false, strips.channels);
    for (int64_t i = begin; i < end; ++i) {
      const Strip s(x, strips, i / per_clip, i % per_clip / strips.row_blocks, i % strips.row_blocks);
      kernels.select(s);
      padded.clear(s);
      const int64_t first = s.h > 0 ? -1 : 0, last = s.h + s.rows < x.H ? s.rows + 1 : s.rows;
      for (int64_t t = 0; t < x.T; ++t) {
        for (int64_t r = first; r < last; ++r) {
          const scalar* src_row = s.at<scalar>(x, t, r);
          acc* dst_row = padded.interior + r * s.row();
          s.each_run(x, [&](int64_t from, int64_t to, int64_t count) TEMPOPS_INLINE {
            _Pragma("omp simd") for (int64_t e = 0; e < count; ++e) dst_row[to + e] = load(src_row[from + e]);
          });
        }
        kernels.apply(product.data(), padded.interior, s);
        if (t > 0) difference<scalar>(forward, x, s, t - 1, t - 1, product.data(), negated);
        if (t + 1 < x.T) difference<scalar>(backward, x, s, t + 1, t + 1, product.data(), negated);
      }
    }
  });
  for (int64_t n = 0; n < x.N; ++n) {
    zero_frame<scalar>(forward, n, x.T - 1);
    zero_frame<scalar>(backward, n, 0);
  }
}

// sums[k][c] += x * s shifted by tap k, over a strip: tap k of the kernel met x where the product was k further back.
template <bool one_channel, class acc>
TEMPOPS_INLINE inline void correlate(acc* __restrict sums, const acc* __restrict x, const acc* __restrict from,
                                     const Strip& s) {
  for (int64_t k = 0; k < kTaps; ++k) {
    const acc* p = from - (k / 3 - 1) * s.row() - (k % 3 - 1) * s.channels;
    if constexpr (one_channel) {
      acc sum = 0;
      _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < s.size(); ++i) sum += x[i] * p[i];
      sums[k] += sum;
    } else {
      acc* to = sums + k * s.channels;
      for (int64_t i = 0; i < s.size(); i += s.channels)
        _Pragma("omp simd") for (int64_t c = 0; c < s.channels; ++c) to[c] += x[i + c] * p[i + c];
    }
  }
}

// dweight is [C, 9] in double; a block of channels is one thread's, so its sums have one order.
template <class scalar>
void backward_pass(const Clip* dx, double* dweight, const Clip& df, const Clip& db, const Clip& x, const scalar* weight,
                   bool negated) {
  using acc = acc_t<scalar>;
  const Strips strips(x);
  const bool with_dx = dx != nullptr;
  const Clip dx_ = with_dx ? *dx : x;
  const acc sign = negated ? -1 : 1;
  parallel(strips.channel_blocks, x.N * x.T * x.P * strips.channels, [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    Padded<acc> padded(x, strips);
    Scratch<acc> product(strips.rows * (x.W + 1) * strips.channels), here(product.size());
    Scratch<acc> sums(kTaps * strips.channels);
    Kernels<scalar> kernels(weight, true, strips.channels);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t item = 0; item < x.N * strips.row_blocks; ++item) {
        const Strip s(x, strips, item / strips.row_blocks, i, item % strips.row_blocks);
        kernels.select(s);
        padded.clear(s);
        std::fill(here.begin(), here.end(), acc(0));
        const int64_t first = s.h > 0 ? -1 : 0, last = s.h + s.rows < x.H ? s.rows + 1 : s.rows;
        for (int64_t t = 0; t < x.T; ++t) {
          const bool to_forward = t > 0, to_backward = t + 1 < x.T;  // whose differences frame t's product entered
          for (int64_t r = first; r < last; ++r) {
            const scalar* f_row = to_forward ? s.at<scalar>(df, t - 1, r) : nullptr;
            const scalar* b_row = to_backward ? s.at<scalar>(db, t + 1, r) : nullptr;
            acc* dst_row = padded.interior + r * s.row();
            const auto add_row = [&](const Clip& from, const scalar* row, bool add) TEMPOPS_INLINE {
              s.each_run(from, [&](int64_t src, int64_t to, int64_t count) TEMPOPS_INLINE {
                if (add)
                  _Pragma("omp simd") for (int64_t e = 0; e < count; ++e) dst_row[to + e] += load(row[src + e]);
                else
                  _Pragma("omp simd") for (int64_t e = 0; e < count; ++e) dst_row[to + e] = load(row[src + e]);
              });
            };
            if (to_forward) add_row(df, f_row, false);
            if (to_backward) add_row(db, b_row, to_forward);
            if (!to_forward && !to_backward) std::fill_n(dst_row, s.row(), acc(0));
          }
          if (dweight) {
            for (int64_t r = 0; r < s.rows; ++r) {
              const scalar* src_row = s.at<scalar>(x, t, r);
              s.each_run(x, [&](int64_t from, int64_t to, int64_t count) TEMPOPS_INLINE {
                acc* dst = &here[r * s.row() + to];
                _Pragma("omp simd") for (int64_t e = 0; e < count; ++e) dst[e] = load(src_row[from + e]);
              });
            }
            std::fill(sums.begin(), sums.end(), acc(0));
            s.channels == 1 ? correlate<true>(sums.data(), here.data(), padded.interior, s)
                            : correlate<false>(sums.data(), here.data(), padded.interior, s);
            for (int64_t k = 0; k < kTaps; ++k)
              for (int64_t c = 0; c < s.channels; ++c)
                dweight[(s.c + c) * kTaps + k] -= sign * sums[k * s.channels + c];
          }
          if (!with_dx) continue;
          kernels.apply(product.data(), padded.interior, s);
          for (int64_t r = 0; r < s.rows; ++r) {
            scalar* dst_row = s.at<scalar>(dx_, t, r);
            const scalar* f_row = to_backward ? s.at<scalar>(df, t, r) : nullptr;  // forward[t] exists for t + 1 < T
            const scalar* b_row = to_forward ? s.at<scalar>(db, t, r) : nullptr;
            const acc* d = &product[r * s.row()];
            const int64_t runs = x.channels_last ? x.W : 1, count = x.channels_last ? s.channels : x.W;
            for (int64_t q = 0; q < runs; ++q) {
              scalar* __restrict dst = dst_row + q * dx_.sp;
              const scalar *f = f_row + q * df.sp, *b = b_row + q * db.sp;
              const acc* p = d + q * s.channels;
              if (to_forward && to_backward)
                _Pragma("omp simd") for (int64_t e = 0; e < count; ++e) dst[e] =
                    store<scalar>(sign * (load(f[e]) + load(b[e]) - p[e]));
              else if (to_backward)
                _Pragma("omp simd") for (int64_t e = 0; e < count; ++e) dst[e] = store<scalar>(sign * (load(f[e]) - p[e]));
              else if (to_forward)
                _Pragma("omp simd") for (int64_t e = 0; e < count; ++e) dst[e] = store<scalar>(sign * (load(b[e]) - p[e]));
              else
                std::fill_n(dst, count, store<scalar>(acc(0)));
            }
          }
        }
      }
    }
  });
}

Tensor check_weight(const Clip& x, const Tensor& weight) {
  TEMPOPS_CHECK(weight.dim() == 4 && weight.size(0) == x.C && weight.size(1) == 1 && weight.size(2) == 3 &&
                    weight.size(3) == 3,
                "weight must be [C, 1, 3, 3] with C = ", x.C);
  return dense_argument(weight, x.tensor, "weight");
}

std::tuple<Tensor, Tensor> bidirectional_difference(const Tensor& x_, const Tensor& weight_, Segments n_segment,
                                                    bool neighbor_first) {
  const Clip x = clips(x_, n_segment);
  const Tensor weight = check_weight(x, weight_);
  const Clip forward = empty_like(x), backward = empty_like(x);
  if (!x.empty()) {
    by_dtype(x.dtype, [&](auto* type) {
      using scalar = std::remove_pointer_t<decltype(type)>;
      differences<scalar>(forward, backward, x, static_cast<const scalar*>(weight.data_ptr()), neighbor_first);
    });
  }
  return {forward.tensor, backward.tensor};
}

std::tuple<Tensor, Tensor> bidirectional_difference_backward(const Tensor& grad_forward, const Tensor& grad_backward,
                                                             const Tensor& x_, const Tensor& weight_,
                                                             Segments n_segment, bool neighbor_first, bool need_x,
                                                             bool need_weight) {
  const Clip x = clips(x_, n_segment);
  const Tensor weight = check_weight(x, weight_);
  const Clip df = clips_like(grad_forward, x, "grad_forward"), db = clips_like(grad_backward, x, "grad_backward");
  const Clip dx = need_x ? empty_like(x) : x;
  const Tensor dweight = need_weight ? torch::stable::new_empty(weight, weight.sizes()) : no_gradient(weight);
  by_dtype(x.dtype, [&](auto* type) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    std::vector<double> sums(need_weight ? x.C * kTaps : 0);
    if (!x.empty())
      backward_pass<scalar>(need_x ? &dx : nullptr, need_weight ? sums.data() : nullptr, df, db, x,
                            static_cast<const scalar*>(weight.data_ptr()), neighbor_first);
    if (need_weight) {
      scalar* out = static_cast<scalar*>(dweight.data_ptr());
      for (size_t i = 0; i < sums.size(); ++i) out[i] = store<scalar>(static_cast<acc_t<scalar>>(sums[i]));
    }
  });
  return {need_x ? dx.tensor : no_gradient(x.tensor), dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tempops, m) {
  m.def(
      "bidirectional_difference(Tensor x, Tensor weight, int? n_segment=None, bool neighbor_first=False) -> "
      "(Tensor, Tensor)");
  m.def(
      "bidirectional_difference_backward(Tensor grad_forward, Tensor grad_backward, Tensor x, Tensor weight, "
      "int? n_segment, bool neighbor_first, bool need_x, bool need_weight) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(tempops, CPU, m) {
  m.impl("bidirectional_difference", TORCH_BOX(&bidirectional_difference));
  m.impl("bidirectional_difference_backward", TORCH_BOX(&bidirectional_difference_backward));
}

}  // namespace tempops
