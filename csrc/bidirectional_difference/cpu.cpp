// bidirectional_difference on the CPU.
//
// The 3x3 product of frame t is computed once and subtracted from frame t - 1 (`forward`) and frame t + 1 (`backward`).
// A thread keeps a block of a clip in the cache and walks T, so that these frames are there already. Likewise the
// backward adds up what the two gradients say of the product of frame t, and transposes the product once.
#include "../stream.h"
#include "../strip.h"
#include "arguments.h"

namespace tempops {
namespace {

constexpr int64_t kTaps = 9;
// Terms that a float32 sum may have before it goes on in float64, and the size of those sums.
constexpr int64_t kTerms = 256;
constexpr int64_t kPartials = 65536;

template <class acc>
using word_t = std::conditional_t<std::is_same_v<acc, double>, int64_t, int32_t>;

// The weights as [channel][tap] (planar) or [tap][channel] (channels_last); turned around for the transposed product.
template <class scalar>
std::vector<acc_t<scalar>> taps_of(const Tensor& weight, const Clip& x, bool transposed) {
  const scalar* w = static_cast<const scalar*>(weight.data_ptr());
  std::vector<acc_t<scalar>> taps(x.C * kTaps);
  for (int64_t c = 0; c < x.C; ++c) {
    for (int64_t k = 0; k < kTaps; ++k) {
      taps[x.channels_last ? k * x.C + c : c * kTaps + k] = load(w[c * kTaps + (transposed ? kTaps - 1 - k : k)]);
    }
  }
  return taps;
}

// A strip of each plane of a block, with a row and a pixel more on all sides. Left and right of a row lies another one:
// `column` tells.
template <class acc>
struct Planes {
  int64_t W, plane;
  Scratch<acc> memory;

  Planes(const Clip& x, const Strips& strips)
      : W(x.W), plane(blocks_of((strips.rows + 2) * W + 2, kLanes) * kLanes), memory(strips.channels * plane + kLanes) {
  }

  // The first pixel of channel c of the block.
  TEMPOPS_INLINE acc* at(const StripBlock& b, int64_t c) {
    return memory.data() + (c - b.c) * plane + W + 1;
  }
  // Fills rows [begin - 1, end + 1) of a channel from value(offset in the plane), in steps of `lanes`, before each of
  // which comes hint(offset). Rows outside the plane are zero.
  template <int64_t lanes, class Hint, class F>
  TEMPOPS_INLINE void fill(const StripBlock& b, int64_t c, int64_t H, const Hint& hint, const F& value) {
    const int64_t lo = std::max<int64_t>(0, b.begin - 1), hi = std::min(H, b.end + 1), from = lo * W;
    acc* first = at(b, c);
    if (lo == b.begin && hi > b.end) std::fill_n(first - W, W, acc(0));
    if (hi == b.end && lo < b.begin) std::fill_n(first + (b.end - b.begin) * W, W, acc(0));
    acc* __restrict dst = first + (lo - b.begin) * W;
    each<lanes>((hi - lo) * W, [&](int64_t i) TEMPOPS_INLINE { hint(from + i); },
                [&](int64_t i) TEMPOPS_INLINE { dst[i] = value(from + i); });
  }
};

template <class word>
std::vector<word> columns_of(const Clip& x, const Strips& strips) {
  std::vector<word> column(strips.rows * x.W + kLanes);
  for (size_t p = 0; p < column.size(); ++p) column[p] = p % x.W;
  return column;
}

// The 3x3 product at pixel p of a plane.
template <class acc>
struct ProductPlanar {
  const acc *x, *w;
  const word_t<acc>* column;
  int64_t W;

