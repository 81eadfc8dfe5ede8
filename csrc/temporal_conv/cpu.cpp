// temporal_conv on the CPU: y[t] = sum_k w_k * gate[t+k-R] * x[t+k-R], R = K/2.
//
// A tile of a frame is walked through the clip, so that the frames of a window are read from the cache. The gate only
// scales a channel's taps: g_s * w_k is what frame s is taken with. The gradient to x is the same combination of frames
// of dy with the taps reversed, all scaled by the gate of the frame written. The gradients to weight and gate both come
// from the sums over pixels q_k = sum_p x[t] * dy[t+R-k]: dweight_k = sum_t gate[t] * q_k, dgate[t] = sum_k w_k * q_k.
#include <numeric>
#include <utility>

#include "../map.h"
#include "../stream.h"
#include "../sums.h"
#include "arguments.h"

namespace tempops {
namespace {

constexpr int64_t kMostTaps = 5;    // combined in one pass
constexpr int64_t kFloatSums = 64;  // products added up in the accumulation type before the sums go on in float64
constexpr int64_t kChunk = 256;     // of a row's products, added up apart: with 4 lanes that is as many

// A block of a frame: `rows` rows of `length` adjacent elements. Of one of two kinds:
//   by row:     a row is a channel's pixels, so its elements share their coefficients;
//   by element: a row is a pixel's channels (channels_last), or many channels of few pixels each (planar), so each
//               element has its own coefficients, laid out beside it, with `spread` adjacent ones of the same channel.
struct Tile {
  bool by_element;
  int64_t c, p;  // first channel, first pixel
  int64_t rows, length, spread;

  int64_t channels() const {
    return by_element ? length / spread : rows;
  }
  int64_t coefficients() const {
    return by_element ? length : rows;
  }
  int64_t pitch(const Clip& x) const {
    return x.channels_last ? x.sp : x.sc;
  }
  template <class scalar>
  scalar* at(const Clip& x, int64_t n, int64_t t) const {
    return x.frame<scalar>(n, t) + c * x.sc + p * x.sp;
  }
};

// Frames cut into tiles, channel blocks outermost.
struct Tiling {
  static constexpr int64_t kFew = 128;  // pixels; fewer in a row are too short for its own coefficients to pay

  // Elements of a tile by row; of a tile by element that is planar, or channels_last of at most so many channels.
  struct Limits {
    int64_t by_row, planar, channels_last, channels, rows;
  };

  bool by_element;
  int64_t C, P, spread;
  int64_t channels, pixels;  // of a full tile
  int64_t channel_blocks, pixel_blocks;

  // `dense`: the planar frames of every clip are each one run of memory.
  Tiling(const Clip& x, bool dense, const Limits& limits) : C(x.C), P(x.P), spread(1) {
    by_element = x.channels_last || (dense && P < kFew);
    if (x.channels_last) {
      channels = std::min(C, limits.channels);
      pixels = std::min(P, std::clamp<int64_t>(limits.channels_last / channels, 1, limits.rows));
    } else if (by_element) {
      spread = pixels = P;
      // A block of 16 channels ends where a cache line does.
      channels = std::min(C, std::max<int64_t>(1, limits.planar / pixels / kLanes) * kLanes);
    } else {
      const int64_t parts = (P + limits.by_row - 1) / limits.by_row;
      pixels = std::min(P, ((P + parts - 1) / parts + kLanes - 1) / kLanes * kLanes);
      channels = std::min(C, std::max<int64_t>(1, limits.by_row / pixels));
    }
    channel_blocks = (C + channels - 1) / channels;
    pixel_blocks = (P + pixels - 1) / pixels;
  }
  Tile tile(int64_t channel_block, int64_t pixel_block) const {
    const int64_t c = channel_block * channels, p = pixel_block * pixels;
    const int64_t nc = std::min(channels, C - c), np = std::min(pixels, P - p);
    if (spread > 1 || !by_element) return by_element ? Tile{true, c, p, 1, nc * np, np} : Tile{false, c, p, nc, np, 1};
    return {true, c, p, np, nc, 1};
  }
  int64_t coefficients() const {
    return channels * spread;
  }
};

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

// Rows of a tile in one frame: where the first begins, how far it is to the next.
template <class scalar>
struct Rows {
  scalar* data;
  int64_t pitch;

