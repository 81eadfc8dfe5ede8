// temporal_conv on the CPU: y[t] = sum_k w_k * gate[t+k-R] * x[t+k-R], R = K/2.
//
// Weight and gate meet in one coefficient per tap, so a frame of y is a short linear combination of frames of x. The
// gradient to x is the same combination of frames of dy with the taps reversed; those to weight and gate both come from
// the products D[t, k] = sum_p x[t, p] * dy[t+R-k, p]: dweight_k = sum_t gate[t] * D[t, k], dgate[t] = sum_k w_k * D[t, k].
#include "../cpu.h"

namespace tempops {
namespace {

constexpr int kUnrolled = 5;           // taps combined in one loop
constexpr int64_t kRun = 512;          // elements of a row that longer kernels add up at a time
constexpr int64_t kPlaneBlock = 4096;  // pixels of a plane in one go: K + 1 such rows stay in the second-level cache

// weight [G, K] or [N, C, K] and gate [N*T, C], null for none.
template <class scalar>
struct Coefficients {
  const scalar *weight, *gate;
  int64_t K, T, C, group, per_clip;  // channels that share a kernel; per_clip is C where each clip has its own, else 0

  const scalar* kernel(int64_t n, int64_t c) const {
    return weight + (n * per_clip + c / group) * K;
  }
  acc_t<scalar> gate_at(int64_t n, int64_t t, int64_t c) const {
    return gate ? load(gate[(n * T + t) * C + c]) : acc_t<scalar>(1);
  }
};

// The frames inside the clip that tap into frame t, as a range [begin, end) of taps j reading frame t + j - R.
struct Taps {
  int64_t begin, end;
};
inline Taps taps_at(int64_t t, int64_t T, int64_t K) {
  const int64_t R = K / 2;
  return {std::max<int64_t>(0, R - t), std::min<int64_t>(K, T - t + R)};
}

// y[i] = sum_m a[m] * x[m][i] for M frames; a[m] is one number for the whole row (planar), or one for each element.
template <int M, bool per_element, class scalar>
TEMPOPS_INLINE inline void combine(scalar* __restrict y, const scalar* const* x, const acc_t<scalar>* const* a,
                                   int64_t count) {
  using acc = acc_t<scalar>;
  std::array<const scalar*, M> in;
  std::array<const acc*, M> by;
  for (int m = 0; m < M; ++m) in[m] = x[m], by[m] = a[m];
  const auto at = [&](int m, int64_t i) TEMPOPS_INLINE {
    return load(in[m][i]) * by[m][per_element ? i : 0];
  };
  _Pragma("omp simd") for (int64_t i = 0; i < count; ++i) {
    acc sum = at(0, i);
    if constexpr (M > 1) sum += at(1, i);
    if constexpr (M > 2) sum += at(2, i);
    if constexpr (M > 3) sum += at(3, i);
    if constexpr (M > 4) sum += at(4, i);
    y[i] = store<scalar>(sum);
  }
}

// Any number of frames, in runs that are added up in the accumulation type.
template <bool per_element, class scalar>
TEMPOPS_INLINE inline void combine(scalar* __restrict y, const scalar* const* x, const acc_t<scalar>* const* a,
                                   int64_t M, int64_t count) {
  using acc = acc_t<scalar>;
  switch (M) {
    case 1: return combine<1, per_element>(y, x, a, count);
    case 2: return combine<2, per_element>(y, x, a, count);
    case 3: return combine<3, per_element>(y, x, a, count);
    case 4: return combine<4, per_element>(y, x, a, count);
    case 5: return combine<5, per_element>(y, x, a, count);
  }
  acc sum[kRun];
  for (int64_t i0 = 0; i0 < count; i0 += kRun) {
    const int64_t run = std::min(kRun, count - i0);
    std::fill_n(sum, run, acc(0));
    for (int64_t m = 0; m < M; ++m) {
      const acc* by = a[m] + (per_element ? i0 : 0);
      const scalar* in = x[m] + i0;
      _Pragma("omp simd") for (int64_t i = 0; i < run; ++i) sum[i] += load(in[i]) * by[per_element ? i : 0];
    }
    _Pragma("omp simd") for (int64_t i = 0; i < run; ++i) y[i0 + i] = store<scalar>(sum[i]);
  }
}

// The frames that one frame taps and the coefficients it takes them with, for channels [first, first + channels).
// The gate belongs to the frame of x in either direction. Taps are reversed where the convolution is `transposed`.
template <class scalar>
struct TapTable {
  using acc = acc_t<scalar>;
  const Coefficients<scalar>& w;
  const bool transposed;
  int64_t count = 0;  // taps inside the clip
  std::vector<const scalar*> frames;
  std::vector<const acc*> coefficients;
  std::vector<acc> kernels, gated;  // [K, channels]
  int64_t channels = 0, first = 0, n = -1;

