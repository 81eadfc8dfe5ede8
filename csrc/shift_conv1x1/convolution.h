// shift_conv1x1's arguments, and what every back end falls back on: ATen's convolution after a shift.
#pragma once

#include "../aten.h"
#include "../temporal_shift/shifted.h"

namespace tempops {

// A 1x1 convolution's geometry, in the order of ATen's arguments.
struct Geometry {
  std::vector<int64_t> one, none;

  explicit Geometry(int64_t rank) : one(rank - 2, 1), none(rank - 2, 0) {}
};

// What ATen made of `x`, as clips with C channels. It chooses the strides of sides of 1 by rules of its own.
inline Clip in_layout_of(const Clip& x, const Tensor& out, int64_t C) {
  TEMPOPS_CHECK(out.scalar_type() == x.dtype, "autocast must be off where this op is called");
  const int64_t T = x.T, H = x.H, W = x.W, P = x.P;
  std::vector<int64_t> sizes{x.N * T, C, H, W}, strides{C * P, P, W, 1};
  if (x.channels_last) strides = {C * P, 1, W * C, C};
  if (x.rank == 5) {
    sizes = {x.N, C, T, H, W};
    strides = x.channels_last ? std::vector<int64_t>{T * C * P, 1, C * P, W * C, C}
                              : std::vector<int64_t>{C * T * P, T * P, P, W, 1};
  }
  const Tensor dense = torch::stable::contiguous(out, memory_format(x.rank, x.channels_last));
  return detail::view(aten("aten::as_strided", "", dense, sizes, strides, std::optional<int64_t>()), T,
                      x.channels_last);
}

inline int64_t channels_of(const Tensor& x) {
  TEMPOPS_CHECK(x.dim() >= 2, "x must be [N*T, C, H, W] and weight [Cout, C, 1, 1]");
  return x.size(1);
}

inline std::vector<int64_t> weight_sizes(int64_t Cout, int64_t C, int64_t rank) {
  std::vector<int64_t> sizes(rank, 1);
  sizes[0] = Cout;
  sizes[1] = C;
  return sizes;
}

// The weight as [Cout, C, 1, 1], with one more 1 for clips of rank 5.
inline Tensor read_weight(const Tensor& weight, const Tensor& like, int64_t Cout, int64_t C) {
  TEMPOPS_CHECK(C >= 1, "x must have at least 1 channel");
  TEMPOPS_CHECK(weight.dim() >= 2 && weight.size(0) == Cout && weight.size(1) == C && weight.numel() == Cout * C,
                "weight must be [Cout, C, 1, 1] with C = ", C);
  return torch::stable::view(dense_argument(weight, like, "weight"), weight_sizes(Cout, C, like.dim()));
}

// y = W shift(x) + bias, clamped at 0 with `relu`.
struct Convolution {
  Clip x;
  Tensor weight;
  std::optional<Tensor> bias;
  Shift shift;
  int64_t Cout;
  bool relu;

  Convolution(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias_, Segments n_segment,
              int64_t fold_div, const std::string& mode, const std::optional<std::string>& activation)
      : x(clips(x_, n_segment)), shift(shift_of(x.C, fold_div, mode)), relu(activation.has_value()) {
    TEMPOPS_CHECK(weight_.dim() >= 1, "weight must be [Cout, C, 1, 1] with C = ", x.C);
    Cout = weight_.size(0);
    weight = read_weight(weight_, x_, Cout, x.C);
    TEMPOPS_CHECK(!activation || *activation == "relu", "activation must be None or 'relu', got '", *activation, "'");
    if (!bias_) return;
    bias = dense_argument(*bias_, x_, "bias");
    TEMPOPS_CHECK(bias->dim() == 1 && bias->size(0) == Cout, "bias must be [", Cout, "]");
  }