  Rows(const Tile& tile, const Clip& x, int64_t n, int64_t t) : data(tile.at<scalar>(x, n, t)), pitch(tile.pitch(x)) {}
  Rows(scalar* data, int64_t pitch) : data(data), pitch(pitch) {}
};

// Calls f with `count` in 1..kMostTaps as a constant.
template <class F>
TEMPOPS_INLINE inline void with_taps(int64_t count, const F& f) {
  switch (count) {
    case 1: return f(std::make_index_sequence<1>());
    case 2: return f(std::make_index_sequence<2>());
    case 3: return f(std::make_index_sequence<3>());
    case 4: return f(std::make_index_sequence<4>());
    default: f(std::make_index_sequence<5>());
  }
}

// out = sum_m a[m] * x[m] over the tile; a[m] has tile.coefficients() values. `next` is read soon.
template <bool streams, class scalar, std::size_t... m>
TEMPOPS_INLINE inline void combine(std::index_sequence<m...>, const Tile& tile, const Rows<scalar>& out,
                                   const scalar* const* x, const scalar* next, int64_t pitch,
                                   const acc_t<scalar>* const* a, Writer<scalar>& writer) {
  using acc = acc_t<scalar>;
  const int64_t length = tile.length;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const scalar* const from[] = {x[m] + r * pitch...};
    const scalar* const soon = next + r * pitch;
    const auto fetch = [=](const scalar* to, int64_t begin) TEMPOPS_INLINE {
      return [=](int64_t i) TEMPOPS_INLINE {
        __builtin_prefetch(soon + begin + i);
        fetch_to_write(to + i);
      };
    };
    scalar* const row = out.data + r * out.pitch;
    if (!tile.by_element) {
      const acc by[] = {a[m][r]...};
      const auto sum = [=](auto... value) TEMPOPS_INLINE { return (... + (by[m] * value)); };
      writer.template write<streams>(row, length, [=](scalar* to, int64_t begin, int64_t count) TEMPOPS_INLINE {
        map(count, fetch(to, begin), sum, to, from[m] + begin...);
      });
    } else {
      const acc* const by[] = {a[m]...};
      writer.template write<streams>(row, length, [=](scalar* to, int64_t begin, int64_t count) TEMPOPS_INLINE {
        each<lanes_of<scalar>>(count, fetch(to, begin), [=](int64_t i) TEMPOPS_INLINE {
          to[i] = store<scalar>((... + (by[m][begin + i] * load(from[m][begin + i]))));
        });
      });
    }
  }
}

// Calls f(indices, r) for all rows, four at a time: so many share what is loaded for each channel.
template <class F>
TEMPOPS_INLINE inline void by_four(int64_t rows, const F& f) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) f(std::make_index_sequence<4>(), r);
  for (; r < rows; ++r) f(std::make_index_sequence<1>(), r);
}

// Fetches what is read soon.
template <class scalar>
TEMPOPS_INLINE inline void fetch_row(const scalar* row, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(scalar)) __builtin_prefetch(row + i);
}

// Adds to q[m], which has tile.coefficients() values, the sums of here * x[m], for M <= 3 frames. `next`, as far from
// `here` as the rows, is read soon.
template <int M, class scalar>
TEMPOPS_INLINE inline void products(const Tile& tile, Rows<scalar> here, const scalar* next, const scalar* const* x,
                                    int64_t pitch, acc_t<scalar>* const* q) {
  using acc = acc_t<scalar>;
  constexpr int m1 = M > 1, m2 = M > 2 ? 2 : 0;
  if (!tile.by_element) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const scalar *h = here.data + r * here.pitch, *x0 = x[0] + r * pitch, *x1 = x[m1] + r * pitch,
                   *x2 = x[m2] + r * pitch;
      for (int64_t begin = 0; begin < tile.length; begin += kChunk) {
        const int64_t end = std::min(begin + kChunk, tile.length);
        fetch_row(next + r * here.pitch + begin, end - begin);
        acc sums[M] = {};
        add_up<lanes_of<scalar>>(sums, end - begin, [=](int64_t i, acc& q0, acc& q1, acc& q2) TEMPOPS_INLINE {
          const acc v = load(h[begin + i]);
          q0 += v * load(x0[begin + i]);
          if constexpr (M > 1) q1 += v * load(x1[begin + i]);
          if constexpr (M > 2) q2 += v * load(x2[begin + i]);
        });
        for (int m = 0; m < M; ++m) q[m][r] += sums[m];
      }
    }
    return;
  }
  acc *q0 = q[0], *q1 = q[m1], *q2 = q[m2];
  const auto rows = [=]<std::size_t... row>(std::index_sequence<row...>, int64_t r) TEMPOPS_INLINE {
    (fetch_row(next + (r + row) * here.pitch, tile.length), ...);
    const scalar* const h[] = {here.data + (r + row) * here.pitch...};
    const scalar* const v0[] = {x[0] + (r + row) * pitch...};
    const scalar* const v1[] = {x[m1] + (r + row) * pitch...};
    const scalar* const v2[] = {x[m2] + (r + row) * pitch...};
    _Pragma("omp simd") for (int64_t i = 0; i < tile.length; ++i) {
      const acc v[] = {load(h[row][i])...};
      q0[i] += (... + (v[row] * load(v0[row][i])));
      if constexpr (M > 1) q1[i] += (... + (v[row] * load(v1[row][i])));
      if constexpr (M > 2) q2[i] += (... + (v[row] * load(v2[row][i])));
    }
  };
  by_four(tile.rows, rows);
}