  TapTable(const Coefficients<scalar>& w_, bool transposed_, int64_t most_channels)
      : w(w_), transposed(transposed_), frames(w_.K), coefficients(w_.K), kernels(w_.K * most_channels),
        gated(w_.gate ? w_.K * most_channels : 0) {}

  void select(int64_t n_, int64_t first_, int64_t channels_) {
    if (first == first_ && channels == channels_ && (n == n_ || (n >= 0 && !w.per_clip))) {
      n = n_;
      return;
    }
    n = n_, first = first_, channels = channels_;
    for (int64_t c = 0; c < channels; ++c) {
      const scalar* kernel = w.kernel(n, first + c);
      for (int64_t j = 0; j < w.K; ++j) kernels[j * channels + c] = load(kernel[transposed ? w.K - 1 - j : j]);
    }
  }

  // Frame t's taps: `source` gives the address of a frame.
  template <class Source>
  TEMPOPS_INLINE void at(int64_t t, const Source& source) {
    const Taps taps = taps_at(t, w.T, w.K);
    count = taps.end - taps.begin;
    for (int64_t j = taps.begin, m = 0; j < taps.end; ++j, ++m) {
      const int64_t from = t + j - w.K / 2;
      frames[m] = source(from);
      coefficients[m] = &kernels[j * channels];
      if (!w.gate) continue;
      const scalar* gate = w.gate + (n * w.T + (transposed ? t : from)) * w.C + first;
      acc* product = &gated[m * channels];
      for (int64_t c = 0; c < channels; ++c) product[c] = coefficients[m][c] * load(gate[c]);
      coefficients[m] = product;
    }
  }
};

template <class scalar>
void conv_planar(const Clip& y, const Clip& x, const Coefficients<scalar>& w, bool transposed) {
  parallel(x.N * x.C, x.T * x.P, [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    TapTable<scalar> taps(w, transposed, 1);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / x.C, c = i % x.C;
      taps.select(n, c, 1);
      for (int64_t p = 0; p < x.P; p += kPlaneBlock) {
        for (int64_t t = 0; t < x.T; ++t) {
          taps.at(t, [&](int64_t from) { return x.frame<scalar>(n, from) + c * x.sc + p; });
          combine<false>(y.frame<scalar>(n, t) + c * y.sc + p, taps.frames.data(), taps.coefficients.data(), taps.count,
                         std::min(kPlaneBlock, x.P - p));
        }
      }
    }
  });
}

template <class scalar>
void conv_channels_last(const Clip& y, const Clip& x, const Coefficients<scalar>& w, bool transposed) {
  // Pixels walked through the clip at a time: their rows of K + 1 frames stay in the first-level cache.
  const int64_t block = std::max<int64_t>(8, 32768 / (x.C * (w.K + 1) * static_cast<int64_t>(sizeof(scalar))));
  const int64_t blocks = (x.P + block - 1) / block;
  parallel(x.N * blocks, x.T * block * x.C, [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    TapTable<scalar> taps(w, transposed, x.C);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / blocks, p0 = i % blocks * block, p1 = std::min(x.P, p0 + block);
      taps.select(n, 0, x.C);
      for (int64_t t = 0; t < x.T; ++t) {
        taps.at(t, [&](int64_t from) { return x.frame<scalar>(n, from) + p0 * x.sp; });
        for (int64_t p = p0; p < p1; ++p) {
          combine<true>(y.frame<scalar>(n, t) + p * y.sp, taps.frames.data(), taps.coefficients.data(), taps.count, x.C);
          for (int64_t m = 0; m < taps.count; ++m) taps.frames[m] += x.sp;
        }
      }
    }
  });
}

