// temporal_shift on the CPU: only memory moves, so every dtype is moved as unsigned integers of its size.
#include "shifted.h"

#include "../lanes.h"

namespace tempops {
namespace {

struct Group {
  int64_t begin, end, offset;  // channels [begin, end) read frame t + offset
};

std::array<Group, 3> groups(const Shift& shift, int64_t C) {
  return {Group{0, shift.fold, shift.first}, Group{shift.fold, 2 * shift.fold, shift.second},
          Group{2 * shift.fold, C, 0}};
}

// dst = src, `count` elements that do not overlap; a null src is a frame outside the clip.
template <class word>
TEMPOPS_INLINE inline void move(word* __restrict dst, const word* __restrict src, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(word);
  if (!src) {
    std::memset(dst, 0, count * sizeof(word));
    return;
  }
  const auto fetch = [=](int64_t i) TEMPOPS_INLINE {
    fetch_to_read(src + i);
    fetch_to_write(dst + i);
  };
  each<kLine>(count, fetch, [=](int64_t i) TEMPOPS_INLINE { dst[i] = src[i]; });
}

// A pixel's few channels: a loop that vectorises beats a call.
template <class word>
TEMPOPS_INLINE inline void move_short(word* __restrict dst, const word* __restrict src, int64_t count) {
  if (src)
    for (int64_t c = 0; c < count; ++c) dst[c] = src[c];
  else
    for (int64_t c = 0; c < count; ++c) dst[c] = 0;
}

template <class word>
const word* shifted_frame(const Clip& x, int64_t n, int64_t t) {
  return t >= 0 && t < x.T ? x.frame<word>(n, t) : nullptr;
}

// A frame's channels are rows of P pixels: adjacent rows of one group move together.
template <class word>
void shift_planar(const Clip& y, const Clip& x, const Shift& shift) {
  const auto parts = groups(shift, x.C);
  parallel(x.N * x.T * x.C, x.P, [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    for (int64_t row = begin; row < end;) {
      const int64_t frame = row / x.C, n = frame / x.T, t = frame % x.T, first = row % x.C;
      const int64_t last = std::min(x.C, first + end - row);
      for (const Group& group : parts) {
        const int64_t c0 = std::max(first, group.begin), c1 = std::min(last, group.end);
        if (c0 >= c1) continue;
        const word* src = shifted_frame<word>(x, n, t + group.offset);
        word* dst = y.frame<word>(n, t);
        if (x.sc == x.P && y.sc == y.P) {
          move(dst + c0 * y.sc, src ? src + c0 * x.sc : src, (c1 - c0) * x.P);
        } else {
          for (int64_t c = c0; c < c1; ++c) move(dst + c * y.sc, src ? src + c * x.sc : src, x.P);
        }
      }
      row += last - first;
    }
  });
}

// A block of pixels is walked through the clip, so that the few channels that come from the frames beside it are read
// from the cache. It is copied whole, then its first 2*fold channels are written again from their frames.
template <class word>
void shift_channels_last(const Clip& y, const Clip& x, const Shift& shift) {
  constexpr int64_t kBlock = 16384;  // bytes: both writes of a block meet in the first-level cache
  const int64_t block = std::clamp<int64_t>(kBlock / (x.C * sizeof(word)), 1, x.P);
  const int64_t blocks = (x.P + block - 1) / block;
  const auto parts = groups(shift, x.C);
  const bool dense = x.sp == x.C && y.sp == y.C;
  parallel(x.N * blocks, x.T * block * x.C, [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / blocks, p0 = i % blocks * block, pixels = std::min(block, x.P - p0);
      for (int64_t t = 0; t < x.T; ++t) {
        word* dst = y.frame<word>(n, t) + p0 * y.sp;
        const word* here = x.frame<word>(n, t) + p0 * x.sp;
        if (dense) {
          move(dst, here, pixels * x.C);
        } else {
          for (int64_t p = 0; p < pixels; ++p) move(dst + p * y.sp, here + p * x.sp, x.C);
        }
        for (const Group& group : {parts[0], parts[1]}) {
          const word* src = shifted_frame<word>(x, n, t + group.offset);
          if (src) src += p0 * x.sp + group.begin;
          for (int64_t p = 0; p < pixels; ++p)
            move_short(dst + p * y.sp + group.begin, src ? src + p * x.sp : src, group.end - group.begin);
        }
      }
    }
  });
}

// In place, frames are walked so that each is read before it is written. An element is `sp` or `sc` apart from the next
// as the layout says; nothing but the moving channels is touched.
template <class word>
void shift_inplace(const Clip& x, const Shift& shift) {
  const int64_t moving = 2 * shift.fold;
  const auto parts = groups(shift, x.C);
  const int64_t rows = x.channels_last ? x.P : moving;
  parallel(x.N * rows, x.T * (x.channels_last ? moving : x.P), [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / rows, row = i % rows;
      for (const Group& group : {parts[0], parts[1]}) {
        if (group.offset == 0) continue;
        if (!x.channels_last && (row < group.begin || row >= group.end)) continue;
        const int64_t at = x.channels_last ? row * x.sp + group.begin : row * x.sc;
        const int64_t count = x.channels_last ? group.end - group.begin : x.P;
        for (int64_t step = 0; step < x.T; ++step) {
          const int64_t t = group.offset > 0 ? step : x.T - 1 - step;
          const word* src = shifted_frame<word>(x, n, t + group.offset);
          move_short(x.frame<word>(n, t) + at, src ? src + at : src, count);
        }
      }
    }
  });
}

