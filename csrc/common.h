// What every op shares: the view of a tensor as clips of frames, checks with messages, dtype dispatch.
//
// Glossary: N clips, T frames a clip, C channels, H rows, W columns, P = H * W pixels.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace tempops {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Segments = std::optional<int64_t>;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}
#define TEMPOPS_CHECK(condition, ...) \
  if (!(condition)) ::tempops::fail(__VA_ARGS__)

inline bool is_supported(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
         dtype == ScalarType::BFloat16;
}

// Whether the strides say channels_last, by PyTorch's own rule (suggest_memory_format). Slices count as what they are
// slices of; tempops/ops/_contract.py holds the same rule for fake tensors.
inline bool is_channels_last(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  const int64_t rank = sizes.size();
  int64_t at_least = 0;
  if (strides[1] == 0) return false;
  for (int64_t i = 0; i < rank; ++i) {
    const int64_t d = i == 0 ? 1 : i == rank - 1 ? 0 : rank - i;  // C, then W, H, (T), then the outermost
    if (sizes[d] == 0 || strides[d] < at_least) return false;
    if (d == 0 && at_least == strides[1]) return false;
    at_least = strides[d] * (sizes[d] > 1 ? sizes[d] : 1);
  }
  return true;
}

inline MemoryFormat memory_format(int64_t rank, bool channels_last) {
  if (!channels_last) return MemoryFormat::Contiguous;
  return rank == 5 ? MemoryFormat::ChannelsLast3d : MemoryFormat::ChannelsLast;
}

// A tensor seen as N clips of T frames, as the kernels read and write it. Element (n, t, c, p) is at
// n*sn + t*st + c*sc + p*sp, and one of two things holds:
//   planar:        sp == 1, so a channel's P pixels are adjacent (contiguous tensors and their channel slices);
//   channels_last: sc == 1, so a pixel's C channels are adjacent (channels_last tensors and their channel slices).
// Tensors with other strides are copied once into the nearer of the two.
struct Clip {
  Tensor tensor;
  void* address;  // the tensor's: asking it again is a call into LibTorch
  ScalarType dtype;
  int64_t rank, N, T, C, H, W, P;
  int64_t sn, st, sc, sp;
  bool channels_last;

  template <class scalar>
  scalar* data() const {
    return static_cast<scalar*>(address);
  }
  template <class scalar>
  scalar* frame(int64_t n, int64_t t) const {
    return data<scalar>() + n * sn + t * st;
  }
  bool empty() const {
    return N * T * C * P == 0;
  }
  // True where the frame (all C channels, all P pixels) is one run of memory.
  bool dense_frames() const {
    return channels_last ? sp == C || P == 1 : sc == P || C == 1;
  }
};

namespace detail {

inline int64_t frames_of(const Tensor& x, Segments n_segment, const char* name) {
  if (x.dim() == 5) {
    TEMPOPS_CHECK(!n_segment.has_value(), "n_segment must be None for a 5-D ", name, " [N, C, T, H, W]");
    TEMPOPS_CHECK(x.size(2) >= 1, name, " must have at least 1 frame, got T = ", x.size(2));
    return x.size(2);
  }
  TEMPOPS_CHECK(n_segment.has_value(), "n_segment is required for a 4-D ", name, " [N*T, C, H, W]");
  TEMPOPS_CHECK(*n_segment >= 1, "n_segment must be at least 1, got ", *n_segment);
  TEMPOPS_CHECK(x.size(0) % *n_segment == 0, "n_segment=", *n_segment, " does not divide ", x.size(0), " frames");
  return *n_segment;
}

inline bool readable(const Tensor& x, bool channels_last) {
  const auto sizes = x.sizes(), strides = x.strides();
  const size_t h = sizes.size() - 2, w = sizes.size() - 1;
  const auto step = [&](size_t d, int64_t expected) { return sizes[d] <= 1 || strides[d] == expected; };
  if (!channels_last) return step(w, 1) && step(h, sizes[w]);
  if (sizes[w] > 1) return step(1, 1) && step(h, sizes[w] * strides[w]);
  return step(1, 1);
}

inline Clip view(Tensor x, int64_t T, bool channels_last) {
  const auto sizes = x.sizes(), strides = x.strides();
  const bool five = sizes.size() == 5;
  const size_t h = sizes.size() - 2, w = sizes.size() - 1;
  Clip clip;
  clip.address = x.data_ptr();
  clip.dtype = x.scalar_type();
  clip.rank = sizes.size();
  clip.N = five ? sizes[0] : sizes[0] / T;
  clip.T = T;
  clip.C = sizes[1];
  clip.H = sizes[h];
  clip.W = sizes[w];
  clip.P = clip.H * clip.W;
  clip.sn = five ? strides[0] : strides[0] * T;
  clip.st = five ? strides[2] : strides[0];
  clip.sc = strides[1];
  clip.sp = clip.W > 1 ? strides[w] : strides[h];
  // The stride of a dimension of size 1 says nothing; kernels may rely on these.
  if (channels_last) {
    clip.sc = 1;
    if (clip.P == 1) clip.sp = clip.C;
  } else {
    clip.sp = 1;
    if (clip.C == 1) clip.sc = clip.P;
  }
  clip.channels_last = channels_last;
  clip.tensor = std::move(x);
  return clip;
}

// The sizes or strides of a tensor of four or five dimensions; a vector would allocate.
using Numbers = std::array<int64_t, 5>;

inline std::string join(const Numbers& numbers, int64_t rank) {
  std::string joined;
  for (int64_t d = 0; d < rank; ++d) joined += (d ? ", " : "") + std::to_string(numbers[d]);
  return joined;
}

// The strides of a tensor that is contiguous or channels_last, as torch.empty gives them.
inline Numbers dense_strides(const Numbers& sizes, int64_t rank, bool channels_last) {
  Numbers strides{};
  int64_t step = channels_last ? sizes[1] : 1;
  for (int64_t d = rank - 1; d >= (channels_last ? 2 : 0); --d) {
    strides[d] = step;
    step *= channels_last ? sizes[d] : std::max<int64_t>(sizes[d], 1);
  }
  if (channels_last) strides[1] = 1, strides[0] = step;
  return strides;
}

// An uninitialised tensor of the dtype and device of `like`. torch::stable::empty would look the operator up by its
// name, which takes as long as the rest of a small call.
inline Tensor empty_strided(const Numbers& sizes, const Numbers& strides, int64_t rank, const Tensor& like) {
  int32_t dtype, device_type, device_index;
  AtenTensorHandle out;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const bool made = aoti_torch_empty_strided(rank, sizes.data(), strides.data(), dtype, device_type, device_index,
                                             &out) == AOTI_TORCH_SUCCESS;
  // The words by which training loops recognise that a batch is too large: the exception itself does not come through.
  TEMPOPS_CHECK(made, device_type == aoti_torch_device_type_cuda() ? "CUDA out of memory." : "out of memory:",
                " tempops could not allocate an output of shape [", join(sizes, rank), "]");
  return Tensor(out);
}

}  // namespace detail