// The taps of a frame that read frames inside the clip, and what they take those with.
template <class scalar>
struct Window {
  using acc = acc_t<scalar>;

  const Coefficients<scalar>& w;
  const bool transposed;  // taps reversed, the gate of the frame written in place of those read
  const bool streams;     // past the caches, so that fetching reaches farther
  const int64_t size;     // coefficients of a tap
  Tile tile{};
  int64_t n = -1, first = 0, count = 0;  // taps [first, first + count)
  int64_t pitch = 0;
  const scalar* next = nullptr;  // what to fetch: a distance ahead, or what the next step reads for the first time
  Scratch<acc> kernels, gated, row;
  std::vector<const scalar*> x;  // by tap
  std::vector<const acc*> a;

  Window(const Coefficients<scalar>& w_, bool transposed_, bool streams_, const Tiling& tiling)
      : w(w_), transposed(transposed_), streams(streams_), size(tiling.coefficients()), kernels(w.K * size),
        gated(w.gate ? w.K * size : 0), row(w.K > kMostTaps ? tiling.channels * tiling.pixels : 0), x(w.K), a(w.K) {}

  // Takes the kernels of the tile's channels, unless they are there.
  TEMPOPS_INLINE void select(const Tile& next, int64_t clip) {
    const bool same = n >= 0 && tile.c == next.c && tile.channels() == next.channels() && (n == clip || !w.per_clip);
    tile = next;
    n = clip;
    if (same) return;
    for (int64_t j = 0; j < w.K; ++j) {
      acc* to = &kernels[j * size];
      for (int64_t c = 0; c < tile.channels(); ++c, to += tile.spread) {
        const acc value = load(w.kernel(n, tile.c + c)[transposed ? w.K - 1 - j : j]);
        *to = value;
        if (tile.spread > 1) each(tile.spread, [=](int64_t i) TEMPOPS_INLINE { to[i] = value; });
      }
    }
  }

  // `following` is the tile after this one, of clip `following_clip`.
  TEMPOPS_INLINE void move(const Clip& from, int64_t t, const Tile& following, int64_t following_clip) {
    const int64_t K = w.K, R = K / 2;
    first = std::max<int64_t>(0, R - t);
    count = std::min<int64_t>(K, from.T - t + R) - first;
    pitch = tile.pitch(from);
    for (int64_t m = 0; m < count; ++m) {
      const int64_t s = t + first + m - R;
      x[m] = tile.at<scalar>(from, n, s);
      a[m] = &kernels[(first + m) * size];
      if (!w.gate) continue;
      const scalar* gate = w.gates(n, transposed ? t : s) + tile.c;
      acc* to = &gated[(first + m) * size];
      _Pragma("omp simd") for (int64_t c = 0; c < tile.channels(); ++c) to[c] = a[m][c] * load(gate[c]);
      a[m] = to;
    }
    const int64_t s = t + R + 1;
    if (!streams)
      next = x[count - 1] + kAhead<scalar>;
    else if (s < from.T)
      next = tile.at<scalar>(from, n, s);
    else
      next = following.at<scalar>(from, following_clip, std::min(s - from.T, from.T - 1));
  }