template <class scalar>
void conv(const Clip& y, const Clip& x, const Coefficients<scalar>& w, bool transposed) {
  x.channels_last ? conv_channels_last(y, x, w, transposed) : conv_planar(y, x, w, transposed);
}

// sum_i x[i] * dy[i]. Memory is slower than these conversions, and a sum over a clip wants the digits.
template <class scalar>
TEMPOPS_INLINE inline double dot(const scalar* x, const scalar* dy, int64_t count) {
  double sum = 0;
  _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < count; ++i)
    sum += static_cast<double>(load(x[i])) * load(dy[i]);
  return sum;
}

// The same for each of `channels` adjacent channels, over pixels: sums[c] += sum_p x[p][c] * dy[p][c].
template <class scalar>
TEMPOPS_INLINE inline void dots(double* __restrict sums, const scalar* x, int64_t x_step, const scalar* dy,
                                int64_t dy_step, int64_t pixels, int64_t channels) {
  for (int64_t p = 0; p < pixels; ++p, x += x_step, dy += dy_step)
    _Pragma("omp simd") for (int64_t c = 0; c < channels; ++c) sums[c] += static_cast<double>(load(x[c])) * load(dy[c]);
}

// Where the products D[t, k] go: one channel's sums over frames and clips, and the gate's gradient at once.
template <class scalar>
struct Gradients {
  double* dweight;  // [C, K], or [N, C, K] where each clip has its own kernels
  scalar* dgate;    // [N*T, C] or null
  Coefficients<scalar> w;

  void add(int64_t n, int64_t t, int64_t c, const double* d, int64_t step) const {
    const double gate = w.gate_at(n, t, c);
    double sum = 0;
    for (int64_t k = 0; k < w.K; ++k) {
      const int64_t clip = w.per_clip ? n : 0;
      dweight[(clip * w.C + c) * w.K + k] += gate * d[k * step];
      sum += load(w.kernel(n, c)[k]) * d[k * step];
    }
    if (dgate) dgate[(n * w.T + t) * w.C + c] = store<scalar>(static_cast<acc_t<scalar>>(sum));
  }
};

// One channel is one thread's, over all clips, so that its sums have one order. dx (null if not wanted) is made on the
// way, while the frames are in the cache.
template <class scalar>
void backward_planar(const Clip* dx, const Clip& dy, const Clip& x, const Gradients<scalar>& grads) {
  const Coefficients<scalar> w = grads.w;
  const bool with_dx = dx != nullptr;
  const Clip dx_ = with_dx ? *dx : x;
  parallel(x.C, x.N * x.T * x.P, [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    TapTable<scalar> taps(w, true, 1);
    std::vector<double> d(x.T * w.K);
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t n = 0; n < x.N; ++n) {
        taps.select(n, c, 1);
        std::fill(d.begin(), d.end(), 0.0);
        for (int64_t p = 0; p < x.P; p += kPlaneBlock) {
          const int64_t count = std::min(kPlaneBlock, x.P - p);
          for (int64_t t = 0; t < x.T; ++t) {
            taps.at(t, [&](int64_t from) { return dy.frame<scalar>(n, from) + c * dy.sc + p; });
            if (with_dx)
              combine<false>(dx_.frame<scalar>(n, t) + c * dx_.sc + p, taps.frames.data(), taps.coefficients.data(),
                             taps.count, count);
            double* products = &d[t * w.K + w.K - 1 - taps_at(t, x.T, w.K).begin];
            for (int64_t m = 0; m < taps.count; ++m)
              products[-m] += dot(x.frame<scalar>(n, t) + c * x.sc + p, taps.frames[m], count);
          }
        }
        for (int64_t t = 0; t < x.T; ++t) grads.add(n, t, c, &d[t * w.K], 1);
      }
    }
  });
}

