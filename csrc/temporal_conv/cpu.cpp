// temporal_conv on the CPU: y[t] = sum_k w_k * gate[t+k-R] * x[t+k-R], R = K/2.
//
// A tile of a frame is walked through the clip with a window of K frames, the coefficients of its channels laid out
// beside it, so that every loop is a plain run over elements in either layout. The gradient to x is the same
// combination of frames of dy with the taps reversed and the gate at the end; the gradients to weight and gate come
// from the products x[t] * dy[t+R-k] of the same window.
#include "../tile.h"

namespace tempops {
namespace {

// weight [G, K] or [N, C, K] and gate [N*T, C], null for none.
template <class scalar>
struct Coefficients {
  const scalar *weight, *gate;
  int64_t K, T, C, group, per_clip;  // channels that share a kernel; per_clip is C where each clip has its own, else 0

  const scalar* kernel(int64_t n, int64_t c) const {
    return weight + (n * per_clip + c / group) * K;
  }
  const scalar* gates(int64_t n, int64_t t) const {
    return gate + (n * T + t) * C;
  }
};

// out[i] (+)= sum_m a[m][i] * x[m][i] for M frames; where the tile is of one channel, a[m][0] stands for all.
template <int M, bool one_channel, class acc>
TEMPOPS_INLINE inline void combine(acc* out, const acc* const* x, const acc* const* a, int64_t count, bool add) {
  const acc *x0 = x[0], *x1 = x[M > 1], *x2 = x[M > 2 ? 2 : 0], *a0 = a[0], *a1 = a[M > 1], *a2 = a[M > 2 ? 2 : 0];
  const auto at = [=](int64_t i) TEMPOPS_INLINE {
    acc sum = a0[one_channel ? 0 : i] * x0[i];
    if constexpr (M > 1) sum += a1[one_channel ? 0 : i] * x1[i];
    if constexpr (M > 2) sum += a2[one_channel ? 0 : i] * x2[i];
    return sum;
  };
  if (add)
    _Pragma("omp simd") for (int64_t i = 0; i < count; ++i) out[i] += at(i);
  else
    _Pragma("omp simd") for (int64_t i = 0; i < count; ++i) out[i] = at(i);
}

// The same, and sums[m][i] += here[i] * x[m][i].
template <int M, bool one_channel, class acc>
TEMPOPS_INLINE inline void combine_and_sum(acc* out, acc* const* sums, const acc* here, const acc* const* x,
                                           const acc* const* a, int64_t count, bool add) {
  const acc *x0 = x[0], *x1 = x[M > 1], *x2 = x[M > 2 ? 2 : 0], *a0 = a[0], *a1 = a[M > 1], *a2 = a[M > 2 ? 2 : 0];
  acc *s0 = sums[0], *s1 = sums[M > 1], *s2 = sums[M > 2 ? 2 : 0];
  _Pragma("omp simd") for (int64_t i = 0; i < count; ++i) {
    const acc h = here[i], v0 = x0[i];
    acc sum = a0[one_channel ? 0 : i] * v0;
    s0[i] += h * v0;
    if constexpr (M > 1) {
      const acc v1 = x1[i];
      sum += a1[one_channel ? 0 : i] * v1;
      s1[i] += h * v1;
    }
    if constexpr (M > 2) {
      const acc v2 = x2[i];
      sum += a2[one_channel ? 0 : i] * v2;
      s2[i] += h * v2;
    }
    out[i] = add ? out[i] + sum : sum;
  }
}

// The frames around frame t that lie in the clip, as runs of a tile's elements in the accumulation type, beside the
// coefficients that frame t takes them with. Taps are reversed for the transposed convolution.
template <class scalar>
struct Window {
  using acc = acc_t<scalar>;
  static constexpr int kTaps = 3;  // combined in one loop

  const Coefficients<scalar>& w;
  const bool transposed;
  const int64_t size;
  Tile tile{};
  int64_t n = -1, first = 0, count = 0;  // taps [first, first + count) read frames inside the clip
  Scratch<acc> kernels, frames, of_channel;
  std::vector<const acc*> x, a;  // by tap

  Window(const Coefficients<scalar>& w_, bool transposed_, int64_t size_)
      : w(w_), transposed(transposed_), size(size_), kernels(w.K * size), frames(w.K * size), of_channel(size), x(w.K),
        a(w.K) {}