  TEMPOPS_INLINE acc operator()(int64_t p) const {
    const acc *above = x - W, *below = x + W;
    const word_t<acc> last = W - 1;
    acc left = w[0] * above[p - 1] + w[3] * x[p - 1] + w[6] * below[p - 1];
    acc right = w[2] * above[p + 1] + w[5] * x[p + 1] + w[8] * below[p + 1];
    left = column[p] > 0 ? left : acc(0);
    right = column[p] < last ? right : acc(0);
    return w[1] * above[p] + w[4] * x[p] + w[7] * below[p] + (left + right);
  }
};

// Calls put(q, c, product) with the 3x3 products of n adjacent pixels q; around(k, d) is where row k - 1, pixel d - 1
// around the first of them is.
template <int64_t n, class acc, class Around, class Put>
TEMPOPS_INLINE inline void products(const Around around, const acc* __restrict w, int64_t C, int64_t channels,
                                    const Put put) {
  _Pragma("omp simd") for (int64_t c = 0; c < channels; ++c) {
    acc sum[n] = {};
    for (int64_t k = 0; k < 3; ++k) {
      const acc w0 = w[3 * k * C + c], w1 = w[(3 * k + 1) * C + c], w2 = w[(3 * k + 2) * C + c];
      acc v[n + 2];
      for (int64_t d = 0; d < n + 2; ++d) v[d] = around(k, d)[c];
      for (int64_t q = 0; q < n; ++q) sum[q] += w0 * v[q] + w1 * v[q + 1] + w2 * v[q + 2];
    }
    for (int64_t q = 0; q < n; ++q) put(q, c, sum[q]);
  }
}

// sums[tap] += the products of n adjacent pixels of s with what the tap reads of x.
template <int64_t n, class acc>
TEMPOPS_INLINE inline void correlate(acc* __restrict sums, const acc* __restrict s, const acc* __restrict corner,
                                     int64_t row, int64_t pitch, int64_t channels) {
  _Pragma("omp simd") for (int64_t c = 0; c < channels; ++c) {
    acc here[n];
    for (int64_t q = 0; q < n; ++q) here[q] = s[q * pitch + c];
    for (int64_t k = 0; k < 3; ++k) {
      acc v[n + 2];
      for (int64_t d = 0; d < n + 2; ++d) v[d] = corner[k * row + d * pitch + c];
      for (int64_t d = 0; d < 3; ++d) {
        acc sum = 0;
        for (int64_t q = 0; q < n; ++q) sum += here[q] * v[q + d];
        sums[(3 * k + d) * pitch + c] += sum;
      }
    }
  }
}

template <class scalar>
TEMPOPS_INLINE inline void fill_zero(scalar* frame, const Clip& y, const StripBlock& b) {
  frame += b.c * y.sc + b.begin * y.W * y.sp;
  const int64_t pixels = (b.end - b.begin) * y.W;
  if (y.channels_last) {
    for (int64_t p = 0; p < pixels; ++p) std::fill_n(frame + p * y.sp, b.channels, scalar(0));
  } else {
    for (int64_t c = 0; c < b.channels; ++c) std::fill_n(frame + c * y.sc, pixels, scalar(0));
  }
}

template <class scalar>
void difference_planar(const Clip& forward, const Clip& backward, const Clip& x, const Tensor& weight,
                       acc_t<scalar> sign) {
  using acc = acc_t<scalar>;
  const Strips strips(x);
  const std::vector<acc> taps = taps_of<scalar>(weight, x, false);
  const Frames<scalar> frames_x(x), frames_forward(forward), frames_backward(backward);
  const acc* w = taps.data();
  const bool past_caches = passes_caches({&x, &forward, &backward});
  parallel(strips.units(x) * strips.channel_blocks, strips.work(x), [=](int64_t first, int64_t last) TEMPOPS_INLINE {
    Writer<scalar> to_forward(past_caches), to_backward(past_caches);
    Planes<acc> planes(x, strips);
    const auto columns = columns_of<word_t<acc>>(x, strips);
    for (int64_t item = first; item < last; ++item) {
      const StripBlock b(x, strips, item % strips.units(x), item / strips.units(x));
      const int64_t begin = b.begin * x.W, count = (b.end - b.begin) * x.W;
      fill_zero(frames_forward(b.n, x.T - 1), forward, b);
      fill_zero(frames_backward(b.n, 0), backward, b);
      for (int64_t t = 0; t < x.T && x.T > 1; ++t) {
        const int64_t past = t > 0 ? t - 1 : t, future = t + 1 < x.T ? t + 1 : t;
        run([&]() TEMPOPS_INLINE {
          for (int64_t c = b.c; c < b.c + b.channels; ++c) {
            const scalar* frame = frames_x(b.n, t) + c * x.sc;
            planes.template fill<lanes_of<scalar>>(b, c, x.H, [](int64_t) TEMPOPS_INLINE {},
                                                   [=](int64_t p) TEMPOPS_INLINE { return load(frame[p]); });
          }
        });
        const auto write = [&](auto both) {
          run([&]() TEMPOPS_INLINE {
            for (int64_t c = b.c; c < b.c + b.channels; ++c) {
              const ProductPlanar<acc> product{planes.at(b, c), w + c * kTaps, columns.data(), x.W};
              const scalar* x_past = frames_x(b.n, past) + c * x.sc + begin;
              const scalar* x_future = frames_x(b.n, future) + c * x.sc + begin;
              scalar* const y_past = frames_forward(b.n, past) + c * forward.sc + begin;
              scalar* const y_future = frames_backward(b.n, future) + c * backward.sc + begin;
              const scalar* soon = x_future + (past_caches ? x.st : kAhead<scalar>);
              to_forward.chosen([&](auto streams) TEMPOPS_INLINE {
                if constexpr (both()) {
                  to_forward.template write<streams()>(y_past, count,
                                                       [&](scalar* ahead, int64_t from, int64_t n) TEMPOPS_INLINE {
                    const auto part = [=](scalar* __restrict behind, int64_t first, int64_t n) TEMPOPS_INLINE {
                      const int64_t at = from + first;
                      scalar* __restrict to_past = ahead + first;
                      const auto fetch = [=](int64_t p) TEMPOPS_INLINE {
                        __builtin_prefetch(soon + at + p);
                        fetch_to_write(to_past + p);
                        fetch_to_write(behind + p);
                      };
                      each<lanes_of<scalar>>(n, fetch, [=](int64_t p) TEMPOPS_INLINE {
                        const acc value = product(at + p);
                        to_past[p] = store<scalar>(sign * (load(x_past[at + p]) - value));
                        behind[p] = store<scalar>(sign * (load(x_future[at + p]) - value));
                      });
                    };
                    to_backward.template write<streams()>(y_future + from, n, part);
                  });
                } else {
                  const scalar* src = past < t ? x_past : x_future;
                  const auto part = [=](scalar* __restrict to, int64_t at, int64_t n) TEMPOPS_INLINE {
                    const auto fetch = [=](int64_t p) TEMPOPS_INLINE {
                      __builtin_prefetch(soon + at + p);
                      fetch_to_write(to + p);
                    };
                    each<lanes_of<scalar>>(n, fetch, [=](int64_t p) TEMPOPS_INLINE {
                      to[p] = store<scalar>(sign * (load(src[at + p]) - product(at + p)));
                    });
                  };
                  to_forward.template write<streams()>(past < t ? y_past : y_future, count, part);
                }
              });
            }
          });
        };
        t > 0 && t + 1 < x.T ? write(std::true_type()) : write(std::false_type());
      }
    }
  });
}

// What is written from the products of frame t: pixel q and channel c of frame t - 1 of `forward` and of frame t + 1 of
// `backward`, both from a pixel on. At a clip's ends one of the two.
template <class scalar>
struct Written {
  scalar *forward, *backward;
  const scalar *past, *future;  // frames t - 1 and t + 1 of x
  int64_t forward_step, backward_step, x_step;
  acc_t<scalar> sign;