template <class F>
void by_size(const Clip& x, const F& f) {
  switch (x.tensor.element_size()) {
    case 2: return f(static_cast<uint16_t*>(nullptr));
    case 4: return f(static_cast<uint32_t*>(nullptr));
    default: return f(static_cast<uint64_t*>(nullptr));
  }
}

}  // namespace

Tensor shifted(const Clip& x, const Shift& shift) {
  const Clip y = empty_like(x);
  by_size(x, [&](auto* type) {
    using word = std::remove_pointer_t<decltype(type)>;
    x.channels_last ? shift_channels_last<word>(y, x, shift) : shift_planar<word>(y, x, shift);
  });
  return y.tensor;
}

void shift_in_place(const Clip& x, const Shift& shift) {
  by_size(x, [&](auto* type) { shift_inplace<std::remove_pointer_t<decltype(type)>>(x, shift); });
}

namespace {

Tensor temporal_shift(const Tensor& x_, Segments n_segment, int64_t fold_div, const std::string& mode) {
  const Clip x = clips(x_, n_segment);
  return shifted(x, shift_of(x.C, fold_div, mode));
}

Tensor temporal_shift_backward(const Tensor& grad, Segments n_segment, int64_t fold_div, const std::string& mode) {
  const Clip dy = clips(grad, n_segment, "grad");
  return shifted(dy, shift_of(dy.C, fold_div, mode).transposed());
}

void temporal_shift_(const Tensor& x_, Segments n_segment, int64_t fold_div, const std::string& mode) {
  const Clip x = clips(x_, n_segment);
  check_apart(x_);
  shift_in_place(x, shift_of(x.C, fold_div, mode));
  if (x.tensor.get() != x_.get()) {  // x had to be copied to be read
    Tensor target = x_;
    torch::stable::copy_(target, x.tensor);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tempops, m) {
  m.def("temporal_shift(Tensor x, int? n_segment=None, int fold_div=8, str mode='bidirectional') -> Tensor");
  m.def("temporal_shift_backward(Tensor grad, int? n_segment, int fold_div, str mode) -> Tensor");
  // `shift_mode`, because torch.compile cannot functionalise an op with an argument named `mode`.
  m.def("temporal_shift_(Tensor(a!) x, int? n_segment=None, int fold_div=8, str shift_mode='bidirectional') -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tempops, CPU, m) {
  m.impl("temporal_shift", TORCH_BOX(&temporal_shift));
  m.impl("temporal_shift_backward", TORCH_BOX(&temporal_shift_backward));
  m.impl("temporal_shift_", TORCH_BOX(&temporal_shift_));
}

}  // namespace tempops