  // Lays the coefficients of the tile's channels out, unless they already are.
  TEMPOPS_INLINE void select(const Tile& next, int64_t clip) {
    const bool same = tile.size() == next.size() && tile.c == next.c && tile.length == next.length &&
                      (next.channels_last || tile.rows == next.rows) && n >= 0 && (n == clip || !w.per_clip);
    tile = next;
    n = clip;
    if (same) return;
    for (int64_t j = 0; j < w.K; ++j) {
      for (int64_t c = 0; c < tile.channels(); ++c)
        of_channel[c] = load(w.kernel(n, tile.c + c)[transposed ? w.K - 1 - j : j]);
      tile.expand(&kernels[j * size], of_channel.data());
    }
  }

  // The gate of frame t, one value a channel of the tile; null without a gate.
  TEMPOPS_INLINE const acc* gate(int64_t t) {
    if (!w.gate) return nullptr;
    const scalar* from = w.gates(n, t) + tile.c;
    for (int64_t c = 0; c < tile.channels(); ++c) of_channel[c] = load(from[c]);
    return of_channel.data();
  }

  // Moves to frame t. Frames are visited in order from 0, so each is read once.
  TEMPOPS_INLINE void move(const Clip& from, int64_t t) {
    const int64_t K = w.K, R = K / 2;
    first = std::max<int64_t>(0, R - t);
    count = std::min<int64_t>(K, from.T - t + R) - first;
    const bool gated = w.gate && !transposed;
    const bool as_is = std::is_same_v<scalar, acc> && !gated && tile.flat(from);
    if (!as_is)
      for (int64_t s = t == 0 ? 0 : t + R; s <= std::min(t + R, from.T - 1); ++s)
        tile.read(&frames[s % K * size], tile.at<scalar>(from, n, s), tile.pitch(from), gated ? gate(s) : nullptr);
    for (int64_t m = 0; m < count; ++m) {
      const int64_t s = t + first + m - R;
      x[m] = as_is ? reinterpret_cast<const acc*>(tile.at<scalar>(from, n, s)) : &frames[s % K * size];
      a[m] = &kernels[(first + m) * size];
    }
  }

  // Calls f with the number of taps as a constant, and whether the tile is of one channel.
  template <class F>
  TEMPOPS_INLINE void each_taps(const F& f) const {
    const bool one_channel = tile.channels() == 1;
    for (int64_t m = 0; m < count; m += kTaps) {
      const auto taps = [&]<int M>(std::integral_constant<int, M>) TEMPOPS_INLINE {
        if (one_channel)
          f.template operator()<M, true>(m);
        else
          f.template operator()<M, false>(m);
      };
      switch (count - m) {
        case 1: taps(std::integral_constant<int, 1>()); break;
        case 2: taps(std::integral_constant<int, 2>()); break;
        default: taps(std::integral_constant<int, 3>());
      }
    }
  }

  TEMPOPS_INLINE void combine_into(acc* out) const {
    each_taps([&]<int M, bool one_channel>(int64_t m)
                  TEMPOPS_INLINE { combine<M, one_channel>(out, &x[m], &a[m], tile.size(), m > 0); });
  }