  Clip empty_result() const {
    return empty_clips(x, x.T, Cout, x.H, x.W);
  }
};

inline Tensor by_aten(const Convolution& c) {
  if (c.x.empty() || c.Cout == 0) return c.empty_result().tensor;
  const Geometry g(c.x.rank);
  const Tensor out = aten("aten::convolution", "", shifted(c.x, c.shift), c.weight, c.bias, g.one, g.none, g.one, false,
                          g.none, int64_t(1));
  return in_layout_of(c.x, c.relu ? aten("aten::relu_", "", out) : out, c.Cout).tensor;
}

// The transposes: dx = shift^T(W^T dy) where `weight` is given, dweight [Cout, C] = dy shift(x)^T where `x` is given,
// and dbias, the sum of dy over clips, frames and pixels. `channels_last` is x's layout.
struct ConvolutionBackward {
  Clip dy;
  std::optional<Clip> x;
  bool need_x;
  Tensor weight;  // where nobody asks for dx, of its shape only
  Shift shift;
  int64_t C, Cout;

  ConvolutionBackward(const Tensor& grad, const std::optional<Tensor>& x_, const std::optional<Tensor>& weight_,
                      Segments n_segment, int64_t fold_div, const std::string& mode, bool channels_last)
      : need_x(weight_.has_value()) {
    Clip like{};
    like.tensor = grad;
    like.dtype = grad.scalar_type();
    like.rank = grad.dim();
    like.channels_last = channels_last;
    dy = clips(grad, n_segment, "grad", &like);
    Cout = dy.C;
    C = x_ ? channels_of(*x_) : weight_ ? channels_of(*weight_) : Cout;
    shift = shift_of(C, fold_div, mode);
    if (x_) {
      x = clips(*x_, n_segment, "x", &like);
      TEMPOPS_CHECK(x->N == dy.N && x->T == dy.T && x->H == dy.H && x->W == dy.W, "grad has the wrong shape");
    }
    weight = weight_ ? read_weight(*weight_, grad, Cout, C) : empty_contiguous(weight_sizes(Cout, C, dy.rank), grad);
  }

  Clip empty_dx() const {
    return empty_clips(dy, dy.T, C, dy.H, dy.W);
  }

  // `fused_dx` and `fused_dweight` return a back end's own results; nullopt leaves them to ATen.
  template <class DX, class DWeight>
  std::tuple<Tensor, Tensor, Tensor> gradients(const DX& fused_dx, const DWeight& fused_dweight, bool need_bias) const {
    std::optional<Tensor> dx, dweight;
    Tensor dbias = no_gradient(dy.tensor);
    if (need_bias) {
      std::vector<int64_t> pixels{0, 2, 3, 4};
      pixels.resize(dy.rank - 1);
      dbias = aten("aten::sum", "dim_IntList", dy.tensor, std::optional(pixels), false, std::optional<ScalarType>());
    }
    if (!need_x) dx = no_gradient(dy.tensor);
    if (!x) dweight = no_gradient(dy.tensor);
    if (dy.empty()) {
      Clip zeros = empty_dx();
      if (!dx) dx = torch::stable::zero_(zeros.tensor);
      if (!dweight) dweight = torch::stable::new_zeros(dy.tensor, std::array<int64_t, 2>{Cout, C});
    }
    if (!dx) dx = fused_dx();
    if (!dweight) dweight = fused_dweight();
    if (!dx || !dweight) {
      const bool by_aten[2] = {!dx, !dweight};
      // Where nobody reads x, ATen's convolution wants one nevertheless.
      const Tensor source = by_aten[1] ? shifted(*x, shift) : empty_dx().tensor;
      const std::array<bool, 3> wanted{by_aten[0], by_aten[1], false};
      const Geometry g(dy.rank);
      const auto gradients = call_aten<3>("aten::convolution_backward", "", dy.tensor, source, weight,
                                          std::optional<std::vector<int64_t>>(), g.one, g.none, g.one, false, g.none,
                                          int64_t(1), torch::headeronly::HeaderOnlyArrayRef<bool>(wanted));
      if (by_aten[0]) {
        const Clip moved = in_layout_of(dy, gradients[0], C);
        shift_in_place(moved, shift.transposed());
        dx = moved.tensor;
      }
      if (by_aten[1])
        dweight = torch::stable::view(torch::stable::contiguous(gradients[1]), std::array<int64_t, 2>{Cout, C});
    }
    return {*dx, *dweight, dbias};
  }
};

}  // namespace tempops
