// Tiles: how an op that treats the channels apart walks a frame in either layout with one loop.
//
// A tile is a small block of a frame: `rows` rows of `length` adjacent elements. In planar frames a row is a channel's
// pixels, in channels_last ones a pixel's channels; kernels work on the rows * length elements as on one run, with the
// coefficients of the channels laid out element by element beside it.
#pragma once

#include "cpu.h"

namespace tempops {

struct Tile {
  bool channels_last;
  int64_t c, p;          // first channel, first pixel
  int64_t rows, length;  // planar: channels x pixels; channels_last: pixels x channels

  int64_t size() const {
    return rows * length;
  }
  int64_t channels() const {
    return channels_last ? length : rows;
  }
  int64_t pitch(const Clip& x) const {
    return channels_last ? x.sp : x.sc;
  }
  bool flat(const Clip& x) const {
    return rows == 1 || pitch(x) == length;
  }
  template <class scalar>
  scalar* at(const Clip& x, int64_t n, int64_t t) const {
    return x.frame<scalar>(n, t) + c * x.sc + p * x.sp;
  }

  // out[i] = the value of element i's channel.
  template <class acc>
  TEMPOPS_INLINE void expand(acc* __restrict out, const acc* of_channel) const {
    for (int64_t r = 0; r < rows; ++r, out += length) {
      if (channels_last)
        std::copy_n(of_channel, length, out);
      else
        std::fill_n(out, length, of_channel[r]);
    }
  }
  // sums[channel] += the elements of that channel.
  template <class acc>
  TEMPOPS_INLINE void add_channels(double* __restrict sums, const acc* values) const {
    for (int64_t r = 0; r < rows; ++r, values += length) {
      if (channels_last) {
        _Pragma("omp simd") for (int64_t i = 0; i < length; ++i) sums[i] += values[i];
      } else {
        double sum = 0;
        _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < length; ++i) sum += values[i];
        sums[r] += sum;
      }
    }
  }
  // Copies the tile from a frame into one run, times the factor of each channel (null for none).
  template <class scalar>
  TEMPOPS_INLINE void read(acc_t<scalar>* __restrict out, const scalar* in, int64_t step,
                           const acc_t<scalar>* factor) const {
    for (int64_t r = 0; r < rows; ++r, in += step, out += length) {
      if (!factor) {
        _Pragma("omp simd") for (int64_t i = 0; i < length; ++i) out[i] = load(in[i]);
      } else if (channels_last) {
        _Pragma("omp simd") for (int64_t i = 0; i < length; ++i) out[i] = load(in[i]) * factor[i];
      } else {
        const acc_t<scalar> by = factor[r];
        _Pragma("omp simd") for (int64_t i = 0; i < length; ++i) out[i] = load(in[i]) * by;
      }
    }
  }
  // The reverse.
  template <class scalar>
  TEMPOPS_INLINE void write(scalar* __restrict out, int64_t step, const acc_t<scalar>* in,
                            const acc_t<scalar>* factor) const {
    for (int64_t r = 0; r < rows; ++r, in += length, out += step) {
      if (!factor) {
        _Pragma("omp simd") for (int64_t i = 0; i < length; ++i) out[i] = store<scalar>(in[i]);
      } else if (channels_last) {
        _Pragma("omp simd") for (int64_t i = 0; i < length; ++i) out[i] = store<scalar>(in[i] * factor[i]);
      } else {
        const acc_t<scalar> by = factor[r];
        _Pragma("omp simd") for (int64_t i = 0; i < length; ++i) out[i] = store<scalar>(in[i] * by);
      }
    }
  }
};

// A frame cut into tiles of at most kSize elements, channel blocks outermost.
struct Tiling {
  static constexpr int64_t kSize = 1024;

  bool channels_last;
  int64_t C, P, channels, pixels;  // of a full tile
  int64_t channel_blocks, pixel_blocks;

  Tiling(const Clip& x, int64_t most_channels) : channels_last(x.channels_last), C(x.C), P(x.P) {
    if (channels_last) {
      channels = std::min({C, most_channels, kSize});
      pixels = std::min(P, std::max<int64_t>(1, kSize / channels));
    } else {
      pixels = std::min(P, kSize);
      channels = std::min({C, most_channels, std::max<int64_t>(1, kSize / pixels)});
    }
    channel_blocks = (C + channels - 1) / channels;
    pixel_blocks = (P + pixels - 1) / pixels;
  }
  Tile tile(int64_t channel_block, int64_t pixel_block) const {
    const int64_t c = channel_block * channels, p = pixel_block * pixels;
    const int64_t nc = std::min(channels, C - c), np = std::min(pixels, P - p);
    return channels_last ? Tile{true, c, p, np, nc} : Tile{false, c, p, nc, np};
  }
  int64_t size() const {
    return channels * pixels;
  }
};

}  // namespace tempops