  TEMPOPS_INLINE Written at(int64_t p) const {
    return {forward + p * forward_step,
            backward + p * backward_step,
            past + p * x_step,
            future + p * x_step,
            forward_step,
            backward_step,
            x_step,
            sign};
  }
};
template <class scalar, bool to_past, bool to_future>
struct Put {
  Written<scalar> to;

  TEMPOPS_INLINE Put at(int64_t p) const {
    return {to.at(p)};
  }
  TEMPOPS_INLINE void operator()(int64_t q, int64_t c, acc_t<scalar> product) const {
    if constexpr (to_past)
      to.forward[q * to.forward_step + c] = store<scalar>(to.sign * (load(to.past[q * to.x_step + c]) - product));
    if constexpr (to_future)
      to.backward[q * to.backward_step + c] = store<scalar>(to.sign * (load(to.future[q * to.x_step + c]) - product));
  }
};

template <class F>
TEMPOPS_INLINE inline void with_ends(bool first, bool last, const F& f) {
  constexpr std::true_type yes;
  constexpr std::false_type no;
  if (first)
    f(no, yes);
  else if (last)
    f(yes, no);
  else
    f(yes, yes);
}

// Rows of float32 and float64 are read where they are, narrower ones from a strip.
template <class scalar>
void difference_channels_last(const Clip& forward, const Clip& backward, const Clip& x, const Tensor& weight,
                              acc_t<scalar> sign) {
  using acc = acc_t<scalar>;
  constexpr bool in_place = std::is_same_v<scalar, acc>;
  const Strips strips = Strips::of_long_pixels(x);
  const bool at_once = in_place && has_page_pixels(x);
  const bool past_caches = !at_once && passes_caches({&x, &forward, &backward});
  const int64_t soon = past_caches ? x.st : kAhead<scalar>;
  const std::vector<acc> taps = taps_of<scalar>(weight, x, false);
  const Frames<scalar> frames_x(x), frames_forward(forward), frames_backward(backward);
  parallel(strips.units(x) * strips.channel_blocks, strips.work(x), [&](int64_t first, int64_t last) TEMPOPS_INLINE {
    Writer<scalar> to_forward(past_caches), to_backward(past_caches);
    std::optional<Strip<acc>> strip;
    if (!in_place) strip.emplace(x, strips, acc(0));
    const int64_t pitch = strips.channels;
    Scratch<acc> zeros(pitch), row(at_once ? 0 : x.W * pitch);
    for (int64_t item = first; item < last; ++item) {
      const StripBlock b(x, strips, item % strips.units(x), item / strips.units(x));
      fill_zero(frames_forward(b.n, x.T - 1), forward, b);
      fill_zero(frames_backward(b.n, 0), backward, b);
      for (int64_t t = 0; t < x.T && x.T > 1; ++t) {
        const scalar* frame = frames_x(b.n, t) + b.c;
        const auto fill = [&](int64_t i) TEMPOPS_INLINE {
          if constexpr (!in_place)
            run([&]() TEMPOPS_INLINE {
              strip->template fill<lanes_of<scalar>>(b, i, x.H, [&](int64_t p) TEMPOPS_INLINE {
                return [from = frame + p * x.sp](int64_t c) TEMPOPS_INLINE { return load(from[c]); };
              });
            });
        };
        const auto put_products = [&](int64_t i, const auto& put) {
          run([&]() TEMPOPS_INLINE {
            together(x.W, [&](auto n, int64_t j) TEMPOPS_INLINE {
              const acc* w = taps.data() + b.c;
              if constexpr (in_place)
                products<n()>(AroundInFrame<n(), acc>(x, frame, zeros.data(), i, j), w, x.C, b.channels, put.at(j));
              else
                products<n()>(AroundInStrip<acc>(*strip, b, i, j), w, x.C, b.channels, put.at(j));
            });
          });
        };
        // Where there is no such frame, any address will do.
        const int64_t past = t > 0 ? t - 1 : t, future = t + 1 < x.T ? t + 1 : t;
        const Written<scalar> written{frames_forward(b.n, past) + b.c,
                                      frames_backward(b.n, future) + b.c,
                                      frames_x(b.n, past) + b.c,
                                      frames_x(b.n, future) + b.c,
                                      forward.sp,
                                      backward.sp,
                                      x.sp,
                                      sign};
        // Row i, whose products lie in `row`.
        const auto write = [&](Written<scalar> pixel, auto to_past, auto to_future, auto streams) TEMPOPS_INLINE {
          const acc* product = row.data();
          for (int64_t j = 0; j < x.W; ++j, pixel = pixel.at(1), product += pitch) {
            const auto part = [=](scalar* ahead, scalar* behind, int64_t at, int64_t n) TEMPOPS_INLINE {
              const acc* __restrict value = product + at;
              const Put<scalar, to_past(), to_future()> put{
                  {ahead, behind, pixel.past + at, pixel.future + at, 0, 0, 0, sign}};
              const auto fetch = [=](int64_t c) TEMPOPS_INLINE {
                __builtin_prefetch(put.to.future + c + soon);
                fetch_to_write(put.to.forward + c);
                fetch_to_write(put.to.backward + c);
              };
              each<lanes_of<scalar>>(n, fetch, [=](int64_t c) TEMPOPS_INLINE { put(0, c, value[c]); });
            };
            const auto forward_part = [&](scalar* ahead, int64_t from, int64_t n) TEMPOPS_INLINE {
              if constexpr (!to_future()) return part(ahead, ahead, from, n);
              const auto both = [=](scalar* behind, int64_t first, int64_t n)
                                    TEMPOPS_INLINE { part(ahead + first, behind, from + first, n); };
              to_backward.template write<streams()>(pixel.backward + from, n, both);
            };
            const auto backward_part = [=](scalar* behind, int64_t from, int64_t n)
                                           TEMPOPS_INLINE { part(behind, behind, from, n); };
            if constexpr (to_past())
              to_forward.template write<streams()>(pixel.forward, b.channels, forward_part);
            else
              to_backward.template write<streams()>(pixel.backward, b.channels, backward_part);
          }
        };
        fill(b.begin - 1);
        fill(b.begin);
        for (int64_t i = b.begin; i < b.end; ++i) {
          fill(i + 1);
          if (!at_once) put_products(i, Kept<acc>{row.data(), pitch});
          with_ends(past == t, future == t, [&](auto to_past, auto to_future) {
            if constexpr (in_place)
              if (at_once) return put_products(i, Put<scalar, to_past(), to_future()>{written.at(i * x.W)});
            run([&]() TEMPOPS_INLINE {
              to_forward.chosen([&](auto streams)
                                    TEMPOPS_INLINE { write(written.at(i * x.W), to_past, to_future, streams); });
            });
          });
        }
      }
    }
  });
}

// What the gradients of both outputs say of the product of frame t and of frame t itself: 0 where they do not read it.
template <class scalar>
struct Gradients {
  const scalar *product_past, *product_future, *frame_forward, *frame_backward;