template <class scalar>
void backward_channels_last(const Clip* dx, const Clip& dy, const Clip& x, const Gradients<scalar>& grads) {
  const Coefficients<scalar> w = grads.w;
  const bool with_dx = dx != nullptr;
  const Clip dx_ = with_dx ? *dx : x;
  constexpr int64_t kChannels = 128 / sizeof(scalar);  // two cache lines of a pixel
  constexpr int64_t kPixels = 64;
  const int64_t blocks = (x.C + kChannels - 1) / kChannels;
  parallel(blocks, x.N * x.T * x.P * kChannels, [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    TapTable<scalar> taps(w, true, kChannels);
    std::vector<double> d(x.T * w.K * kChannels);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t c0 = i * kChannels, channels = std::min(kChannels, x.C - c0);
      for (int64_t n = 0; n < x.N; ++n) {
        taps.select(n, c0, channels);
        std::fill(d.begin(), d.end(), 0.0);
        for (int64_t p0 = 0; p0 < x.P; p0 += kPixels) {
          const int64_t pixels = std::min(kPixels, x.P - p0);
          for (int64_t t = 0; t < x.T; ++t) {
            taps.at(t, [&](int64_t from) { return dy.frame<scalar>(n, from) + p0 * dy.sp + c0; });
            double* products = &d[(t * w.K + w.K - 1 - taps_at(t, x.T, w.K).begin) * kChannels];
            for (int64_t m = 0; m < taps.count; ++m)
              dots(products - m * kChannels, x.frame<scalar>(n, t) + p0 * x.sp + c0, x.sp, taps.frames[m], dy.sp,
                   pixels, channels);
            if (!with_dx) continue;
            for (int64_t p = p0; p < p0 + pixels; ++p) {
              combine<true>(dx_.frame<scalar>(n, t) + p * dx_.sp + c0, taps.frames.data(), taps.coefficients.data(),
                            taps.count, channels);
              for (int64_t m = 0; m < taps.count; ++m) taps.frames[m] += dy.sp;
            }
          }
        }
        for (int64_t t = 0; t < x.T; ++t)
          for (int64_t c = 0; c < channels; ++c) grads.add(n, t, c0 + c, &d[t * w.K * kChannels + c], kChannels);
      }
    }
  });
}

struct Arguments {
  Tensor weight, gate;
  bool gated;
};

Arguments check_arguments(const Clip& x, const Tensor& weight, const std::optional<Tensor>& gate) {
  TEMPOPS_CHECK(weight.dim() == 2 || weight.dim() == 3, "weight must be [C, K], [G, K] or [N, C, K], got ",
                weight.dim(), "-D");
  const int64_t K = weight.size(weight.dim() - 1);
  TEMPOPS_CHECK(K % 2 == 1, "weight must have an odd number of taps K, got ", K);
  if (weight.dim() == 3) {
    TEMPOPS_CHECK(weight.size(0) == x.N && weight.size(1) == x.C, "weight must be [N, C, K] = [", x.N, ", ", x.C,
                  ", K], got [", weight.size(0), ", ", weight.size(1), ", K]");
  } else {
    TEMPOPS_CHECK(weight.size(0) >= 1 && x.C % weight.size(0) == 0, "weight has ", weight.size(0),
                  " kernels, which does not divide ", x.C, " channels");
  }
  if (!gate) return {dense_argument(weight, x.tensor, "weight"), weight, false};
  TEMPOPS_CHECK(gate->dim() == 2 && gate->size(0) == x.N * x.T && gate->size(1) == x.C, "gate must be [N*T, C] = [",
                x.N * x.T, ", ", x.C, "]");
  return {dense_argument(weight, x.tensor, "weight"), dense_argument(*gate, x.tensor, "gate"), true};
}

