// motion_enhance on the CPU.
//
// A maximum over a square is a maximum along the rows, then one along the columns, and the same element wins as in the
// row-major scan of F.max_pool2d: the first of equals, or the last NaN. Elements are compared as integers that sort as
// that scan does: NaN above everything, both zeros equal, and a value for "outside the plane" below -Inf.
//
// A thread keeps a block of a clip (some whole planes, or a strip of rows) in the cache as flat runs of rows, and walks
// T. A neighbour is at a fixed distance there, so every pass is one long loop however narrow the plane is. The backward
// gathers what the forward would scatter, in two passes as well: of each window of a column, the row that won it; of
// each row, the column that won it.
#include <functional>
#include <limits>

#include "../stream.h"
#include "../strip.h"
#include "arguments.h"

namespace tempops {
namespace {

// Elements of one buffer: a planar block goes through each pass whole, and its buffers, which are few or many, fit the
// first-level cache; a channels_last block goes through them row by row and fits the second.
constexpr int64_t kPlanarOfFew = 2048, kPlanarOfMany = 1024;
constexpr int64_t kChannelsLast = 16384;
constexpr int64_t kLeastChannels = 32;

// How the frames of a clip are cut. Planar: whole planes, or strips of one plane's rows. channels_last: all rows of a
// block of channels, or strips of them.
struct Tiling {
  int64_t radius, channels, rows, channel_blocks, strips, band;

  Tiling(const Clip& x, int64_t radius, int64_t planar = kPlanarOfMany) : radius(radius) {
    const auto blocks = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
    const int64_t size = x.channels_last ? kChannelsLast : planar;
    if (x.channels_last) {
      channels = std::min(x.C, std::max(kLeastChannels, size / x.P / 16 * 16));
      rows = std::max<int64_t>({1, 4 * radius, size / (x.W * channels) - 4 * radius});
      band = 1;
    } else {
      channels = std::clamp<int64_t>(size / ((x.H + radius) * x.W), 1, x.C);
      rows = x.P <= 8 * size ? x.H : std::max<int64_t>({1, 4 * radius, 8 * size / x.W});
      band = channels > 1 ? x.H : std::max<int64_t>(1, size / x.W);
    }
    rows = blocks(x.H, blocks(x.H, rows));
    channel_blocks = blocks(x.C, channels);
    strips = blocks(x.H, rows);
  }

  int64_t count(const Clip& x) const {
    return x.N * channel_blocks * strips;
  }
  int64_t work(const Clip& x) const {
    return x.T * channels * rows * x.W;
  }
};

// One block: rows [lo, hi) of some channels of clip n are read, rows [begin, end) written. In a buffer a pixel's
// neighbour is `along` elements away, the next row `row`, and the next plane `plane` (planar), with `radius` rows that
// are outside between the planes, above the first and below the last.
struct Block {
  int64_t n, c, channels, lo, begin, end, hi, along, row, plane;

  Block(const Clip& x, const Tiling& tiling, int64_t item, int64_t halo) {
    const int64_t strip = item % tiling.strips;
    n = item / tiling.strips / tiling.channel_blocks;
    c = item / tiling.strips % tiling.channel_blocks * tiling.channels;
    channels = std::min(tiling.channels, x.C - c);
    begin = strip * tiling.rows;
    end = std::min(x.H, begin + tiling.rows);
    lo = std::max<int64_t>(0, begin - halo);
    hi = std::min(x.H, end + halo);
    along = x.channels_last ? channels : 1;
    row = x.W * along;
    plane = (hi - lo + tiling.radius) * row;
  }