// Reads x as clips. `like` asks for another tensor's layout (a gradient is read in the layout of its input).
inline Clip clips(const Tensor& x, Segments n_segment, const char* name = "x", const Clip* like = nullptr) {
  TEMPOPS_CHECK(x.dim() == 4 || x.dim() == 5, name, " must be [N*T, C, H, W] or [N, C, T, H, W], got ", x.dim(), "-D");
  TEMPOPS_CHECK(is_supported(x.scalar_type()), name, " must be float32, float16, bfloat16 or float64");
  const int64_t T = detail::frames_of(x, n_segment, name);
  if (like) {
    TEMPOPS_CHECK(x.scalar_type() == like->dtype, name, " must have x's dtype");
    TEMPOPS_CHECK(x.device() == like->tensor.device(), name, " must be on x's device");
    TEMPOPS_CHECK(x.dim() == like->rank, name, " must have x's rank");
  }
  const bool channels_last = like ? like->channels_last : is_channels_last(x);
  const bool as_is = detail::readable(x, channels_last);
  return detail::view(as_is ? x : torch::stable::contiguous(x, memory_format(x.dim(), channels_last)), T,
                      channels_last);
}

// Reads a tensor that must have exactly the shape of `like`, in the layout of `like`.
inline Clip clips_like(const Tensor& x, const Clip& like, const char* name) {
  const Clip clip = clips(x, like.rank == 4 ? Segments(like.T) : std::nullopt, name, &like);
  TEMPOPS_CHECK(clip.N == like.N && clip.T == like.T && clip.C == like.C && clip.H == like.H && clip.W == like.W, name,
                " has the wrong shape");
  return clip;
}

// An uninitialised tensor of clips in the layout, rank, dtype and device of `like`.
inline Clip empty_clips(const Clip& like, int64_t T, int64_t C, int64_t H, int64_t W) {
  const int64_t N = like.N, rank = like.rank;
  const detail::Numbers sizes = rank == 5 ? detail::Numbers{N, C, T, H, W} : detail::Numbers{N * T, C, H, W};
  const detail::Numbers strides = detail::dense_strides(sizes, rank, like.channels_last);
  return detail::view(detail::empty_strided(sizes, strides, rank, like.tensor), T, like.channels_last);
}

inline Clip empty_like(const Clip& like) {
  return empty_clips(like, like.T, like.C, like.H, like.W);
}

// An uninitialised contiguous tensor of any sizes, at most five, in the dtype and device of `like`.
template <class Sizes>
Tensor empty_contiguous(const Sizes& sizes, const Tensor& like) {
  detail::Numbers numbers{};
  std::copy(sizes.begin(), sizes.end(), numbers.begin());
  const int64_t rank = sizes.size();
  return detail::empty_strided(numbers, detail::dense_strides(numbers, rank, false), rank, like);
}

// What an op returns in place of a gradient that nobody asked for.
inline Tensor no_gradient(const Tensor& like) {
  return empty_contiguous(std::array<int64_t, 1>{0}, like);
}

// A small dense argument (weights, gates) of the given shape, in x's dtype and device.
inline Tensor dense_argument(const Tensor& arg, const Tensor& x, const char* name) {
  TEMPOPS_CHECK(arg.scalar_type() == x.scalar_type(), name, " must have x's dtype");
  TEMPOPS_CHECK(arg.device() == x.device(), name, " must be on x's device");
  return arg.is_contiguous() ? arg : torch::stable::contiguous(arg);
}

// Calls f with a null pointer of the element type, e.g. by_dtype(x.dtype, [&](auto* type) { using scalar = ...; }).
template <class F>
void by_dtype(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(static_cast<float*>(nullptr));
    case ScalarType::Double: return f(static_cast<double*>(nullptr));
    case ScalarType::Half: return f(static_cast<Half*>(nullptr));
    case ScalarType::BFloat16: return f(static_cast<BFloat16*>(nullptr));
    default: TEMPOPS_CHECK(false, "x must be float32, float16, bfloat16 or float64");
  }
}

}  // namespace tempops
