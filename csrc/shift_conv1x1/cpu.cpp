// shift_conv1x1 on the CPU: a matrix product whose operand is read at the shifted frames, so that no shifted tensor is
// written. float16 and bfloat16 run the shift, then ATen's convolution, which has instructions for them.
#include <limits>

#include "../aten.h"
#include "../gemm.h"
#include "../temporal_shift/cpu.h"

namespace tempops {
namespace {

// Channels [begin, end) are those of frame t + offset.
struct Group {
  int64_t begin, end, offset;
};
using Groups = std::array<Group, 3>;

Groups groups_of(const Shift& shift, int64_t C) {
  return {Group{0, shift.fold, shift.first}, Group{shift.fold, 2 * shift.fold, shift.second},
          Group{2 * shift.fold, C, 0}};
}

constexpr int64_t kDepth = 256;    // channels summed before the next are packed: a packed panel fits the first level

constexpr int64_t kRows = 192;     // the same, where the pixels are the rows of the product

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

// panel [channels, columns] = channels [k0, k1) of the shifted x at pixels [q0, q1), zero beyond.
template <int columns, class scalar>
TEMPOPS_INLINE inline void pack_pixels(scalar* __restrict panel, const Clip& x, const Groups& groups, int64_t k0,
                                       int64_t k1, int64_t q0, int64_t q1) {
  if (q1 - q0 < columns) std::fill(panel, panel + (k1 - k0) * columns, scalar(0));
  for_pieces(x, q0, q1, [&](const Piece& piece) TEMPOPS_INLINE {
    for (const Group& group : groups) {
      const int64_t first = std::max(k0, group.begin), last = std::min(k1, group.end);
      if (first >= last) continue;
      const int64_t t = piece.t + group.offset;
      const bool inside = t >= 0 && t < x.T;
      const scalar* from = inside ? x.frame<scalar>(piece.n, t) + piece.p : nullptr;
      for (int64_t k = first; k < last; ++k) {
        scalar* __restrict to = panel + (k - k0) * columns + piece.at;
        const scalar* __restrict row = from + k * x.sc;
        if (!inside)
          for (int64_t j = 0; j < piece.length; ++j) to[j] = 0;
        else if (piece.length == columns)
          for (int j = 0; j < columns; ++j) to[j] = row[j];
        else
          for (int64_t j = 0; j < piece.length; ++j) to[j] = row[j];
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

// weight [Cout, C] as panels [C, columns], zero beyond Cout.
template <int columns, class scalar>
void pack_weight(scalar* packed, const scalar* weight, int64_t Cout, int64_t C) {
  parallel((Cout + columns - 1) / columns, columns * C, [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    constexpr int64_t kLine = 64 / sizeof(scalar);
    for (int64_t panel = begin; panel < end; ++panel) {
      scalar* to = packed + panel * columns * C;
      const int64_t width = std::min<int64_t>(columns, Cout - panel * columns);
      if (width < columns) std::fill(to, to + columns * C, scalar(0));
      for (int64_t k0 = 0; k0 < C; k0 += kLine)
        for (int64_t j = 0; j < width; ++j)
          for (int64_t k = k0; k < std::min(C, k0 + kLine); ++k) to[k * columns + j] = weight[(panel * columns + j) * C + k];
    }
  });
}

// Y [Cout, pixels] = W [Cout, C] X [C, pixels]: a panel of pixels is packed and all rows of W pass over it.
template <int rows, int columns, class scalar>
void convolve_planar(const Clip& y, const Clip& x, const scalar* packed, const Epilogue<scalar>& epilogue,
                     const Shift& shift) {
  const Groups groups = groups_of(shift, x.C);
  const int64_t pixels = x.N * x.T * x.P, panels = (pixels + columns - 1) / columns, Cout = y.C;
  parallel(panels, columns * x.C * Cout, [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    std::vector<scalar> panel(columns * std::min(kDepth, x.C));
    for (int64_t q0 = begin * columns; q0 < std::min(pixels, end * columns); q0 += columns) {
      const int64_t q1 = std::min(pixels, q0 + columns);
      for (int64_t k0 = 0; k0 < x.C; k0 += kDepth) {
        const int64_t k1 = std::min(x.C, k0 + kDepth);
        const bool first = k0 == 0, last = k1 == x.C;
        pack_pixels<columns>(panel.data(), x, groups, k0, k1, q0, q1);
        for (int64_t m = 0; m < Cout; m += rows) {
          const scalar* from[rows];
          for (int i = 0; i < rows; ++i) from[i] = packed + m * x.C + k0 * rows + i;
          scalar sum[rows][columns] = {};
          multiply_add(sum, from, rows, panel.data(), columns, k1 - k0);
          for_pieces(x, q0, q1, [&](const Piece& piece) TEMPOPS_INLINE {
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
    std::array<std::array<const scalar*, rows>, 3> from[chunk];
    scalar* to[chunk][rows];
    for (int64_t tile0 = begin; tile0 < end; tile0 += chunk) {
      const int64_t tile1 = std::min(end, tile0 + chunk);
      for (int64_t tile = tile0; tile < tile1; ++tile)
        for (int i = 0; i < rows; ++i) {
          const int64_t q = std::min(tile * rows + i, pixels - 1), frame = q / x.P, p = q % x.P;
          to[tile - tile0][i] = y.frame<scalar>(frame / x.T, frame % x.T) + p * y.sp;
          for (int g = 0; g < 3; ++g) {
            const int64_t t = frame % x.T + groups[g].offset;
            from[tile - tile0][g][i] = t >= 0 && t < x.T ? x.frame<scalar>(frame / x.T, t) + p * x.sp : outside.data();
          }
        }
      for (int64_t k0 = 0; k0 < x.C; k0 += kDepth) {
        const int64_t k1 = std::min(x.C, k0 + kDepth);
        const bool first = k0 == 0, last = k1 == x.C;
        for (int64_t c0 = 0; c0 < Cout; c0 += columns) {
          const int64_t width = std::min<int64_t>(columns, Cout - c0);
          for (int64_t tile = tile0; tile < tile1; ++tile) {
            scalar sum[rows][columns] = {};
            for (int g = 0; g < 3; ++g) {
              const int64_t begin_k = std::max(k0, groups[g].begin), end_k = std::min(k1, groups[g].end);
              if (begin_k >= end_k) continue;
              const scalar* row[rows];
              for (int i = 0; i < rows; ++i) row[i] = from[tile - tile0][g][i] + begin_k;
              multiply_add(sum, row, 1, packed + c0 * x.C + begin_k * columns, columns, end_k - begin_k);
            }
            for (int64_t i = 0; i < std::min<int64_t>(rows, pixels - tile * rows); ++i) {
              scalar* __restrict out = to[tile - tile0][i] + c0;
              const scalar* bias = epilogue.bias + c0;
              const auto start = [bias](int64_t j) TEMPOPS_INLINE { return bias[j]; };
              put(out, sum[i], width == columns ? columns : width, start, epilogue, first, last);
            }
          }
        }
      }
    }
  });
}

template <bool wide, bool narrow, class scalar>
void convolve(const Clip& y, const Clip& x, const scalar* weight, const Epilogue<scalar>& epilogue, const Shift& shift) {
  constexpr int rows = Tile<scalar, wide>::rows;
  constexpr int columns = Tile<scalar, wide && !narrow>::columns;
  const int64_t panel = x.channels_last ? columns : rows;
  const Tensor buffer = torch::stable::new_empty(x.tensor, std::array<int64_t, 1>{(y.C + panel - 1) / panel * panel * x.C});
  scalar* packed = static_cast<scalar*>(buffer.data_ptr());
  if (x.channels_last) {
    pack_weight<columns>(packed, weight, y.C, x.C);
    convolve_channels_last<rows, columns, scalar>(y, x, packed, epilogue, shift);
  } else {
    pack_weight<rows>(packed, weight, y.C, x.C);
    convolve_planar<rows, columns, scalar>(y, x, packed, epilogue, shift);
  }
}

// A 4-D view of the pixels of a dense tensor: a 1x1 convolution does not mind which frame they are of.
Tensor flat(const Clip& x) {
  if (x.rank == 4) return x.tensor;
  return torch::stable::view(x.tensor, std::array<int64_t, 4>{x.N, x.C, x.T * x.H, x.W});
}

struct Arguments {
  int64_t Cout;
  Shift shift;
  bool relu;
};

Arguments check(const Clip& x, const Tensor& weight, int64_t fold_div, const std::string& mode,
                const std::optional<std::string>& activation) {
  TEMPOPS_CHECK(weight.dim() >= 2 && weight.size(1) == x.C && weight.numel() == weight.size(0) * x.C,
                "weight must be [Cout, C, 1, 1] with C = ", x.C);
  TEMPOPS_CHECK(!activation || *activation == "relu", "activation must be None or 'relu', got '", *activation, "'");
  return {weight.size(0), shift_of(x.C, fold_div, mode), activation.has_value()};
}

Tensor shift_conv1x1(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias_, Segments n_segment,
                     int64_t fold_div, const std::string& mode, const std::optional<std::string>& activation) {
  const Clip x = clips(x_, n_segment);
  const Tensor weight = dense_argument(weight_, x_, "weight");
  const Arguments args = check(x, weight, fold_div, mode, activation);
  std::optional<Tensor> bias;
  if (bias_) {
    bias = dense_argument(*bias_, x_, "bias");
    TEMPOPS_CHECK(bias->dim() == 1 && bias->size(0) == args.Cout, "bias must be [", args.Cout, "]");
  }
  const Clip y = empty_clips(x, x.T, args.Cout, x.H, x.W);
  const auto run_typed = [&](auto* type) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    const std::vector<scalar> zeros(bias ? 0 : args.Cout);
    const Epilogue<scalar> epilogue{bias ? static_cast<const scalar*>(bias->data_ptr()) : zeros.data(),
                                    args.relu ? scalar(0) : -std::numeric_limits<scalar>::infinity()};
    const scalar* w = static_cast<const scalar*>(weight.data_ptr());
    if (isa() != Isa::avx512)
      convolve<false, true>(y, x, w, epilogue, args.shift);
    else if (x.channels_last && args.Cout <= Tile<scalar, false>::columns)
      convolve<true, true>(y, x, w, epilogue, args.shift);
    else
      convolve<true, false>(y, x, w, epilogue, args.shift);
  };
  if (y.empty()) return y.tensor;
  if (x.C == 0) return y.tensor;
  x.dtype == ScalarType::Double ? run_typed(static_cast<double*>(nullptr)) : run_typed(static_cast<float*>(nullptr));
  return y.tensor;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tempops, m) {
  m.def(
      "shift_conv1x1(Tensor x, Tensor weight, Tensor? bias=None, int? n_segment=None, int fold_div=8, "
      "str mode='bidirectional', str? activation=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tempops, CPU, m) {
  m.impl("shift_conv1x1", TORCH_BOX(&shift_conv1x1));
}

}  // namespace tempops