  TEMPOPS_INLINE Gradients(const Frames<scalar>& forward, const Frames<scalar>& backward, int64_t T, int64_t n,
                           int64_t t, int64_t at_forward, int64_t at_backward) {
    const auto frame = [&](const Frames<scalar>& clip, int64_t frame_t, bool there, int64_t at)
                           TEMPOPS_INLINE { return there ? clip(n, frame_t) + at : nullptr; };
    product_past = frame(forward, t - 1, t > 0, at_forward);
    product_future = frame(backward, t + 1, t + 1 < T, at_backward);
    frame_forward = frame(forward, t, t + 1 < T, at_forward);
    frame_backward = frame(backward, t, t > 0, at_backward);
  }
};

// a[i] + b[i], where either may be absent.
template <class scalar, bool has_a, bool has_b>
struct Sum {
  const scalar *a, *b;

  TEMPOPS_INLINE acc_t<scalar> operator()(int64_t i) const {
    acc_t<scalar> sum = 0;
    if constexpr (has_a) sum = load(a[i]);
    if constexpr (has_b) sum = has_a ? sum + load(b[i]) : load(b[i]);
    return sum;
  }
  TEMPOPS_INLINE Sum at(int64_t at_a, int64_t at_b) const {
    return {has_a ? a + at_a : a, has_b ? b + at_b : b};
  }
  TEMPOPS_INLINE void fetch(int64_t i) const {
    if constexpr (has_a) fetch_to_read(a + i);
    if constexpr (has_b) fetch_to_read(b + i);
  }
};
template <class scalar, class F>
TEMPOPS_INLINE inline void with_sum(const scalar* a, const scalar* b, const F& f) {
  if (a && b)
    f(Sum<scalar, true, true>{a, b});
  else if (a)
    f(Sum<scalar, true, false>{a, b});
  else if (b)
    f(Sum<scalar, false, true>{a, b});
  else
    f(Sum<scalar, false, false>{a, b});
}

// sums[tap][lane] += the products of x with the gradient s of the window whose tap x is, over one strip of a plane.
template <class acc>
TEMPOPS_INLINE inline void correlate_planar(acc (*__restrict sums)[kLanes], const acc* __restrict s,
                                            const acc* __restrict x, const word_t<acc>* __restrict column,
                                            const Clip& clip, const StripBlock& b) {
  const word_t<acc> W = clip.W;
  word_t<acc> rest[2 * kLanes] = {};  // all bits for the elements before the end, then none
  std::fill_n(rest, kLanes, word_t<acc>(-1));
  for (int64_t dy = -1; dy <= 1; ++dy) {
    const int64_t begin = (std::max(b.begin, dy) - b.begin) * W;
    const int64_t end = (std::min(b.end, clip.H + dy) - b.begin) * W;
    const acc* __restrict window = s - dy * W;
    acc left[kLanes] = {}, middle[kLanes] = {}, right[kLanes] = {};
    int64_t p = begin;
    for (; p + kLanes <= end; p += kLanes) {
      _Pragma("omp simd") for (int64_t lane = 0; lane < kLanes; ++lane) {
        const acc here = x[p + lane], a = window[p + lane + 1] * here, c = window[p + lane - 1] * here;
        left[lane] += column[p + lane] < W - 1 ? a : acc(0);
        middle[lane] += window[p + lane] * here;
        right[lane] += column[p + lane] > 0 ? c : acc(0);
      }
    }
    if (p < end) {
      const word_t<acc>* inside = rest + kLanes - (end - p);
      const auto kept = [](acc v, word_t<acc> mask)
                            TEMPOPS_INLINE { return std::bit_cast<acc>(std::bit_cast<word_t<acc>>(v) & mask); };
      _Pragma("omp simd") for (int64_t lane = 0; lane < kLanes; ++lane) {
        const acc here = x[p + lane], a = kept(window[p + lane + 1] * here, inside[lane]),
                  c = kept(window[p + lane - 1] * here, inside[lane]);
        left[lane] += column[p + lane] < W - 1 ? a : acc(0);
        middle[lane] += kept(window[p + lane] * here, inside[lane]);
        right[lane] += column[p + lane] > 0 ? c : acc(0);
      }
    }
    _Pragma("omp simd") for (int64_t lane = 0; lane < kLanes; ++lane) {
      sums[3 * (dy + 1)][lane] += left[lane];
      sums[3 * (dy + 1) + 1][lane] += middle[lane];
      sums[3 * (dy + 1) + 2][lane] += right[lane];
    }
  }
}

// Adds the sums over clips and strips that one channel block of one group holds; partials are [group][tap][C].
int64_t groups_of(const Clip& x, const Strips& strips, bool need_weight) {
  const int64_t units = strips.units(x);
  return need_weight ? std::clamp<int64_t>(kPartials / (x.C * kTaps), 1, units) : units;
}

template <class scalar>
void backward_planar(const Clip* dx, double* partials, int64_t groups, const Clip& forward, const Clip& backward,
                     const Clip& x, const Tensor& weight, acc_t<scalar> sign) {
  using acc = acc_t<scalar>;
  const Strips strips(x);
  const std::vector<acc> taps = taps_of<scalar>(weight, x, true);
  const Frames<scalar> frames_x(x), frames_forward(forward), frames_backward(backward);
  const Frames<scalar> frames_dx(dx ? *dx : x);
  const int64_t units = strips.units(x);
  parallel(groups * strips.channel_blocks, units / groups * strips.work(x),
           [&](int64_t first, int64_t last) TEMPOPS_INLINE {
    Planes<acc> planes(x, strips), planes_x(x, strips);
    Scratch<acc> sums_memory(strips.channels * kTaps * kLanes);
    const auto columns = columns_of<word_t<acc>>(x, strips);
    auto* sums = reinterpret_cast<acc(*)[kLanes]>(sums_memory.data());
    for (int64_t item = first; item < last; ++item) {
      const int64_t group = item % groups, channel_block = item / groups;
      for (int64_t unit = units * group / groups; unit < units * (group + 1) / groups; ++unit) {
        const StripBlock b(x, strips, unit, channel_block);
        const int64_t begin = b.begin * x.W, count = (b.end - b.begin) * x.W;
        int64_t terms = 0;
        const auto flush = [&]() TEMPOPS_INLINE {
          for (int64_t c = 0; c < b.channels; ++c) {
            for (int64_t k = 0; k < kTaps; ++k) {
              double sum = 0;
              for (acc& lane : sums[c * kTaps + k]) {
                sum += lane;
                lane = 0;
              }
              partials[(group * kTaps + k) * x.C + b.c + c] += sum;
            }
          }
          terms = 0;
        };
        for (int64_t t = 0; t < x.T; ++t) {
          if (partials && (terms += blocks_of(count, kLanes)) > kTerms) flush();
          const auto gradients = [&](int64_t c) TEMPOPS_INLINE {
            return Gradients<scalar>(frames_forward, frames_backward, x.T, b.n, t, c * forward.sc, c * backward.sc);
          };
          const Gradients<scalar> any = gradients(b.c);  // all channels have the same ones
          with_sum(any.product_past, any.product_future, [&](auto sum) {
            run([&]() TEMPOPS_INLINE {
              for (int64_t c = b.c; c < b.c + b.channels; ++c) {
                const Gradients<scalar> g = gradients(c);
                const decltype(sum) value{g.product_past, g.product_future};
                const auto fetch = [=](int64_t p) TEMPOPS_INLINE { value.fetch(p); };
                planes.template fill<lanes_of<scalar>>(b, c, x.H, fetch, value);
              }
            });
          });
          if (partials) {
            run([&]() TEMPOPS_INLINE {
              for (int64_t c = b.c; c < b.c + b.channels; ++c) {
                const scalar* __restrict src = frames_x(b.n, t) + c * x.sc + begin;
                acc* __restrict dst = planes_x.at(b, c);
                each<lanes_of<scalar>>(count, [=](int64_t p) TEMPOPS_INLINE { fetch_to_read(src + p); },
                                       [=](int64_t p) TEMPOPS_INLINE { dst[p] = load(src[p]); });
                correlate_planar<acc>(sums + (c - b.c) * kTaps, planes.at(b, c), dst, columns.data(), x, b);
              }
            });
          }
          if (!dx) continue;
          with_sum(any.frame_forward, any.frame_backward, [&](auto sum) {
            run([&]() TEMPOPS_INLINE {
              for (int64_t c = b.c; c < b.c + b.channels; ++c) {
                const Gradients<scalar> g = gradients(c);
                const decltype(sum) value{g.frame_forward, g.frame_backward};
                const ProductPlanar<acc> product{planes.at(b, c), taps.data() + c * kTaps, columns.data(), x.W};
                scalar* __restrict dst = frames_dx(b.n, t) + c * dx->sc + begin;
                const auto fetch = [=](int64_t p) TEMPOPS_INLINE {
                  value.fetch(begin + p);
                  fetch_to_write(dst + p);
                };
                each<lanes_of<scalar>>(count, fetch, [=](int64_t p) TEMPOPS_INLINE {
                  dst[p] = store<scalar>(sign * (value(begin + p) - product(p)));
                });
              }
            });
          });
        }
        if (partials) flush();
      }
    }
  });
}

template <class scalar>
void backward_channels_last(const Clip* dx, double* partials, int64_t groups, const Clip& forward, const Clip& backward,
                            const Clip& x, const Tensor& weight, acc_t<scalar> sign) {
  using acc = acc_t<scalar>;
  const Strips strips(x);
  const std::vector<acc> taps = taps_of<scalar>(weight, x, true);
  const Frames<scalar> frames_x(x), frames_forward(forward), frames_backward(backward);
  const Frames<scalar> frames_dx(dx ? *dx : x);
  const int64_t units = strips.units(x);
  parallel(groups * strips.channel_blocks, units / groups * strips.work(x),
           [&](int64_t first, int64_t last) TEMPOPS_INLINE {
    Strip<acc> strip(x, strips, 0), strip_x(x, strips, 0);
    const int64_t pitch = strip.pitch;
    Scratch<acc> sums(kTaps * pitch), row(x.W * pitch);
    for (int64_t item = first; item < last; ++item) {
      const int64_t group = item % groups, channel_block = item / groups;
      for (int64_t unit = units * group / groups; unit < units * (group + 1) / groups; ++unit) {
        const StripBlock b(x, strips, unit, channel_block);
        int64_t terms = 0;
        const auto flush = [&]() TEMPOPS_INLINE {
          for (int64_t k = 0; k < kTaps; ++k) {
            double* __restrict to = partials + (group * kTaps + k) * x.C + b.c;
            _Pragma("omp simd") for (int64_t c = 0; c < b.channels; ++c) to[c] += sums[k * pitch + c];
          }
          std::fill(sums.begin(), sums.end(), acc(0));
          terms = 0;
        };
        for (int64_t t = 0; t < x.T; ++t) {
          const Gradients<scalar> g(frames_forward, frames_backward, x.T, b.n, t, b.c, b.c);
          const auto fill = [&](int64_t i) TEMPOPS_INLINE {
            with_sum(g.product_past, g.product_future, [&](auto value) {
              run([&]() TEMPOPS_INLINE {
                strip.template fill<lanes_of<scalar>>(
                    b, i, x.H, [&](int64_t p) TEMPOPS_INLINE { return value.at(p * forward.sp, p * backward.sp); });
              });
            });
            if (!partials) return;
            run([&]() TEMPOPS_INLINE {
              strip_x.template fill<lanes_of<scalar>>(b, i, x.H, [&](int64_t p) TEMPOPS_INLINE {
                return [from = frames_x(b.n, t) + p * x.sp + b.c](int64_t c) TEMPOPS_INLINE { return load(from[c]); };
              });
            });
          };
          fill(b.begin - 1);
          fill(b.begin);
          for (int64_t i = b.begin; i < b.end; ++i) {
            fill(i + 1);
            if (partials && (terms += x.W) > kTerms) flush();
            if (partials) {
              const acc *s = strip.at(b, i), *corner = strip_x.at(b, i - 1) - pitch;
              run([&]() TEMPOPS_INLINE {
                together(x.W, [&](auto n, int64_t j) TEMPOPS_INLINE {
                  correlate<n()>(sums.data(), s + j * pitch, corner + j * pitch, strip.row, pitch, b.channels);
                });
              });
            }
            if (!dx) continue;
            run([&]() TEMPOPS_INLINE {
              together(x.W, [&](auto n, int64_t j) TEMPOPS_INLINE {
                const Kept<acc> kept{row.data() + j * pitch, pitch};
                products<n()>(AroundInStrip<acc>(strip, b, i, j), taps.data() + b.c, x.C, b.channels, kept);
              });
            });
            with_sum(g.frame_forward, g.frame_backward, [&](auto value) {
              run([&]() TEMPOPS_INLINE {
                for (int64_t j = 0; j < x.W; ++j) {
                  const int64_t p = i * x.W + j;
                  const acc* __restrict product = row.data() + j * pitch;
                  scalar* __restrict dst = frames_dx(b.n, t) + p * dx->sp + b.c;
                  const auto here = value.at(p * forward.sp, p * backward.sp);
                  each<lanes_of<scalar>>(b.channels, [=](int64_t c) TEMPOPS_INLINE {
                    dst[c] = store<scalar>(sign * (here(c) - product[c]));
                  });
                }
              });
            });
          }
        }
        if (partials) flush();
      }
    }
  });
}

std::tuple<Tensor, Tensor> bidirectional_difference(const Tensor& x_, const Tensor& weight_, Segments n_segment,
                                                    bool neighbor_first) {
  const Clip x = clips(x_, n_segment);
  const Tensor weight = checked_weight(weight_, x);
  const Clip forward = empty_like(x), backward = empty_like(x);
  if (!x.empty()) {
    by_dtype(x.dtype, [&](auto* type) {
      using scalar = std::remove_pointer_t<decltype(type)>;
      const acc_t<scalar> sign = neighbor_first ? -1 : 1;
      x.channels_last ? difference_channels_last<scalar>(forward, backward, x, weight, sign)
                      : difference_planar<scalar>(forward, backward, x, weight, sign);
    });
  }
  return {forward.tensor, backward.tensor};
}

std::tuple<Tensor, Tensor> bidirectional_difference_backward(const Tensor& grad_forward, const Tensor& grad_backward,
                                                             const Tensor& x_, const Tensor& weight_,
                                                             Segments n_segment, bool neighbor_first, bool need_x,
                                                             bool need_weight) {
  const Clip x = clips(x_, n_segment);
  const Tensor weight = checked_weight(weight_, x);
  const Clip forward = clips_like(grad_forward, x, "grad_forward");
  const Clip backward = clips_like(grad_backward, x, "grad_backward");
  const std::optional<Clip> dx = need_x ? std::optional(empty_like(x)) : std::nullopt;
  Tensor dweight = need_weight ? empty_contiguous(weight.sizes(), weight) : no_gradient(weight);
  by_dtype(x.dtype, [&](auto* type) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    const acc_t<scalar> sign = neighbor_first ? -1 : 1;
    const bool empty = x.empty() || (!need_x && !need_weight);
    const int64_t groups = empty ? 0 : groups_of(x, Strips(x), need_weight);
    std::vector<double> partials(need_weight ? groups * kTaps * x.C : 0);
    double* sums = need_weight ? partials.data() : nullptr;
    if (!empty) {
      const auto run_backward = x.channels_last ? backward_channels_last<scalar> : backward_planar<scalar>;
      run_backward(dx ? &*dx : nullptr, sums, groups, forward, backward, x, weight, sign);
    }
    if (!need_weight) return;
    scalar* dw = static_cast<scalar*>(dweight.data_ptr());
    for (int64_t c = 0; c < x.C; ++c) {
      for (int64_t k = 0; k < kTaps; ++k) {
        double sum = 0;
        for (int64_t group = 0; group < groups; ++group) sum += partials[(group * kTaps + k) * x.C + c];
        dw[c * kTaps + k] = store<scalar>(static_cast<acc_t<scalar>>(-sign * sum));
      }
    }
  });
  return {dx ? dx->tensor : no_gradient(x.tensor), dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tempops, m) {
  m.def(
      "bidirectional_difference(Tensor x, Tensor weight, int? n_segment=None, bool neighbor_first=False) "
      "-> (Tensor, Tensor)");
  m.def(
      "bidirectional_difference_backward(Tensor grad_forward, Tensor grad_backward, Tensor x, Tensor weight, "
      "int? n_segment, bool neighbor_first, bool need_x, bool need_weight) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(tempops, CPU, m) {
  m.impl("bidirectional_difference", TORCH_BOX(&bidirectional_difference));
  m.impl("bidirectional_difference_backward", TORCH_BOX(&bidirectional_difference_backward));
}

}  // namespace tempops