  // Where row i begins in a buffer, and where rows up to i end.
  int64_t at(int64_t i) const {
    return (i - lo) * row;
  }
  int64_t until(int64_t i) const {
    return at(i) + (along == 1 ? (channels - 1) * plane : 0);
  }
};

// Calls f(offset in a frame of x, in a frame of y, in the buffer, count) for each run of adjacent elements of rows
// [first, last).
template <class F>
TEMPOPS_INLINE inline void each_run(const Clip& x, const Clip& y, const Block& b, int64_t first, int64_t last,
                                    const F& f) {
  const int64_t at = b.at(first), pixels = (last - first) * x.W;
  if (x.channels_last) {
    const int64_t p = first * x.W, from_x = p * x.sp + b.c, from_y = p * y.sp + b.c;
    if (b.channels == x.sp && b.channels == y.sp) return f(from_x, from_y, at, pixels * b.channels);
    for (int64_t i = 0; i < pixels; ++i) f(from_x + i * x.sp, from_y + i * y.sp, at + i * b.channels, b.channels);
  } else {
    const int64_t p = first * x.W, from_x = p + b.c * x.sc, from_y = p + b.c * y.sc;
    for (int64_t c = 0; c < b.channels; ++c) f(from_x + c * x.sc, from_y + c * y.sc, at + c * b.plane, pixels);
  }
}

template <class acc>
using word_t = std::conditional_t<std::is_same_v<acc, double>, int64_t, int32_t>;
template <class word>
constexpr word kOutside = std::numeric_limits<word>::min();
template <class word>
constexpr word kNaN = std::numeric_limits<word>::max();

TEMPOPS_INLINE inline int32_t flip(int32_t bits) {
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
TEMPOPS_INLINE inline int64_t flip(int64_t bits) {
  return bits ^ ((bits >> 63) & 0x7fffffffffffffff);
}

// Sign and magnitude into two's complement, and back. Adding zero makes one of two zeros.
struct ToKey {
  template <class acc>
  TEMPOPS_INLINE word_t<acc> operator()(acc v) const {
    using word = word_t<acc>;
    return v != v ? kNaN<word> : flip(std::bit_cast<word>(v + acc(0)));
  }
};
template <class acc>
TEMPOPS_INLINE inline acc from_key(word_t<acc> key) {
  return std::bit_cast<acc>(flip(key));
}

// Fills rows [first, last) of a buffer with convert(element) of a frame of x. Meanwhile what is read soon is fetched
// into the cache, and, unless it is streamed, the same place of `next`, a frame of y, where a later stage writes.
template <class scalar, class element, class F>
void load_rows(element* to, const Clip& x, const scalar* frame, const Clip& y, const scalar* next, bool streams,
               const Block& b, int64_t first, int64_t last, F convert) {
  // Soon: the next frame where memory is far; else a little farther on, of a pixel's few channels pixels farther.
  const int64_t ahead = streams ? x.st : x.channels_last ? 4 * x.sp : kAhead<scalar>;
  run([&]() TEMPOPS_INLINE {
    each_run(x, y, b, first, last, [=](int64_t from, int64_t next_from, int64_t at, int64_t n) TEMPOPS_INLINE {
      const scalar* __restrict src = frame + from;
      element* __restrict dst = to + at;
      const auto fetch = [=](int64_t i) TEMPOPS_INLINE {
        __builtin_prefetch(src + i + ahead);
        if (!streams) __builtin_prefetch(next + next_from + i, 1);
      };
      each<lanes_of<scalar>>(n, fetch, [=](int64_t i) TEMPOPS_INLINE { dst[i] = convert(load(src[i])); });
    });
  });
}

// Which column an element is in, for the rows of one band.
template <class word>
struct Columns {
  const word* column;
  word size;
  TEMPOPS_INLINE bool inside(int64_t p, word d) const {
    return d < 0 ? column[p] >= -d : column[p] < size - d;
  }
};
// Along a column the rows outside are in the buffer.
template <class word>
struct Rows {
  TEMPOPS_INLINE bool inside(int64_t, word) const {
    return true;
  }
};

// The maximum of K elements in a line, `step` apart, for each of n elements, or the offset of the one that wins, or
// both.
template <int K, bool maxima, bool offsets, class word, class Line>
void line_maximum(word* best, word* won, const word* keys, Line line, int64_t radius, int64_t step, int64_t n) {
  const auto loops = [](word* __restrict best, word* __restrict won, const word* __restrict keys, Line line,
                        int64_t radius, int64_t step, int64_t n) TEMPOPS_INLINE {
    if constexpr (K == 3) {
      _Pragma("omp simd") for (int64_t p = 0; p < n; ++p) {
        word a = keys[p - step], b = keys[p], c = keys[p + step];
        a = line.inside(p, -1) ? a : kOutside<word>;
        c = line.inside(p, 1) ? c : kOutside<word>;
        const word ab = b > a ? b : a;
        if constexpr (maxima) best[p] = c > ab ? c : ab;
        if constexpr (offsets) won[p] = ((c > ab) | (c == kNaN<word>)) ? 1 : ((b > a) | (b == kNaN<word>)) ? 0 : -1;
      }
    } else {
      const word first = -radius;
      _Pragma("omp simd") for (int64_t p = 0; p < n; ++p) {
        const word a = keys[p + first * step];
        best[p] = line.inside(p, first) ? a : kOutside<word>;
      }
      if constexpr (offsets) std::fill_n(won, n, first);
      for (word d = first + 1; d <= radius; ++d) {
        _Pragma("omp simd") for (int64_t p = 0; p < n; ++p) {
          const word a = best[p];
          word b = keys[p + d * step];
          b = line.inside(p, d) ? b : kOutside<word>;
          if constexpr (offsets) {
            const word before = won[p];
            won[p] = ((b > a) | (b == kNaN<word>)) ? d : before;
          }
          best[p] = b > a ? b : a;
        }
      }
    }
  };
  run(loops, best, won, keys, line, radius, step, n);
}

// Each of n elements adds up the values of the windows in its line that it won.
template <int K, class acc>
void line_sum(acc* sum, const word_t<acc>* won, const acc* values, int64_t radius, int64_t step, int64_t n) {
  using word = word_t<acc>;
  const auto loops = [](acc* __restrict sum, const word* __restrict won, const acc* __restrict values, int64_t radius,
                        int64_t step, int64_t n) TEMPOPS_INLINE {
    if constexpr (K == 3) {
      _Pragma("omp simd") for (int64_t p = 0; p < n; ++p) {
        // Values are read whether wanted or not: what follows is then free of branches.
        acc a = values[p + step], b = values[p], c = values[p - step];
        a = won[p + step] == -1 ? a : acc(0);
        b = won[p] == 0 ? b : acc(0);
        c = won[p - step] == 1 ? c : acc(0);
        sum[p] = a + b + c;
      }
    } else {
      std::fill_n(sum, n, acc(0));
      for (word d = -radius; d <= radius; ++d) {
        _Pragma("omp simd") for (int64_t p = 0; p < n; ++p) {
          const acc a = values[p - d * step];
          sum[p] += won[p - d * step] == d ? a : acc(0);
        }
      }
    }
  };
  run(loops, sum, won, values, radius, step, n);
}

// Its transpose: each of n windows takes the value of the element of its line that won it.
template <class acc>
void line_select(acc* taken, const word_t<acc>* won, const acc* values, int64_t radius, int64_t step, int64_t n) {
  using word = word_t<acc>;
  const auto loops = [](acc* __restrict taken, const word* __restrict won, const acc* __restrict values, int64_t radius,
                        int64_t step, int64_t n) TEMPOPS_INLINE {
    for (word d = -radius; d <= radius; ++d) {
      _Pragma("omp simd") for (int64_t p = 0; p < n; ++p) {
        const acc a = values[p + d * step], b = taken[p];
        taken[p] = won[p] == d ? a : b;
      }
    }
  };
  run(loops, taken, won, values, radius, step, n);
}

// A thread's buffers of a block's size, each with `radius` rows before and after it.
template <class element>
struct Buffers {
  int64_t reach, room;
  Scratch<element> memory;

  static int64_t whole_steps(int64_t n) {
    return (n + kLanes - 1) / kLanes * kLanes;
  }
  Buffers(int64_t count, const Clip& x, const Tiling& tiling, int64_t halo)
      : reach(whole_steps(tiling.radius * x.W * (x.channels_last ? tiling.channels : 1))),
        room(reach + whole_steps((std::min(x.H, tiling.rows + 2 * halo) + tiling.radius) * x.W * tiling.channels)),
        memory(count * room) {}
  element* operator[](int64_t i) {
    return memory.data() + i * room + reach;
  }
};

// Fills the rows above, between and below the planes of a block.
template <class element>
TEMPOPS_INLINE inline void fill_outside(element* buffer, const Block& b, int64_t radius, element value) {
  const int64_t reach = radius * b.row;
  std::fill_n(buffer - reach, reach, value);
  for (int64_t end = b.at(b.hi); end <= b.until(b.hi); end += b.plane) std::fill_n(buffer + end, reach, value);
}

// Which column each element of a band is in.
template <class word>
struct ColumnTable {
  std::vector<word> column;
  int64_t along = 0;

  Columns<word> operator()(const Clip& x, const Tiling& tiling, const Block& b) {
    if (along != b.along) {
      along = b.along;
      column.resize((tiling.band + tiling.radius) * x.W * tiling.channels);
      for (size_t p = 0; p < column.size(); ++p) column[p] = p / along % x.W;
    }
    return {column.data(), word(x.W)};
  }
};

// Runs stages of which each needs `radius` rows more of the one before. They advance by a band of rows at a time, so
// that what a stage reads was just written.
template <class First, class Second, class Third>
TEMPOPS_INLINE inline void pipeline(const Block& b, int64_t radius, int64_t reach, int64_t band, const First& first,
                                    const Second& second, const Third& third) {
  const int64_t begin = std::max(b.lo, b.begin - reach), end = std::min(b.hi, b.end + reach);
  int64_t i = b.lo, j = begin, k = b.begin;
  while (k < b.end) {
    const int64_t i1 = std::min(b.hi, i + band), j1 = i1 == b.hi ? end : std::clamp(i1 - radius, j, end);
    const int64_t k1 = j1 == end ? b.end : std::clamp(j1 - radius, k, b.end);
    if (i < i1) first(i, i1);
    if (j < j1) second(j, j1);
    if (k < k1) third(k, k1);
    i = i1;
    j = j1;
    k = k1;
  }
}

template <class scalar, int K>
void enhance(const Clip& y, const Clip& x, int64_t radius) {
  using acc = acc_t<scalar>;
  using word = word_t<acc>;
  const Tiling tiling(x, radius, kPlanarOfFew);
  const Frames<scalar> frames_x(x), frames_y(y);
  const bool past_caches = passes_caches({&x, &y});
  parallel(tiling.count(x), tiling.work(x), [=](int64_t first_item, int64_t last_item) TEMPOPS_INLINE {
    Writer<scalar> writer(past_caches);
    Buffers<word> words(3, x, tiling, radius);
    word *keys = words[0], *along_row = words[1], *best = words[2];
    ColumnTable<word> columns_of;
    for (int64_t item = first_item; item < last_item; ++item) {
      const Block b(x, tiling, item, radius);
      const Columns<word> columns = columns_of(x, tiling, b);
      fill_outside(keys, b, radius, kOutside<word>);
      fill_outside(along_row, b, radius, kOutside<word>);
      for (int64_t t = 1; t < x.T; ++t) {
        const auto row_stage = [&](int64_t first, int64_t last) TEMPOPS_INLINE {
          load_rows(keys, x, frames_x(b.n, t), y, frames_y(b.n, t - 1), writer.streams, b, first, last, ToKey());
          const int64_t p = b.at(first), n = b.until(last) - p;
          line_maximum<K, true, false, word>(along_row + p, nullptr, keys + p, columns, radius, b.along, n);
        };
        const auto column_stage = [&](int64_t first, int64_t last) TEMPOPS_INLINE {
          if constexpr (K != 3) {
            const int64_t p = b.at(first), n = b.until(last) - p;
            line_maximum<K, true, false, word>(best + p, nullptr, along_row + p, Rows<word>{}, radius, b.row, n);
          }
          const scalar* past = frames_x(b.n, t - 1);
          scalar* frame = frames_y(b.n, t - 1);
          run([&]() TEMPOPS_INLINE {
            each_run(x, y, b, first, last,
                     [=, &writer](int64_t from, int64_t to, int64_t at, int64_t count) TEMPOPS_INLINE {
              const auto part = [=, row = b.row](scalar* __restrict dst, int64_t begin, int64_t n) TEMPOPS_INLINE {
                const scalar* __restrict src = past + from + begin;
                const word* __restrict maximum = best + at + begin, * __restrict here = along_row + at + begin;
                const word *above = here - row, *below = here + row;
                each<lanes_of<scalar>>(n, [=](int64_t i) TEMPOPS_INLINE {
                  word key;
                  if constexpr (K == 3)
                    key = std::max(std::max(above[i], here[i]), below[i]);
                  else
                    key = maximum[i];
                  dst[i] = store<scalar>(from_key<acc>(key) - load(src[i]));
                });
              };
              writer.chosen([&](auto streams)
                                TEMPOPS_INLINE { writer.template write<streams()>(frame + to, count, part); });
            });
          });
        };
        pipeline(b, radius, 0, tiling.band, row_stage, column_stage, [](int64_t, int64_t) TEMPOPS_INLINE {});
      }
    }
  });
}

// Calls put(q, c, maximum) with the maxima of the 3x3 windows of n adjacent pixels q; around(k, d) is where row k - 1,
// pixel d - 1 around the first of them is. Elements are keys, or values without NaN.
template <int64_t n, class element, class Around, class Put>
TEMPOPS_INLINE inline void square_maxima(const Around around, int64_t channels, const Put put) {
  _Pragma("omp simd") for (int64_t c = 0; c < channels; ++c) {
    element column[n + 2];
    for (int64_t d = 0; d < n + 2; ++d) {
      const element above = around(0, d)[c], here = around(1, d)[c], below = around(2, d)[c];
      const element most = above > here ? above : here;
      column[d] = most > below ? most : below;
    }
    for (int64_t q = 0; q < n; ++q) {
      const element most = column[q] > column[q + 1] ? column[q] : column[q + 1];
      put(q, c, most > column[q + 2] ? most : column[q + 2]);
    }
  }
}

template <class acc>
TEMPOPS_INLINE inline bool has_nan(const acc* from, int64_t count) {
  using word = std::make_unsigned_t<word_t<acc>>;
  constexpr word infinity = 2 * std::bit_cast<word>(std::numeric_limits<acc>::infinity());
  word largest = 0;
  _Pragma("omp simd reduction(max : largest)") for (int64_t i = 0; i < count; ++i) {
    const word magnitude = 2 * std::bit_cast<word>(from[i]);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest > infinity;
}

// The same of all that a block reads of a frame.
template <class acc>
bool has_nan(const acc* frame, const Clip& x, const StripBlock& b) {
  const int64_t first = std::max<int64_t>(0, b.begin - 1) * x.W, last = std::min(x.H, b.end + 1) * x.W;
  bool found = false;
  run([&]() TEMPOPS_INLINE {
    if (b.channels == x.sp)
      found = has_nan(frame + first * x.sp, (last - first) * x.sp);
    else
      for (int64_t p = first; p < last; ++p) found |= has_nan(frame + p * x.sp, b.channels);
  });
  return found;
}

// What is written of the maxima, or their keys, of pixels q from one on: R = maximum - the past frame.
template <class scalar>
struct Enhanced {
  scalar* y;
  const scalar* past;
  int64_t y_step, x_step;

  TEMPOPS_INLINE Enhanced at(int64_t p) const {
    return {y + p * y_step, past + p * x_step, y_step, x_step};
  }
  TEMPOPS_INLINE void operator()(int64_t q, int64_t c, acc_t<scalar> maximum) const {
    y[q * y_step + c] = store<scalar>(maximum - load(past[q * x_step + c]));
  }
  TEMPOPS_INLINE void operator()(int64_t q, int64_t c, word_t<acc_t<scalar>> key) const {
    (*this)(q, c, from_key<acc_t<scalar>>(key));
  }
};

// The most used case, 3x3 in channels_last: without the passes, whose buffers would be as large as many channels.
// Frames of float32 and float64 are read where they are, unless there is a NaN.
template <class scalar>
void enhance_channels_last(const Clip& y, const Clip& x) {
  using acc = acc_t<scalar>;
  using word = word_t<acc>;
  constexpr bool in_place = std::is_same_v<scalar, acc>;
  const Strips strips = Strips::of_long_pixels(x);
  const bool page_pixels = has_page_pixels(x), past_caches = !page_pixels && passes_caches({&x, &y});
  // From the past frame to what is read soon: the last row of the next row's windows, or that of the next frame.
  const int64_t soon = past_caches ? 2 * x.st : x.st + 2 * x.W * x.sp;
  const Frames<scalar> frames_x(x), frames_y(y);
  parallel(strips.units(x) * strips.channel_blocks, strips.work(x), [&](int64_t first, int64_t last) TEMPOPS_INLINE {
    Writer<scalar> writer(past_caches);
    const int64_t pitch = strips.channels;
    std::optional<Strip<word>> keys;  // made where they are needed
    Scratch<word> best_keys;
    Scratch<acc> best(in_place && !page_pixels ? x.W * pitch : 0);
    const Scratch<acc> outside(pitch, -std::numeric_limits<acc>::infinity());
    for (int64_t item = first; item < last; ++item) {
      const StripBlock b(x, strips, item % strips.units(x), item / strips.units(x));
      for (int64_t t = 1; t < x.T; ++t) {
        const scalar* frame = frames_x(b.n, t) + b.c;
        const Enhanced<scalar> enhanced{frames_y(b.n, t - 1) + b.c, frames_x(b.n, t - 1) + b.c, y.sp, x.sp};
        // Writes row i, whose maxima lie in `row`.
        const auto write = [&](int64_t i, const auto* row) {
          run([&]() TEMPOPS_INLINE {
            writer.chosen([&](auto streams) TEMPOPS_INLINE {
              for (int64_t j = 0; j < x.W; ++j) {
                const Enhanced<scalar> pixel = enhanced.at(i * x.W + j);
                const auto part = [=](scalar* to, int64_t begin, int64_t count) TEMPOPS_INLINE {
                  const Enhanced<scalar> put{to, pixel.past + begin, 0, 0};
                  const auto* __restrict maximum = row + j * pitch + begin;
                  const auto fetch = [=](int64_t c) TEMPOPS_INLINE {
                    __builtin_prefetch(put.past + c + soon);
                    fetch_to_write(put.y + c);
                  };
                  each<lanes_of<scalar>>(count, fetch, [=](int64_t c) TEMPOPS_INLINE { put(0, c, maximum[c]); });
                };
                writer.template write<streams()>(pixel.y, b.channels, part);
              }
            });
          });
        };
        if constexpr (in_place) {
          if (!has_nan(frame, x, b)) {
            for (int64_t i = b.begin; i < b.end; ++i) {
              const auto put_maxima = [&](const auto& put) {
                run([&]() TEMPOPS_INLINE {
                  together(x.W, [&](auto n, int64_t j) TEMPOPS_INLINE {
                    const AroundInFrame<n(), acc> around(x, frame, outside.data(), i, j);
                    square_maxima<n(), acc>(around, b.channels, put.at(j));
                  });
                });
              };
              if (page_pixels) {
                put_maxima(enhanced.at(i * x.W));
              } else {
                put_maxima(Kept<acc>{best.data(), pitch});
                write(i, best.data());
              }
            }
            continue;
          }
        }
        if (!keys) {
          keys.emplace(x, strips, kOutside<word>);
          best_keys.resize(x.W * pitch);
        }
        const auto fill = [&](int64_t i) {
          run([&]() TEMPOPS_INLINE {
            keys->template fill<lanes_of<scalar>>(b, i, x.H, [&](int64_t p) TEMPOPS_INLINE {
              return [from = frame + p * x.sp](int64_t c) TEMPOPS_INLINE { return ToKey()(load(from[c])); };
            });
          });
        };
        fill(b.begin - 1);
        fill(b.begin);
        for (int64_t i = b.begin; i < b.end; ++i) {
          fill(i + 1);
          run([&]() TEMPOPS_INLINE {
            together(x.W, [&](auto n, int64_t j) TEMPOPS_INLINE {
              const Kept<word> kept{best_keys.data() + j * pitch, pitch};
              square_maxima<n(), word>(AroundInStrip<word>(*keys, b, i, j), b.channels, kept);
            });
          });
          write(i, best_keys.data());
        }
      }
    }
  });
}

// Rows [first, last) of a frame of y = added - taken, two buffers.
template <class scalar>
void write_difference(const Clip& y, scalar* frame, const Block& b, int64_t first, int64_t last,
                      const acc_t<scalar>* added, const acc_t<scalar>* taken, Writer<scalar>& writer) {
  run([&]() TEMPOPS_INLINE {
    each_run(y, y, b, first, last, [=, &writer](int64_t to, int64_t, int64_t at, int64_t count) TEMPOPS_INLINE {
      const auto part = [=](scalar* __restrict dst, int64_t begin, int64_t n) TEMPOPS_INLINE {
        const acc_t<scalar>* __restrict from = added + at + begin, * __restrict less = taken + at + begin;
        each<lanes_of<scalar>>(n, [=](int64_t i) TEMPOPS_INLINE { dst[i] = store<scalar>(from[i] - less[i]); });
      };
      writer.chosen([&](auto streams) TEMPOPS_INLINE { writer.template write<streams()>(frame + to, count, part); });
    });
  });
}

// dx[t] = what the windows of R[t - 1] give to the elements that won them - dR[t].
template <class scalar, int K>
void enhance_backward(const Clip& dx, const Clip& dy, const Clip& x, int64_t radius) {
  using acc = acc_t<scalar>;
  using word = word_t<acc>;
  const int64_t halo = 2 * radius;
  const Tiling tiling(x, radius);
  const Frames<scalar> frames_x(x), frames_dy(dy), frames_dx(dx);
  const bool past_caches = passes_caches({&x, &dy, &dx});
  parallel(tiling.count(x), tiling.work(x), [=](int64_t first_item, int64_t last_item) TEMPOPS_INLINE {
    Writer<scalar> writer(past_caches);
    Buffers<word> words(5, x, tiling, halo);
    Buffers<acc> values(4, x, tiling, halo);
    word *keys = words[0], *along_row = words[1], *best = words[2], *won_column = words[3], *won_row = words[4];
    acc *before = values[0], *here = values[1];  // dR[t - 1] and dR[t]
    acc *column_sum = values[2], *sum = values[3];
    ColumnTable<word> columns_of;
    for (int64_t item = first_item; item < last_item; ++item) {
      const Block b(x, tiling, item, halo);
      const Columns<word> columns = columns_of(x, tiling, b);
      for (word* buffer : {keys, along_row}) fill_outside(buffer, b, radius, kOutside<word>);
      for (word* buffer : {won_row, won_column}) fill_outside(buffer, b, radius, word(0));
      for (acc* buffer : {before, here}) fill_outside(buffer, b, radius, acc(0));
      for (int64_t t = 0; t < x.T; ++t) {
        const bool pooled = t > 0, subtracted = t + 1 < x.T;
        const auto row_stage = [&](int64_t first, int64_t last) TEMPOPS_INLINE {
          if (!pooled) return;
          load_rows(keys, x, frames_x(b.n, t), dx, frames_dx(b.n, t), writer.streams, b, first, last, ToKey());
          const int64_t p = b.at(first), n = b.until(last) - p;
          line_maximum<K, true, true>(along_row + p, won_column + p, keys + p, columns, radius, b.along, n);
        };
        const auto column_stage = [&](int64_t first, int64_t last) TEMPOPS_INLINE {
          const int64_t p = b.at(first), n = b.until(last) - p;
          if (subtracted)
            load_rows(here, dy, frames_dy(b.n, t), dx, frames_dx(b.n, t), writer.streams, b, first, last,
                      std::identity());
          if (!pooled) return;
          line_maximum<K, false, true>(best + p, won_row + p, along_row + p, Rows<word>{}, radius, b.row, n);
        };
        const auto gather_stage = [&](int64_t first, int64_t last) TEMPOPS_INLINE {
          const int64_t p = b.at(first), n = b.until(last) - p;
          if (pooled) {
            line_sum<K>(column_sum + p, won_row + p, before + p, radius, b.row, n);
            line_sum<K>(sum + p, won_column + p, column_sum + p, radius, b.along, n);
          }
          write_difference(dx, frames_dx(b.n, t), b, first, last, sum, here, writer);
        };
        if (!pooled) std::fill_n(sum, b.until(b.hi), acc(0));
        if (!subtracted) std::fill_n(here, b.until(b.hi), acc(0));
        pipeline(b, radius, radius, tiling.band, row_stage, column_stage, gather_stage);
        std::swap(before, here);
      }
    }
  });
}

// y[t] = other[t + 1], at the elements that won the windows of R[t], - other[t].
template <class scalar>
void enhance_gather(const Clip& y, const Clip& other, const Clip& x, int64_t radius) {
  using acc = acc_t<scalar>;
  using word = word_t<acc>;
  const Tiling tiling(x, radius);
  const Frames<scalar> frames_x(x), frames_other(other), frames_y(y);
  parallel(tiling.count(x), tiling.work(x), [=](int64_t first_item, int64_t last_item) TEMPOPS_INLINE {
    Buffers<word> words(5, x, tiling, radius);
    Buffers<acc> values(3, x, tiling, radius);
    word *keys = words[0], *along_row = words[1], *best = words[2], *won_column = words[3], *won_row = words[4];
    acc *here = values[0], *from_row = values[1], *from_column = values[2];
    ColumnTable<word> columns_of;
    for (int64_t item = first_item; item < last_item; ++item) {
      const Block b(x, tiling, item, radius);
      const Columns<word> columns = columns_of(x, tiling, b);
      for (word* buffer : {keys, along_row}) fill_outside(buffer, b, radius, kOutside<word>);
      for (int64_t t = 1; t < x.T; ++t) {
        const auto row_stage = [&](int64_t first, int64_t last) TEMPOPS_INLINE {
          load_rows(keys, x, frames_x(b.n, t), y, frames_y(b.n, t - 1), false, b, first, last, ToKey());
          load_rows(here, other, frames_other(b.n, t), y, frames_y(b.n, t - 1), false, b, first, last, std::identity());
          const int64_t p = b.at(first), n = b.until(last) - p;
          line_maximum<0, true, true>(along_row + p, won_column + p, keys + p, columns, radius, b.along, n);
          line_select(from_row + p, won_column + p, here + p, radius, b.along, n);
        };
        const auto column_stage = [&](int64_t first, int64_t last) TEMPOPS_INLINE {
          const int64_t p = b.at(first), n = b.until(last) - p;
          line_maximum<0, true, true>(best + p, won_row + p, along_row + p, Rows<word>{}, radius, b.row, n);
          line_select(from_column + p, won_row + p, from_row + p, radius, b.row, n);
          const scalar* past = frames_other(b.n, t - 1);
          scalar* frame = frames_y(b.n, t - 1);
          run([&]() TEMPOPS_INLINE {
            each_run(other, y, b, first, last, [=](int64_t from, int64_t to, int64_t at, int64_t count) TEMPOPS_INLINE {
              const scalar* __restrict src = past + from;
              const acc* __restrict taken = from_column + at;
              scalar* __restrict dst = frame + to;
              each<lanes_of<scalar>>(
                  count, [=](int64_t i) TEMPOPS_INLINE { dst[i] = store<scalar>(taken[i] - load(src[i])); });
            });
          });
        };
        pipeline(b, radius, 0, tiling.band, row_stage, column_stage, [](int64_t, int64_t) TEMPOPS_INLINE {});
      }
    }
  });
}

Tensor motion_enhance(const Tensor& x_, Segments n_segment, int64_t kernel_size) {
  const Clip x = clips(x_, n_segment);
  const int64_t radius = radius_of(x, kernel_size);
  const Clip y = empty_clips(x, x.T - 1, x.C, x.H, x.W);
  if (y.empty()) return y.tensor;
  by_dtype(x.dtype, [&](auto* type) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    if (radius != 1)
      enhance<scalar, 0>(y, x, radius);
    else if (x.channels_last)
      enhance_channels_last<scalar>(y, x);
    else
      enhance<scalar, 3>(y, x, radius);
  });
  return y.tensor;
}

Tensor motion_enhance_backward(const Tensor& grad, const Tensor& x_, Segments n_segment, int64_t kernel_size) {
  const Clip x = clips(x_, n_segment);
  const int64_t radius = radius_of(x, kernel_size);
  const Clip dy = gradient_of(x, grad);
  const Clip dx = empty_like(x);
  if (dx.empty()) return dx.tensor;
  by_dtype(x.dtype, [&](auto* type) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    radius == 1 ? enhance_backward<scalar, 3>(dx, dy, x, radius) : enhance_backward<scalar, 0>(dx, dy, x, radius);
  });
  return dx.tensor;
}

Tensor motion_enhance_gather(const Tensor& other_, const Tensor& x_, Segments n_segment, int64_t kernel_size) {
  const Clip x = clips(x_, n_segment);
  const int64_t radius = radius_of(x, kernel_size);
  const Clip other = clips_like(other_, x, "other");
  const Clip y = empty_clips(x, x.T - 1, x.C, x.H, x.W);
  if (y.empty()) return y.tensor;
  by_dtype(x.dtype, [&](auto* type) { enhance_gather<std::remove_pointer_t<decltype(type)>>(y, other, x, radius); });
  return y.tensor;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tempops, m) {
  m.def("motion_enhance(Tensor x, int? n_segment=None, int kernel_size=3) -> Tensor");
  m.def("motion_enhance_backward(Tensor grad, Tensor x, int? n_segment, int kernel_size) -> Tensor");
  // other[t + 1] at the elements where x[t + 1] has its maxima, minus other[t]: the backward's transpose.
  m.def("motion_enhance_gather(Tensor other, Tensor x, int? n_segment, int kernel_size) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tempops, CPU, m) {
  m.impl("motion_enhance", TORCH_BOX(&motion_enhance));
  m.impl("motion_enhance_backward", TORCH_BOX(&motion_enhance_backward));
  m.impl("motion_enhance_gather", TORCH_BOX(&motion_enhance_gather));
}

}  // namespace tempops
