// Strips: how an op that reads a 3x3 neighbourhood walks the frames of a clip.
//
// A block is some rows of some channels; a thread keeps it in the cache and walks T.
#pragma once

#include "lanes.h"

namespace tempops {

inline int64_t blocks_of(int64_t n, int64_t size) {
  return (n + size - 1) / size;
}

// Whether each pixel of a channels_last clip begins in a page of its own. Pixels read or written side by side are then
// as many streams, which the processor foresees.
inline bool has_page_pixels(const Clip& x) {
  return x.channels_last && x.sp * static_cast<int64_t>(x.tensor.element_size()) >= 4096;
}

// How the frames of a clip are cut: blocks of channels, and strips of rows where one plane is large.
struct Strips {
  // Elements of a frame in a block: a planar one fits the first-level cache, a channels_last one the second.
  static constexpr int64_t kPlanar = 1024, kChannelsLast = 16384, kLeastChannels = 64;

  int64_t channels, rows, channel_blocks, strips;

  // Whole planes of some channels, or, where these are too large for that, rows of many channels.
  explicit Strips(const Clip& x) {
    if (x.channels_last) {
      const int64_t whole = kChannelsLast / x.P / kLanes * kLanes;
      cut(x, whole >= kLeastChannels ? whole : std::max(kLeastChannels, kChannelsLast / x.W));
    } else {
      channels = std::clamp<int64_t>(kPlanar / x.P, 1, x.C);
      rows = std::max<int64_t>(4, 4 * kPlanar / x.W);
      count(x);
    }
  }

  // channels_last, where frames are read in place and nothing is added up over a block: pieces of many channels, as
  // short ones of many pixels would be in as many pages; but a block for each thread.
  static Strips of_long_pixels(const Clip& x) {
    constexpr int64_t kLong = 256;
    Strips strips(x);
    const int64_t whole = kChannelsLast / x.P / kLanes * kLanes;
    strips.cut(x, whole >= kLong ? whole : std::max(kLong, 4 * kChannelsLast / x.W));
    const int64_t threads = torch::stable::get_num_threads();
    while (strips.units(x) * strips.channel_blocks < threads && strips.channels >= 2 * kLeastChannels)
      strips.cut(x, blocks_of(strips.channels / 2, kLanes) * kLanes);
    return strips;
  }

  int64_t units(const Clip& x) const {
    return x.N * strips;
  }
  int64_t work(const Clip& x) const {
    return x.T * channels * rows * x.W;
  }

 private:
  // channels_last: blocks of at most so many channels, of as many rows as fit.
  void cut(const Clip& x, int64_t most) {
    channels = std::min(x.C, most);
    rows = std::max<int64_t>(4, kChannelsLast / (x.W * channels));
    count(x);
  }
  void count(const Clip& x) {
    rows = blocks_of(x.H, blocks_of(x.H, std::min(rows, x.H)));
    channel_blocks = blocks_of(x.C, channels);
    strips = blocks_of(x.H, rows);
  }
};

// Rows [begin, end) of some channels of clip n.
struct StripBlock {
  int64_t n, c, channels, begin, end;

  StripBlock(const Clip& x, const Strips& strips, int64_t unit, int64_t channel_block)
      : n(unit / strips.strips), c(channel_block * strips.channels), channels(std::min(strips.channels, x.C - c)),
        begin(unit % strips.strips * strips.rows), end(std::min(x.H, begin + strips.rows)) {}
};

// The rows of a channels_last block with a row and a pixel more on all sides, which are `outside` outside the plane.
template <class element>
struct Strip {
  int64_t W, pitch, row;  // elements from a pixel to the next, and from a row to the next
  element outside;
  Scratch<element> memory;

  Strip(const Clip& x, const Strips& strips, element outside)
      : W(x.W), pitch(strips.channels), row((x.W + 2) * pitch), outside(outside),
        memory((strips.rows + 2) * row, outside) {}

  // Where row i of the block begins; before it is pixel -1.
  TEMPOPS_INLINE element* at(const StripBlock& b, int64_t i) {
    return memory.data() + (i - b.begin + 1) * row + pitch;
  }
  // Fills row i from value(pixel)(channel), in steps of `lanes`.
  template <int64_t lanes, class F>
  TEMPOPS_INLINE void fill(const StripBlock& b, int64_t i, int64_t H, const F& value) {
    element* to = at(b, i);
    if (i < 0 || i >= H) {
      std::fill_n(to, W * pitch, outside);
      return;
    }
    for (int64_t j = 0; j < W; ++j, to += pitch) {
      const auto of_pixel = value(i * W + j);
      element* __restrict dst = to;
      each<lanes>(b.channels, [&](int64_t c) TEMPOPS_INLINE { dst[c] = of_pixel(c); });
    }
  }
};

// The neighbours of a pixel of a strip.
template <class acc>
struct AroundInStrip {
  const acc* corner;
  int64_t row, pitch;

  TEMPOPS_INLINE AroundInStrip(Strip<acc>& strip, const StripBlock& b, int64_t i, int64_t j)
      : corner(strip.at(b, i - 1) + (j - 1) * strip.pitch), row(strip.row), pitch(strip.pitch) {}
  TEMPOPS_INLINE const acc* operator()(int64_t k, int64_t d) const {
    return corner + k * row + d * pitch;
  }
};

// The neighbours of n pixels of a frame; `outside` is read for those that are not in it.
template <int64_t n, class acc>
struct AroundInFrame {
  const acc* at[3][n + 2];

  TEMPOPS_INLINE AroundInFrame(const Clip& x, const acc* frame, const acc* outside, int64_t i, int64_t j) {
    for (int64_t k = 0; k < 3; ++k) {
      for (int64_t d = 0; d < n + 2; ++d) {
        const int64_t row = i + k - 1, column = j + d - 1;
        const bool inside = row >= 0 && row < x.H && column >= 0 && column < x.W;
        at[k][d] = inside ? frame + (row * x.W + column) * x.sp : outside;
      }
    }
  }
  TEMPOPS_INLINE const acc* operator()(int64_t k, int64_t d) const {
    return at[k][d];
  }
};

// Keeps what is made of a row, `pitch` elements from a pixel to the next.
template <class acc>
struct Kept {
  acc* row;
  int64_t pitch;

  TEMPOPS_INLINE Kept at(int64_t j) const {
    return {row + j * pitch, pitch};
  }
  TEMPOPS_INLINE void operator()(int64_t q, int64_t c, acc value) const {
    row[q * pitch + c] = value;
  }
};

// Calls f(constant, j) for the pixels j in [0, n) of a row, four at a time as long as there are so many: neighbours
// share what they read.
template <class F>
TEMPOPS_INLINE inline void together(int64_t n, const F& f) {
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) f(std::integral_constant<int64_t, 4>(), j);
  for (; j < n; ++j) f(std::integral_constant<int64_t, 1>(), j);
}

}  // namespace tempops
