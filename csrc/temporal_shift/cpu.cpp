// temporal_shift on the CPU: only memory moves, so every dtype is moved as unsigned integers of its size.
#include "shifted.h"

#include "../lanes.h"
#include "../stream.h"

namespace tempops {
namespace {

constexpr int64_t kBlock = 16384;  // bytes of a frame that are moved together: both writes of them meet in the cache

// dst = src, `count` elements that do not overlap; a null src is a frame outside the clip. Nothing is fetched ahead, in
// none of the loops here: the processor foresees copies itself, and was slower for the hints.
template <class word>
TEMPOPS_INLINE inline void move(word* __restrict dst, const word* __restrict src, int64_t count, bool streams = false) {
  if (!src) {
    std::memset(dst, 0, count * sizeof(word));
    return;
  }
  if (streams) return stream(dst, src, count * sizeof(word));
  each<64 / sizeof(word)>(count, [=](int64_t i) TEMPOPS_INLINE { dst[i] = src[i]; });
}

// The same for `rows` short rows, in steps of `step` elements; the last reaches back.
template <int64_t step, class word>
TEMPOPS_INLINE inline void move_rows(word* __restrict dst, int64_t dst_pitch, const word* __restrict src,
                                     int64_t src_pitch, int64_t rows, int64_t count) {
  for (int64_t r = 0; r < rows; ++r, dst += dst_pitch, src += src ? src_pitch : 0) {
    const auto one = [=](int64_t i) TEMPOPS_INLINE {
      src ? std::memcpy(dst + i, src + i, step * sizeof(word)) : std::memset(dst + i, 0, step * sizeof(word));
    };
    for (int64_t i = 0; i + step <= count; i += step) one(i);
    if (count % step) one(count - step);
  }
}

template <class word>
TEMPOPS_INLINE inline void move_rows(word* dst, int64_t dst_pitch, const word* src, int64_t src_pitch, int64_t rows,
                                     int64_t count) {
  constexpr int64_t most = 64 / sizeof(word);
  if (count >= most) return move_rows<most>(dst, dst_pitch, src, src_pitch, rows, count);
  if (count >= most / 2) return move_rows<most / 2>(dst, dst_pitch, src, src_pitch, rows, count);
  if (count >= most / 4) return move_rows<most / 4>(dst, dst_pitch, src, src_pitch, rows, count);
  move_rows<1>(dst, dst_pitch, src, src_pitch, rows, count);
}

template <class word>
const word* shifted_frame(const Clip& x, int64_t n, int64_t t) {
  return t >= 0 && t < x.T ? x.frame<word>(n, t) : nullptr;
}

// A frame's channels are rows of P pixels: adjacent rows of one group move together.
template <class word>
void shift_planar(const Clip& y, const Clip& x, const Shift& shift) {
  const auto parts = groups_of(shift, x.C);
  const bool past_caches = passes_caches({&x, &y});
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
          move(dst + c0 * y.sc, src ? src + c0 * x.sc : src, (c1 - c0) * x.P, past_caches);
        } else {
          for (int64_t c = c0; c < c1; ++c) move(dst + c * y.sc, src ? src + c * x.sc : src, x.P, past_caches);
        }
      }
      row += last - first;
    }
    if (past_caches) end_of_stream();
  });
}

// A block of pixels is walked through the clip, so that the few channels that come from the frames beside it are read
// from the cache. It is copied whole, then its first 2*fold channels are written again from their frames.
template <class word>
void shift_channels_last(const Clip& y, const Clip& x, const Shift& shift) {
  const int64_t block = std::clamp<int64_t>(kBlock / (x.C * sizeof(word)), 1, x.P);
  const int64_t blocks = (x.P + block - 1) / block;
  const auto parts = groups_of(shift, x.C);
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
          if (group.offset == 0) continue;
          const word* src = shifted_frame<word>(x, n, t + group.offset);
          if (src) src += p0 * x.sp + group.begin;
          move_rows(dst + group.begin, y.sp, src, x.sp, pixels, group.end - group.begin);
        }
      }
    }
  });
}

// In place, frames are walked so that each is read before it is written: of a block of rows, which are a pixel's moving
// channels or a moving channel's pixels. Nothing else is touched.
template <class word>
void shift_inplace(const Clip& x, const Shift& shift) {
  const int64_t moving = 2 * shift.fold;
  if (moving == 0) return;
  const auto parts = groups_of(shift, x.C);
  const int64_t rows = x.channels_last ? x.P : moving, pitch = x.channels_last ? x.sp : x.sc;
  const int64_t block = x.channels_last ? std::clamp<int64_t>(kBlock / (moving * sizeof(word)), 1, x.P) : 1;
  const int64_t blocks = (rows + block - 1) / block;
  parallel(x.N * blocks, x.T * block * (x.channels_last ? moving : x.P),
           [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / blocks, first = i % blocks * block, last = std::min(first + block, rows);
      for (const Group& group : {parts[0], parts[1]}) {
        if (group.offset == 0 || (!x.channels_last && (first < group.begin || first >= group.end))) continue;
        const int64_t at = first * pitch + (x.channels_last ? group.begin : 0);
        const int64_t count = x.channels_last ? group.end - group.begin : x.P;
        for (int64_t step = 0; step < x.T; ++step) {
          const int64_t t = group.offset > 0 ? step : x.T - 1 - step;
          const word* src = shifted_frame<word>(x, n, t + group.offset);
          move_rows(x.frame<word>(n, t) + at, pitch, src ? src + at : src, pitch, last - first, count);
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