  void combine_into(const Rows<scalar>& out, Writer<scalar>& writer) {
    if (count <= kMostTaps) {
      with_taps(count, [&](auto taps) {
        run([&]() TEMPOPS_INLINE {
          writer.chosen([&](auto streams) TEMPOPS_INLINE {
            combine<streams()>(taps, tile, out, x.data(), next, pitch, a.data(), writer);
          });
        });
      });
      return;
    }
    run([&]() TEMPOPS_INLINE { combine_many(out); });
  }
  // The same with more taps than are combined in one pass.
  TEMPOPS_INLINE void combine_many(const Rows<scalar>& out) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      std::fill(row.begin(), row.end(), acc(0));
      for (int64_t m = 0; m < count; ++m) {
        const scalar* from = x[m] + r * pitch;
        const acc* by = tile.by_element ? a[m] : a[m] + r;
        const int64_t step = tile.by_element;
        _Pragma("omp simd") for (int64_t i = 0; i < tile.length; ++i) row[i] += by[i * step] * load(from[i]);
      }
      for (int64_t i = 0; i < tile.length; ++i) out.data[r * out.pitch + i] = store<scalar>(row[i]);
    }
  }

  // q[k], of tile.coefficients() values, += the products with the frame that tap k of the kernel leads to.
  void products_into(std::vector<acc*>& q, const Rows<scalar>& here, const scalar* soon) const {
    for (int64_t m = 0; m < count; m += 3) {
      const auto sums = [&](int64_t i) TEMPOPS_INLINE { return q[w.K - 1 - first - std::min(m + i, count - 1)]; };
      acc* const into[] = {sums(0), sums(1), sums(2)};
      switch (count - m) {
        case 1: run([&]() TEMPOPS_INLINE { products<1>(tile, here, soon, &x[m], pitch, into); }); break;
        case 2: run([&]() TEMPOPS_INLINE { products<2>(tile, here, soon, &x[m], pitch, into); }); break;
        default: run([&]() TEMPOPS_INLINE { products<3>(tile, here, soon, &x[m], pitch, into); });
      }
    }
  }

  // Empties the sums q of a tap: into += q * gate (1 for null), gate_into += q * kernel, a value for each channel.
  TEMPOPS_INLINE void flush(acc* q, const acc* kernel, const scalar* gate, double* into, double* gate_into) const {
    const int64_t channels = tile.channels(), spread = tile.spread;
    if (spread > 1) {  // not gated
      for (int64_t c = 0; c < channels; ++c) into[c] += std::accumulate(q + c * spread, q + (c + 1) * spread, 0.0);
    } else if (!gate) {
      _Pragma("omp simd") for (int64_t c = 0; c < channels; ++c) into[c] += q[c];
    } else {
      _Pragma("omp simd") for (int64_t c = 0; c < channels; ++c) into[c] += static_cast<double>(q[c]) * load(gate[c]);
      if (gate_into)
        _Pragma("omp simd") for (int64_t c = 0; c < channels; ++c) gate_into[c] +=
            static_cast<double>(q[c]) * kernel[c];
    }
    std::fill_n(q, channels * spread, acc(0));
  }
};

template <class scalar>
void conv(const Clip& y, const Clip& x, const Coefficients<scalar>& w, bool transposed) {
  // A gate makes each frame of a tile coefficients of its own, which more pixels share.
  const Tiling tiling(x, !w.gate && x.dense_frames() && y.dense_frames(),
                      {4096, 1024, w.gate ? 16384 : 4096, 2048, 1024});
  const int64_t tiles = tiling.channel_blocks * tiling.pixel_blocks;
  const bool past_caches = passes_caches({&x, &y});
  parallel(x.N * tiles, x.T * tiling.channels * tiling.pixels, [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    Window<scalar> window(w, transposed, past_caches, tiling);
    Writer<scalar> writer(past_caches);
    for (int64_t i = begin; i < end; ++i) {
      const auto tile_of = [=](int64_t i) TEMPOPS_INLINE {
        return tiling.tile(i % tiles / tiling.pixel_blocks, i % tiles % tiling.pixel_blocks);
      };
      const int64_t n = i / tiles, next = std::min(i + 1, x.N * tiles - 1);
      const Tile tile = tile_of(i), following = tile_of(next);
      window.select(tile, n);
      for (int64_t t = 0; t < x.T; ++t) {
        window.move(x, t, following, next / tiles);
        window.combine_into(Rows<scalar>(tile, y, n, t), writer);
      }
    }
  });
}

// Sums of the gradients to weight and gate: [parts, N or 1, K, C] and [parts, N*T, C]. Each part has its own pixels, so
// that the order of the sums is fixed however many threads there are.
struct Sums {
  int64_t parts;
  std::vector<double> weight, gate;
};

