// temporal_shift on CUDA: only memory moves, so every dtype is moved as unsigned integers of its size.
#include "../cuda.h"
#include "shifted.h"

namespace tempops {
namespace {

// Which frame channel c reads, as an offset.
__device__ int64_t offset_of(const Shift& shift, int64_t c) {
  return c < shift.fold ? shift.first : c < 2 * shift.fold ? shift.second : 0;
}

template <class word, int V>
__global__ void __launch_bounds__(kThreads) shift_kernel(Runs<word> y, Runs<const word> x, Frame frame, Shift shift) {
  const Place<V> at(frame);
  if (!at.inside) return;
  int64_t offset[V];
  bool together = true;
  for (int k = 0; k < V; ++k) {
    offset[k] = offset_of(shift, frame.channel(at.run, at.i + k));
    together = together && offset[k] == offset[0];
  }
  for (int64_t f = blockIdx.y; f < frame.N * frame.T; f += gridDim.y) {
    const int64_t n = quotient(f, frame.T), t = f - n * frame.T;
    Pack<word, V> out{};
    if (together) {
      const int64_t source = t + offset[0];
      if (source >= 0 && source < frame.T) out = Pack<word, V>::load(x.at(n, source, at.run, at.i));
    } else {
      for (int k = 0; k < V; ++k) {
        const int64_t source = t + offset[k];
        if (source >= 0 && source < frame.T) out.v[k] = *x.at(n, source, at.run, at.i + k);
      }
    }
    out.store(y.at(n, t, at.run, at.i));
  }
}

// In place: a thread walks its elements through the clip, so that each frame is read before it is written.
template <class word, int V>
__global__ void __launch_bounds__(kThreads) shift_inplace_kernel(Runs<word> x, Frame frame, Shift shift) {
  const Place<V> at(frame);
  if (!at.inside) return;
  for (int k = 0; k < V; ++k) {
    const int64_t offset = offset_of(shift, frame.channel(at.run, at.i + k));
    if (offset == 0) continue;
    for (int64_t n = blockIdx.y; n < frame.N; n += gridDim.y) {
      for (int64_t step = 0; step < frame.T; ++step) {
        const int64_t t = offset > 0 ? step : frame.T - 1 - step, source = t + offset;
        const bool there = source >= 0 && source < frame.T;
        *x.at(n, t, at.run, at.i + k) = there ? *x.at(n, source, at.run, at.i + k) : word(0);
      }
    }
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
      launch(guard, shift_kernel<word, V>, {frame.blocks(V), x.N * x.T}, frame.of<word>(y), frame.of<const word>(x),
             frame, shift);
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
    launch(guard, shift_inplace_kernel<word, 1>, {frame.blocks(1), x.N}, frame.of<word>(x), frame, shift);
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