  // sums holds one run a tap; tap j of the transposed convolution is tap K-1-j of the kernel.
  TEMPOPS_INLINE void combine_into(acc* out, Scratch<acc>& sums, const acc* here) const {
    each_taps([&]<int M, bool one_channel>(int64_t m) TEMPOPS_INLINE {
      acc* into[M];
      for (int64_t i = 0; i < M; ++i) into[i] = &sums[(w.K - 1 - first - m - i) * size];
      combine_and_sum<M, one_channel>(out, into, here, &x[m], &a[m], tile.size(), m > 0);
    });
  }
};

// Where a run of results can be written straight into a frame.
template <class scalar>
TEMPOPS_INLINE inline acc_t<scalar>* direct(const Tile& tile, const Clip& y, int64_t n, int64_t t) {
  if constexpr (std::is_same_v<scalar, acc_t<scalar>>)
    if (tile.flat(y)) return tile.at<scalar>(y, n, t);
  return nullptr;
}

template <class scalar>
void conv(const Clip& y, const Clip& x, const Coefficients<scalar>& w, bool transposed) {
  const Tiling tiling(x, x.C);
  const int64_t tiles = tiling.channel_blocks * tiling.pixel_blocks;
  parallel(x.N * tiles, x.T * tiling.size(), [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    Window<scalar> window(w, transposed, tiling.size());
    Scratch<acc_t<scalar>> buffer(tiling.size());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / tiles;
      const Tile tile = tiling.tile(i % tiles / tiling.pixel_blocks, i % tiles % tiling.pixel_blocks);
      window.select(tile, n);
      for (int64_t t = 0; t < x.T; ++t) {
        window.move(x, t);
        const auto* gate = transposed ? window.gate(t) : nullptr;
        auto* out = gate ? nullptr : direct<scalar>(tile, y, n, t);
        window.combine_into(out ? out : buffer.data());
        if (!out) tile.write(tile.at<scalar>(y, n, t), tile.pitch(y), buffer.data(), gate);
      }
    }
  });
}

// Sums of the gradients to weight and gate: [parts, N or 1, C, K] and [parts, N*T, C]. Each part has its own pixels, so
// that the order of the sums is fixed however many threads there are.
struct Sums {
  int64_t parts;
  std::vector<double> weight, gate;
};

template <class scalar>
Sums backward(const Clip* dx, const Clip& dy, const Clip& x, const Coefficients<scalar>& w, bool need_gate) {
  using acc = acc_t<scalar>;
  const Tiling tiling(x, x.channels_last ? 256 / sizeof(scalar) : x.C);
  const int64_t parts = x.channels_last ? std::clamp<int64_t>(16 / tiling.channel_blocks, 1, tiling.pixel_blocks) : 1;
  const int64_t weights = (w.per_clip ? x.N : 1) * x.C * w.K, gates = need_gate ? x.N * x.T * x.C : 0;
  Sums sums{parts, std::vector<double>(parts * weights), std::vector<double>(parts * gates)};
  double *dweight = sums.weight.data(), *dgate = sums.gate.data();
  const bool with_dx = dx != nullptr;
  const Clip dx_ = with_dx ? *dx : x;
  parallel(tiling.channel_blocks * parts, x.N * x.T * x.P * tiling.channels,
           [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    const int64_t size = tiling.size();
    Window<scalar> window(w, true, size);
    Scratch<acc> products(w.K * size), s(size), here(size), gated(size);
    std::vector<double> of_channel(tiling.channels);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / parts, part = i % parts;
      for (int64_t n = 0; n < x.N; ++n) {
        for (int64_t q = tiling.pixel_blocks * part / parts; q < tiling.pixel_blocks * (part + 1) / parts; ++q) {
          const Tile tile = tiling.tile(block, q);
          window.select(tile, n);
          std::fill(products.begin(), products.end(), acc(0));
          for (int64_t t = 0; t < x.T; ++t) {
            window.move(dy, t);
            const acc* gate = window.gate(t);
            const acc* xt = direct<scalar>(tile, x, n, t);
            if (!xt) {
              tile.read(here.data(), tile.at<scalar>(x, n, t), tile.pitch(x), static_cast<const acc*>(nullptr));
              xt = here.data();
            }
            if (gate) tile.read(gated.data(), tile.at<scalar>(x, n, t), tile.pitch(x), gate);
            acc* out = gate || !with_dx ? nullptr : direct<scalar>(tile, dx_, n, t);
            window.combine_into(out ? out : s.data(), products, gate ? gated.data() : xt);
            if (with_dx && !out) tile.write(tile.at<scalar>(dx_, n, t), tile.pitch(dx_), s.data(), gate);
            if (need_gate) {
              _Pragma("omp simd") for (int64_t e = 0; e < tile.size(); ++e) s[e] *= xt[e];
              tile.add_channels(dgate + part * gates + (n * x.T + t) * x.C + tile.c, s.data());
            }
          }
          for (int64_t k = 0; k < w.K; ++k) {
            std::fill_n(of_channel.begin(), tile.channels(), 0.0);
            tile.add_channels(of_channel.data(), &products[k * size]);
            double* into = dweight + part * weights + ((w.per_clip ? n * x.C : 0) + tile.c) * w.K + k;
            for (int64_t c = 0; c < tile.channels(); ++c) into[c * w.K] += of_channel[c];
          }
        }
      }
    }
  });
  return sums;
}

// out[i, k] = the sum over parts and over the `group` channels that share kernel i. [.., K] is the last dimension.
template <class scalar>
void reduce(const Tensor& out, const std::vector<double>& sums, int64_t parts, int64_t group, int64_t K) {
  scalar* to = static_cast<scalar*>(out.data_ptr());
  const int64_t each = static_cast<int64_t>(sums.size()) / parts;
  for (int64_t i = 0; i < each / (group * K); ++i) {
    for (int64_t k = 0; k < K; ++k) {
      double sum = 0;
      for (int64_t part = 0; part < parts; ++part)
        for (int64_t c = 0; c < group; ++c) sum += sums[part * each + (i * group + c) * K + k];
      to[i * K + k] = store<scalar>(static_cast<acc_t<scalar>>(sum));
    }
  }
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
    const Sums sums = backward(need_x ? &dx : nullptr, dy, x, w, need_gate);
    if (need_weight) reduce<scalar>(dweight, sums.weight, sums.parts, w.group, w.K);
    if (need_gate) reduce<scalar>(dgate, sums.gate, sums.parts, 1, 1);
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