template <class scalar>
Sums backward(const Clip* dx, const Clip& dy, const Clip& x, const Coefficients<scalar>& w, bool need_gate) {
  using acc = acc_t<scalar>;
  const int64_t weights = (w.per_clip ? x.N : 1) * w.K * x.C, gates = need_gate ? x.N * x.T * x.C : 0;
  if (x.empty()) return {1, std::vector<double>(weights), std::vector<double>(gates)};
  const bool dense = !w.gate && x.dense_frames() && dy.dense_frames() && (!dx || dx->dense_frames());
  const Tiling tiling(x, dense, {4096, 1024, 4096, 512, 64});
  const int64_t parts = x.channels_last ? std::clamp<int64_t>(16 / tiling.channel_blocks, 1, tiling.pixel_blocks) : 1;
  Sums sums{parts, std::vector<double>(parts * weights), std::vector<double>(parts * gates)};
  double *dweight = sums.weight.data(), *dgate = sums.gate.data();
  const bool with_dx = dx != nullptr, past_caches = with_dx && passes_caches({&x, &dy, dx});
  const Clip dx_ = with_dx ? *dx : x;
  parallel(tiling.channel_blocks * parts, x.N * x.T * x.P * tiling.channels,
           [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    Window<scalar> window(w, true, past_caches, tiling);
    Writer<scalar> writer(past_caches);
    Scratch<acc> products(w.K * window.size);
    std::vector<acc*> q(w.K);
    for (int64_t k = 0; k < w.K; ++k) q[k] = &products[k * window.size];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / parts, part = i % parts;
      for (int64_t n = 0; n < x.N; ++n) {
        for (int64_t b = tiling.pixel_blocks * part / parts; b < tiling.pixel_blocks * (part + 1) / parts; ++b) {
          const Tile tile = tiling.tile(block, b);
          window.select(tile, n);
          int64_t added = 0;
          for (int64_t t = 0; t < x.T; ++t) {
            window.move(dy, t, tile, n);
            if (with_dx) window.combine_into(Rows<scalar>(tile, dx_, n, t), writer);
            window.products_into(q, Rows<scalar>(tile, x, n, t), tile.at<scalar>(x, n, t + 1));
            // Sums of many products go on in float64.
            added += tile.by_element ? tile.rows : tile.length;
            if (!w.gate && added < kFloatSums && t + 1 < x.T) continue;
            added = 0;
            const scalar* gate = w.gate ? w.gates(n, t) + tile.c : nullptr;
            double* gate_into = need_gate ? dgate + part * gates + (n * x.T + t) * x.C + tile.c : nullptr;
            for (int64_t k = 0; k < w.K; ++k) {
              double* into = dweight + part * weights + ((w.per_clip ? n * w.K : 0) + k) * x.C + tile.c;
              window.flush(q[k], &window.kernels[(w.K - 1 - k) * window.size], gate, into, gate_into);
            }
          }
        }
      }
    }
  });
  return sums;
}

// out[n, i, k] = the sum over parts, and over the `group` adjacent channels that share kernel i, of [parts, N, K, C].
template <class scalar>
void reduce(const Tensor& out, const std::vector<double>& sums, int64_t parts, int64_t C, int64_t group, int64_t K) {
  if (out.numel() == 0) return;
  scalar* to = static_cast<scalar*>(out.data_ptr());
  const int64_t each = static_cast<int64_t>(sums.size()) / parts;
  for (int64_t n = 0; n < each / (K * C); ++n) {
    for (int64_t i = 0; i < C / group; ++i) {
      for (int64_t k = 0; k < K; ++k) {
        double sum = 0;
        for (int64_t part = 0; part < parts; ++part) {
          const double* from = &sums[part * each + (n * K + k) * C + i * group];
          sum = std::accumulate(from, from + group, sum);
        }
        *to++ = store<scalar>(static_cast<acc_t<scalar>>(sum));
      }
    }
  }
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
  const Tensor dweight = need_weight ? empty_contiguous(args.weight.sizes(), args.weight) : no_gradient(weight);
  const Tensor dgate = need_gate ? empty_contiguous(args.gate.sizes(), args.gate) : no_gradient(weight);
  by_dtype(x.dtype, [&](auto* type) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    const Coefficients<scalar> w = coefficients<scalar>(x, args);
    if (!need_weight && !need_gate) {
      if (!x.empty()) conv(dx, dy, w, true);
      return;
    }
    const Sums sums = backward(need_x ? &dx : nullptr, dy, x, w, need_gate);
    if (need_weight) reduce<scalar>(dweight, sums.weight, sums.parts, x.C, w.group, w.K);
    if (need_gate) reduce<scalar>(dgate, sums.gate, sums.parts, x.C, 1, 1);
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
