// shift_conv1x1 on the CPU: a matrix product whose operand is read at the shifted frames, so that no shifted tensor is
// written. float16 and bfloat16 run the shift, then ATen's convolution, which has instructions for them.
#include <limits>

#include "../cpu.h"
#include "convolution.h"

namespace tempops {
namespace {

using Groups = std::array<Group, 3>;

constexpr int64_t kDepth = 256;  // channels summed before the next are packed
constexpr int64_t kPanels = 4;   // panels of pixels packed at a time
constexpr int64_t kRows = 192;   // pixels gathered at a time: with kDepth channels they fit the second-level cache

// Rows and columns of a tile: two 64-byte registers of columns with AVX-512, of 32 bytes elsewhere.
template <class acc, bool wide>
struct Tile {
  static constexpr int rows = wide ? 8 : 6;
  static constexpr int columns = (wide ? 128 : 64) / sizeof(acc);
};

// sum [rows][columns] += A B over `terms`: A(i, k) = a[i][k * a_step], B(k, j) = b[k * b_step + j].
template <int rows, int columns, class acc>
TEMPOPS_INLINE inline void multiply_add(acc (&sum)[rows][columns], const acc* const (&a)[rows], int64_t a_step,
                                        const acc* __restrict b, int64_t b_step, int64_t terms) {
  for (int64_t k = 0; k < terms; ++k) {
    _Pragma("GCC unroll 8") for (int i = 0; i < rows; ++i) {
      const acc factor = a[i][k * a_step];
      _Pragma("omp simd") for (int j = 0; j < columns; ++j) sum[i][j] += factor * b[k * b_step + j];
    }
  }
}

// A run of pixels inside one frame, `at` columns into a panel.
struct Piece {
  int64_t n, t, p, at, length;
};

// Calls f for each piece of pixels [begin, end), counted through all frames.
template <class F>
TEMPOPS_INLINE inline void for_pieces(const Clip& x, int64_t begin, int64_t end, const F& f) {
  for (int64_t q = begin; q < end;) {
    const int64_t frame = q / x.P, p = q % x.P, length = std::min(x.P - p, end - q);
    f(Piece{frame / x.T, frame % x.T, p, q - begin, length});
    q += length;
  }
}

// Pixels [q0, q1) of channels [k0, k1) of the shifted x, as panels [channels, columns]; zero beyond the last pixel.
template <int columns, class scalar>
TEMPOPS_INLINE inline void pack_pixels(scalar* panels, const Clip& x, const Groups& groups, int64_t k0, int64_t k1,
                                       int64_t q0, int64_t q1) {
  const int64_t size = (k1 - k0) * columns, width = (q1 - q0) % columns;
  if (width) std::fill(panels + (q1 - q0) / columns * size, panels + ((q1 - q0) / columns + 1) * size, scalar(0));
  for_pieces(x, q0, q1, [&](const Piece& piece) TEMPOPS_INLINE {
    for (const Group& group : groups) {
      const int64_t first = std::max(k0, group.begin), last = std::min(k1, group.end);
      const int64_t t = piece.t + group.offset;
      const bool inside = t >= 0 && t < x.T;
      const scalar* from = inside ? x.frame<scalar>(piece.n, t) + piece.p : nullptr;
      for (int64_t k = first; k < last; ++k) {
        for (int64_t at = piece.at; at < piece.at + piece.length;) {
          const int64_t length = std::min(columns - at % columns, piece.at + piece.length - at);
          scalar* __restrict to = panels + at / columns * size + (k - k0) * columns + at % columns;
          const scalar* __restrict row = from + k * x.sc + (at - piece.at);
          // A channel's pixels of one pass are too few for the processor to foresee the next.
          for (int64_t j = 0; inside && j < columns; j += 64 / sizeof(scalar))
            __builtin_prefetch(row + kPanels * columns + j, 0, 2);
          if (!inside)
            for (int64_t j = 0; j < length; ++j) to[j] = 0;
          else if (length == columns)
            for (int j = 0; j < columns; ++j) to[j] = row[j];
          else
            for (int64_t j = 0; j < length; ++j) to[j] = row[j];
          at += length;
        }
      }
    }
  });
}

// What happens to the result besides the product: bias [Cout] (zeros where there is none), and a least value.
template <class scalar>
struct Epilogue {
  const scalar* bias;
  scalar floor;
};

// out [length] (+)= sum: the first part of a sum starts from `start`, the last one is clamped.
template <class scalar, class Start>
TEMPOPS_INLINE inline void put(scalar* __restrict out, const scalar* __restrict sum, int64_t length, const Start& start,
                               const Epilogue<scalar>& epilogue, bool first, bool last) {
  const scalar floor = last ? epilogue.floor : -std::numeric_limits<scalar>::infinity();
  const auto clamp = [floor](scalar v) TEMPOPS_INLINE { return v < floor ? floor : v; };  // NaN stays NaN
  if (first)
    for (int64_t j = 0; j < length; ++j) out[j] = clamp(sum[j] + start(j));
  else
    for (int64_t j = 0; j < length; ++j) out[j] = clamp(sum[j] + out[j]);
}

// The weights of a product: W(m, k) = data[m * row + k * step].
template <class scalar>
struct Weight {
  const scalar* data;
  int64_t row, step;
};

// W [M, K] as panels [K, columns] of `columns` of its rows, zero beyond M.
template <int columns, class scalar>
void pack_weight(scalar* packed, const Weight<scalar>& weight, int64_t M, int64_t K) {
  parallel((M + columns - 1) / columns, columns * K, [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    constexpr int64_t kLine = 64 / sizeof(scalar);
    for (int64_t panel = begin; panel < end; ++panel) {
      scalar* to = packed + panel * columns * K;
      const scalar* from = weight.data + panel * columns * weight.row;
      const int64_t width = std::min<int64_t>(columns, M - panel * columns);
      if (width < columns) std::fill(to, to + columns * K, scalar(0));
      for (int64_t k0 = 0; k0 < K; k0 += kLine)
        for (int64_t j = 0; j < width; ++j)
          for (int64_t k = k0; k < std::min(K, k0 + kLine); ++k)
            to[k * columns + j] = from[j * weight.row + k * weight.step];
    }
  });
}

// Y [Cout, pixels] = W [Cout, C] X [C, pixels]: a few panels of pixels are packed and all rows of W pass over them.
template <int rows, int columns, class scalar>
void convolve_planar(const Clip& y, const Clip& x, const scalar* packed, const Epilogue<scalar>& epilogue,
                     const Shift& shift) {
  const Groups groups = groups_of(shift, x.C);
  const int64_t pixels = x.N * x.T * x.P, panels = (pixels + columns - 1) / columns, Cout = y.C;
  parallel(panels, columns * x.C * Cout, [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    std::vector<scalar> chunk(kPanels * columns * std::min(kDepth, x.C));
    for (int64_t panel0 = begin; panel0 < end; panel0 += kPanels) {
      const int64_t q0 = panel0 * columns, q1 = std::min(pixels, std::min(end, panel0 + kPanels) * columns);
      for (int64_t k0 = 0; k0 < x.C; k0 += kDepth) {
        const int64_t k1 = std::min(x.C, k0 + kDepth);
        const bool first = k0 == 0, last = k1 == x.C;
        pack_pixels<columns>(chunk.data(), x, groups, k0, k1, q0, q1);
        for (int64_t m = 0; m < Cout; m += rows) {
          const scalar* from[rows];
          for (int i = 0; i < rows; ++i) from[i] = packed + m * x.C + k0 * rows + i;
          for (int64_t q = q0; q < q1; q += columns) {
            scalar sum[rows][columns] = {};
            multiply_add(sum, from, rows, &chunk[(q - q0) * (k1 - k0)], columns, k1 - k0);
            for_pieces(x, q, std::min(q1, q + columns), [&](const Piece& piece) TEMPOPS_INLINE {
              for (int64_t i = 0; i < std::min<int64_t>(rows, Cout - m); ++i) {
                scalar* to = y.frame<scalar>(piece.n, piece.t) + (m + i) * y.sc + piece.p;
                const scalar bias = epilogue.bias[m + i];
                const auto start = [bias](int64_t) TEMPOPS_INLINE { return bias; };
                if (piece.length == columns)
                  put(to, sum[i], columns, start, epilogue, first, last);
                else
                  put(to, sum[i] + piece.at, piece.length, start, epilogue, first, last);
              }
            });
          }
        }
      }
    }
  });
}

// Y [pixels, Cout] = X [pixels, C] W^T: a pixel's channels are read where they lie, group by group.
template <int rows, int columns, class scalar>
void convolve_channels_last(const Clip& y, const Clip& x, const scalar* packed, const Epilogue<scalar>& epilogue,
                            const Shift& shift) {
  const Groups groups = groups_of(shift, x.C);
  const int64_t pixels = x.N * x.T * x.P, tiles = (pixels + rows - 1) / rows, Cout = y.C;
  parallel(tiles, rows * x.C * Cout, [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    constexpr int64_t chunk = kRows / rows;
    const std::vector<scalar> outside(2 * shift.fold);
    scalar* to[kRows];
    const scalar* from[3][kRows + rows];
    for (int64_t tile0 = begin; tile0 < end; tile0 += chunk) {
      const int64_t q0 = tile0 * rows, q1 = std::min(pixels, std::min(end, tile0 + chunk) * rows);
      for_pieces(x, q0, q1, [&](const Piece& piece) TEMPOPS_INLINE {
        scalar* out = y.frame<scalar>(piece.n, piece.t) + piece.p * y.sp;
        for (int64_t i = 0; i < piece.length; ++i) to[piece.at + i] = out + i * y.sp;
        for (int g = 0; g < 3; ++g) {
          const int64_t t = piece.t + groups[g].offset;
          const bool inside = t >= 0 && t < x.T;
          const scalar* in = inside ? x.frame<scalar>(piece.n, t) + piece.p * x.sp : outside.data();
          for (int64_t i = 0; i < piece.length; ++i) from[g][piece.at + i] = inside ? in + i * x.sp : in;
        }
      });
      for (int g = 0; g < 3; ++g) std::fill_n(from[g] + (q1 - q0), rows, from[g][q1 - q0 - 1]);
      for (int64_t k0 = 0; k0 < x.C; k0 += kDepth) {
        const int64_t k1 = std::min(x.C, k0 + kDepth);
        const bool first = k0 == 0, last = k1 == x.C;
        for (int64_t c0 = 0; c0 < Cout; c0 += columns) {
          const int64_t width = std::min<int64_t>(columns, Cout - c0);
          const scalar* bias = epilogue.bias + c0;
          const auto start = [bias](int64_t j) TEMPOPS_INLINE { return bias[j]; };
          for (int64_t q = 0; q < q1 - q0; q += rows) {
            scalar sum[rows][columns] = {};
            for (int g = 0; g < 3; ++g) {
              const int64_t lo = std::max(k0, groups[g].begin), hi = std::min(k1, groups[g].end);
              const scalar* row[rows];
              for (int i = 0; i < rows; ++i) row[i] = from[g][q + i] + lo;
              multiply_add(sum, row, 1, packed + c0 * x.C + lo * columns, columns, hi - lo);
            }
            for (int64_t i = 0; i < std::min<int64_t>(rows, q1 - q0 - q); ++i) {
              if (width == columns)
                put(to[q + i] + c0, sum[i], columns, start, epilogue, first, last);
              else
                put(to[q + i] + c0, sum[i], width, start, epilogue, first, last);
            }
          }
        }
      }
    }
  });
}

template <bool wide, bool narrow, class scalar>
void convolve(const Clip& y, const Clip& x, const Weight<scalar>& weight, const Epilogue<scalar>& epilogue,
              const Shift& shift) {
  constexpr int rows = Tile<scalar, wide>::rows;
  constexpr int columns = Tile < scalar, wide && !narrow > ::columns;
  const int64_t width = x.channels_last ? columns : rows;
  const Tensor buffer = empty_contiguous(std::array<int64_t, 1>{(y.C + width - 1) / width * width * x.C}, x.tensor);
  scalar* packed = static_cast<scalar*>(buffer.data_ptr());
  if (x.channels_last) {
    pack_weight<columns>(packed, weight, y.C, x.C);
    convolve_channels_last<rows, columns, scalar>(y, x, packed, epilogue, shift);
  } else {
    pack_weight<rows>(packed, weight, y.C, x.C);
    convolve_planar<rows, columns, scalar>(y, x, packed, epilogue, shift);
  }
}

// Where the fused product was measured faster than a shift and ATen's convolution: while the weights are few beside
// what is read. Half types and processors without wide registers are left to ATen.
bool is_fused(const Clip& x, int64_t Cout) {
  const bool half = x.dtype == ScalarType::Half || x.dtype == ScalarType::BFloat16;
  const int64_t most = x.channels_last ? 1 << 16 : 1 << 17;
  return !half && isa() != Isa::baseline && x.C * Cout <= most;
}

// y = W shift(x) + bias, clamped. `transposed` reads weight [C, Cout] as its transpose.
void convolve(const Clip& y, const Clip& x, const Tensor& weight, const std::optional<Tensor>& bias, bool relu,
              const Shift& shift, bool transposed = false) {
  const auto typed = [&](auto* type) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    const std::vector<scalar> zeros(bias ? 0 : y.C);
    const Epilogue<scalar> epilogue{bias ? static_cast<const scalar*>(bias->data_ptr()) : zeros.data(),
                                    relu ? scalar(0) : -std::numeric_limits<scalar>::infinity()};
    const Weight<scalar> w{static_cast<const scalar*>(weight.data_ptr()), transposed ? 1 : x.C, transposed ? y.C : 1};
    if (isa() != Isa::avx512)
      convolve<false, true>(y, x, w, epilogue, shift);
    else if (x.channels_last && y.C <= Tile<scalar, false>::columns)
      convolve<true, true>(y, x, w, epilogue, shift);
    else
      convolve<true, false>(y, x, w, epilogue, shift);
  };
  x.dtype == ScalarType::Double ? typed(static_cast<double*>(nullptr)) : typed(static_cast<float*>(nullptr));
}

Tensor shift_conv1x1(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, Segments n_segment,
                     int64_t fold_div, const std::string& mode, const std::optional<std::string>& activation, bool) {
  const Convolution c(x, weight, bias, n_segment, fold_div, mode, activation);
  if (!is_fused(c.x, c.Cout)) return by_aten(c);
  const Clip y = c.empty_result();
  if (!y.empty()) convolve(y, c.x, c.weight, c.bias, c.relu, c.shift);
  return y.tensor;
}

std::tuple<Tensor, Tensor, Tensor> shift_conv1x1_backward(const Tensor& grad, const std::optional<Tensor>& x,
                                                          const std::optional<Tensor>& weight, Segments n_segment,
                                                          int64_t fold_div, const std::string& mode, bool channels_last,
                                                          bool need_bias, bool) {
  const ConvolutionBackward b(grad, x, weight, n_segment, fold_div, mode, channels_last);
  const auto dx = [&]() -> std::optional<Tensor> {
    if (!is_fused(b.dy, b.C)) return std::nullopt;
    const Clip moved = b.empty_dx();
    convolve(moved, b.dy, b.weight, std::nullopt, false, Shift{0, 0, 0}, true);
    shift_in_place(moved, b.shift.transposed());  // only the few channels that move
    return moved.tensor;
  };
  const auto dweight = [] { return std::optional<Tensor>(); };
  return b.gradients(dx, dweight, need_bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tempops, m) {
  m.def(
      "shift_conv1x1(Tensor x, Tensor weight, Tensor? bias=None, int? n_segment=None, int fold_div=8, "
      "str mode='bidirectional', str? activation=None, bool allow_tf32=True) -> Tensor");
  m.def(
      "shift_conv1x1_backward(Tensor grad, Tensor? x, Tensor? weight, int? n_segment, int fold_div, str mode, "
      "bool channels_last, bool need_bias, bool allow_tf32=True) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(tempops, CPU, m) {
  m.impl("shift_conv1x1", TORCH_BOX(&shift_conv1x1));
  m.impl("shift_conv1x1_backward", TORCH_BOX(&shift_conv1x1_backward));
}

}  // namespace tempops