template <class scalar>
Coefficients<scalar> coefficients(const Clip& x, const Arguments& args) {
  const bool per_clip = args.weight.dim() == 3;
  const int64_t K = args.weight.size(args.weight.dim() - 1);
  return {static_cast<const scalar*>(args.weight.data_ptr()),
          args.gated ? static_cast<const scalar*>(args.gate.data_ptr()) : nullptr,
          K,
          x.T,
          x.C,
          per_clip ? 1 : std::max<int64_t>(1, x.C / args.weight.size(0)),
          per_clip ? x.C : 0};
}

Tensor temporal_conv(const Tensor& x_, const Tensor& weight, Segments n_segment, const std::optional<Tensor>& gate) {
  const Clip x = clips(x_, n_segment);
  const Arguments args = check_arguments(x, weight, gate);
  const Clip y = empty_like(x);
  if (y.empty()) return y.tensor;
  by_dtype(x.dtype, [&](auto* type) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    conv(y, x, coefficients<scalar>(x, args), false);
  });
  return y.tensor;
}

template <class scalar>
void sum_groups(const Tensor& dweight, const std::vector<double>& sums, int64_t group) {
  scalar* out = static_cast<scalar*>(dweight.data_ptr());
  const int64_t K = dweight.size(dweight.dim() - 1);
  for (int64_t i = 0; i < dweight.numel(); ++i) {
    double sum = 0;
    for (int64_t c = 0; c < group; ++c) sum += sums[(i / K * group + c) * K + i % K];
    out[i] = store<scalar>(static_cast<acc_t<scalar>>(sum));
  }
}

std::tuple<Tensor, Tensor, Tensor> temporal_conv_backward(const Tensor& grad, const Tensor& x_, const Tensor& weight,
                                                          Segments n_segment, const std::optional<Tensor>& gate,
                                                          bool need_x, bool need_weight, bool need_gate) {
  const Clip x = clips(x_, n_segment);
  const Arguments args = check_arguments(x, weight, gate);
  const Clip dy = clips_like(grad, x, "grad");
  TEMPOPS_CHECK(args.gated || !need_gate, "gate is None, so it has no gradient");
  const Clip dx = need_x ? empty_like(x) : x;
  const Tensor dweight = need_weight ? torch::stable::new_empty(args.weight, args.weight.sizes()) : no_gradient(weight);
  const Tensor dgate = need_gate ? torch::stable::new_empty(args.gate, args.gate.sizes()) : no_gradient(weight);
  by_dtype(x.dtype, [&](auto* type) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    const Coefficients<scalar> w = coefficients<scalar>(x, args);
    if (!need_weight && !need_gate) {
      if (!x.empty()) conv(dx, dy, w, true);
      return;
    }
    std::vector<double> sums((w.per_clip ? x.N : 1) * x.C * w.K);
    const Gradients<scalar> grads{sums.data(), need_gate ? static_cast<scalar*>(dgate.data_ptr()) : nullptr, w};
    const Clip* dx_ = need_x ? &dx : nullptr;
    x.channels_last ? backward_channels_last(dx_, dy, x, grads) : backward_planar(dx_, dy, x, grads);
    if (need_weight) sum_groups<scalar>(dweight, sums, w.group);
  });
  return {need_x ? dx.tensor : no_gradient(x.tensor), dweight, dgate};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tempops, m) {
  m.def("temporal_conv(Tensor x, Tensor weight, int? n_segment=None, Tensor? gate=None) -> Tensor");
  m.def(
      "temporal_conv_backward(Tensor grad, Tensor x, Tensor weight, int? n_segment, Tensor? gate, bool need_x, "
      "bool need_weight, bool need_gate) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(tempops, CPU, m) {
  m.impl("temporal_conv", TORCH_BOX(&temporal_conv));
  m.impl("temporal_conv_backward", TORCH_BOX(&temporal_conv_backward));
}

}  // namespace tempops
