// temporal_shift on CUDA: only memory moves, so every dtype is moved as unsigned integers of its size.
#include "../cuda.h"
#include "shifted.h"

namespace tempops {
namespace {

// The groups of channels of a thread's V elements: 0 and 1 move, 2 stays. Nearly always all are of one.
template <int V>
struct Groups {
  int of[V];
  bool together;

  __device__ Groups(const Frame& frame, const Shift& shift, const Place<V>& at) {
    uint32_t c[V];
    frame.channels(at.run, at.i, c);
    const uint32_t fold = static_cast<uint32_t>(shift.fold);
    for (int v = 0; v < V; ++v) of[v] = c[v] < fold ? 0 : c[v] - fold < fold ? 1 : 2;
    // From one pixel to the next one (channels_last) the channels begin again.
    together = of[0] == of[V - 1] && (!frame.channels_last || c[V - 1] - c[0] == V - 1);
  }
};

__device__ int offset_of(const Shift& shift, int group) {
  return static_cast<int>(group == 0 ? shift.first : group == 1 ? shift.second : 0);
}

constexpr int kFrames = 4;  // that a thread reads before it writes the first

template <class word, int V>
__global__ void __launch_bounds__(kThreads) shift_kernel(Runs<word> y, Runs<const word> x, Frame frame, Shift shift) {
  const Place<V> at(frame);
  if (!at.inside) return;
  const word* from = x.at(0, 0, at.run, at.i);
  word* to = y.at(0, 0, at.run, at.i);

  const Groups<V> groups(frame, shift, at);
  const int N = static_cast<int>(frame.N), T = static_cast<int>(frame.T);
  const int64_t frames = frame.N * frame.T, step = static_cast<int64_t>(gridDim.y) * kFrames;
  for (int64_t f = static_cast<int64_t>(blockIdx.y) * kFrames; f < frames; f += step) {
    Pack<word, V> out[kFrames]{};
    const auto read = [&](Pack<word, V>& into, FrameAt here, int group) {
      here.t += offset_of(shift, group);
      if (here.n < N && here.t >= 0 && here.t < T) into = Pack<word, V>::load(from + here.n * x.sn + here.t * x.st);
    };
    FrameAt here(f, T);
    if (groups.together) {
      for (int j = 0; j < kFrames; ++j, here.advance(T)) read(out[j], here, groups.of[0]);
    } else {
      for (int j = 0; j < kFrames; ++j, here.advance(T)) {
#pragma unroll 1
        for (int each = 0; each < 3; ++each) {
          Pack<word, V> values{};
          read(values, here, each);
          for (int v = 0; v < V; ++v)
            if (groups.of[v] == each) out[j].v[v] = values.v[v];
        }
      }
    }
    here = FrameAt(f, T);
    for (int j = 0; j < kFrames && here.n < N; ++j, here.advance(T)) out[j].store(to + here.n * y.sn + here.t * y.st);
  }
}

// In place, V elements of one clip that move by `offset`, 1 or -1: the walk through the frames reads each before it is
// written, and the next one before that.
template <int V, class word>
__device__ void move(word* x, int64_t stride, int64_t T, int offset) {
  const int64_t step = offset * stride;
  Pack<word, V> value{};
  if (offset < 0) x += (T - 1) * stride;
  if (T > 1) value = Pack<word, V>::load(x + step);
#pragma unroll 1
  for (int64_t left = T; left > 0; --left, x += step) {
    Pack<word, V> next{};
    if (left > 2) next = Pack<word, V>::load(x + 2 * step);
    value.store(x);
    value = next;
  }
}

template <class word, int V>
__global__ void __launch_bounds__(kThreads) shift_inplace_kernel(Runs<word> x, Frame frame, Shift shift) {
  const Place<V> at(frame);
  if (!at.inside) return;
  const Groups<V> groups(frame, shift, at);
  for (int64_t n = blockIdx.y; n < frame.N; n += gridDim.y) {
    word* const first = x.at(n, 0, at.run, at.i);
    if (groups.together) {
      if (const int offset = offset_of(shift, groups.of[0])) move<V>(first, x.st, frame.T, offset);
      continue;
    }
    for (int v = 0; v < V; ++v)
      if (const int offset = offset_of(shift, groups.of[v])) move<1>(first + v, x.st, frame.T, offset);
  }
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
  const DeviceGuard guard(x.tensor);
  const Clip y = empty_like(x);
  if (y.empty()) return y.tensor;
  const Frame frame(x, y);
  by_size(x, [&](auto* type) {
    using word = std::remove_pointer_t<decltype(type)>;
    by_width<word>(frame.width(x, y), [&](auto V) {
      launch(guard, shift_kernel<word, V>, {frame.blocks(V), blocks_for(x.N * x.T, kFrames)}, frame.of<word>(y),
             frame.of<const word>(x), frame, shift);
    });
  });
  return y.tensor;
}

void shift_in_place(const Clip& x, const Shift& shift) {
  if (x.empty()) return;
  const DeviceGuard guard(x.tensor);
  const Frame frame(x);
  by_size(x, [&](auto* type) {
    using word = std::remove_pointer_t<decltype(type)>;
    by_width<word>(frame.width(x), [&](auto V) {
      launch(guard, shift_inplace_kernel<word, V>, {frame.blocks(V), x.N}, frame.of<word>(x), frame, shift);
    });
  });
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

STABLE_TORCH_LIBRARY_IMPL(tempops, CUDA, m) {
  m.impl("temporal_shift", TORCH_BOX(&temporal_shift));
  m.impl("temporal_shift_backward", TORCH_BOX(&temporal_shift_backward));
  m.impl("temporal_shift_", TORCH_BOX(&temporal_shift_));
}

}  // namespace tempops
