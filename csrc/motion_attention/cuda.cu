// motion_attention on CUDA: one pass over memory.
#include "../cuda.h"
#include "arguments.h"

namespace tempops {
namespace {

// e^-x, with x clamped so that it stays finite; NaN stays NaN. exp2f is a few instructions, expf several times as many,
// which 16-bit tensors have no time for.
__device__ inline float exponential_of_minus(float x) {
  x = x < -87.f ? -87.f : x;
  return exp2f(x * -1.44269504f);
}
__device__ inline double exponential_of_minus(double x) {
  return exp(x < -700. ? 700. : -x);
}

template <class acc>
struct Sigmoid {
  acc value, slope;

  // With e = exp(-x): 1 / (1 + e) and its derivative e / (1 + e)^2, which loses no digits where the value is near 1.
  __device__ explicit Sigmoid(acc x) {
    const acc e = exponential_of_minus(x);
    value = acc(1) / (acc(1) + e);
    slope = e * value * value;
  }
};

template <class scalar, int V>
__global__ void __launch_bounds__(kThreads)
    attention_kernel(Runs<scalar> y, Runs<const scalar> x, Runs<const scalar> forward, Runs<const scalar> backward,
                     Frame frame, acc_t<scalar> base) {
  using acc = acc_t<scalar>;
  const Place<V> at(frame);
  if (!at.inside) return;
  for (int64_t i = blockIdx.y; i < frame.N * frame.T; i += gridDim.y) {
    const int64_t n = quotient(i, frame.T), t = i - n * frame.T;
    const auto source = Pack<scalar, V>::load(x.at(n, t, at.run, at.i));
    const auto ahead = Pack<scalar, V>::load(forward.at(n, t, at.run, at.i));
    const auto behind = Pack<scalar, V>::load(backward.at(n, t, at.run, at.i));
    Pack<scalar, V> out;
    for (int k = 0; k < V; ++k) {
      const Sigmoid<acc> to_next(static_cast<acc>(ahead.v[k])), to_previous(static_cast<acc>(behind.v[k]));
      const acc sum = to_next.value + to_previous.value;
      out.v[k] = static_cast<scalar>(static_cast<acc>(source.v[k]) * (base + acc(0.5) * sum));
    }
    out.store(y.at(n, t, at.run, at.i));
  }
}

// Gradients that nobody asked for have no data. Three blocks a processor are enough; the compiler would spill registers
// to fit a fourth.
template <class scalar, int V>
__global__ void __launch_bounds__(kThreads, 3)
    attention_backward_kernel(Runs<scalar> dx, Runs<scalar> dforward, Runs<scalar> dbackward, Runs<const scalar> dy,
                              Runs<const scalar> x, Runs<const scalar> forward, Runs<const scalar> backward,
                              Frame frame, acc_t<scalar> base) {
  using acc = acc_t<scalar>;
  const Place<V> at(frame);
  if (!at.inside) return;
  for (int64_t i = blockIdx.y; i < frame.N * frame.T; i += gridDim.y) {
    const int64_t n = quotient(i, frame.T), t = i - n * frame.T;
    const auto grad = Pack<scalar, V>::load(dy.at(n, t, at.run, at.i));
    const auto source = Pack<scalar, V>::load(x.at(n, t, at.run, at.i));
    const auto ahead = Pack<scalar, V>::load(forward.at(n, t, at.run, at.i));
    const auto behind = Pack<scalar, V>::load(backward.at(n, t, at.run, at.i));
    Pack<scalar, V> to_x, to_forward, to_backward;
    for (int k = 0; k < V; ++k) {
      const Sigmoid<acc> to_next(static_cast<acc>(ahead.v[k])), to_previous(static_cast<acc>(behind.v[k]));
      const acc g = static_cast<acc>(grad.v[k]), half = acc(0.5) * g * static_cast<acc>(source.v[k]);
      to_x.v[k] = static_cast<scalar>(g * (base + acc(0.5) * (to_next.value + to_previous.value)));
      to_forward.v[k] = static_cast<scalar>(half * to_next.slope);
      to_backward.v[k] = static_cast<scalar>(half * to_previous.slope);
    }
    if (dx.data) to_x.store(dx.at(n, t, at.run, at.i));
    if (dforward.data) to_forward.store(dforward.at(n, t, at.run, at.i));
    if (dbackward.data) to_backward.store(dbackward.at(n, t, at.run, at.i));
  }
}

// Where all clips lie in memory as the first does, which is dense, they are one run each: their frames need not be a
// multiple of 16 bytes then. Not where that run has more elements than a frame may have.
template <size_t count>
void merge(std::array<Clip, count>& clips) {
  const Clip& like = clips[0];
  if (like.N * like.T * like.C * like.P > 0xffffffff) return;
  for (const Clip& x : clips)
    if ((x.sn != like.sn && x.N > 1) || (x.st != like.st && x.T > 1) || (x.sc != like.sc && x.C > 1) ||
        (x.sp != like.sp && x.P > 1))
      return;
  for (Clip& x : clips) {
    x.P *= x.N * x.T * x.C;
    x.sc = x.P;
    x.sp = x.N = x.T = x.C = 1;
    x.channels_last = false;
  }
}

Tensor motion_attention(const Tensor& x_, const Tensor& forward, const Tensor& backward, bool centered) {
  const DeviceGuard guard(x_);
  const Clip x = frames_of(x_), ahead = clips_like(forward, x, "forward"), behind = clips_like(backward, x, "backward");
  std::array<Clip, 4> all = {empty_like(x), x, ahead, behind};
  if (x.empty()) return all[0].tensor;
  merge(all);
  const Frame frame(all[0], all[1], all[2], all[3]);
  by_dtype(x.dtype, [&](auto* type) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    by_width<scalar>(frame.width(all[0], all[1], all[2], all[3]), [&](auto V) {
      launch(guard, attention_kernel<scalar, V>, {frame.blocks(V), frame.N * frame.T}, frame.of<scalar>(all[0]),
             frame.of<const scalar>(all[1]), frame.of<const scalar>(all[2]), frame.of<const scalar>(all[3]), frame,
             centered ? 0.5 : 1.);
    });
  });
  return all[0].tensor;
}

// All three gradients in one pass.
std::tuple<Tensor, Tensor, Tensor> motion_attention_backward(const Tensor& grad, const Tensor& x_,
                                                             const Tensor& forward, const Tensor& backward,
                                                             bool centered, bool need_x, bool need_forward,
                                                             bool need_backward) {
  const DeviceGuard guard(x_);
  const Clip x = frames_of(x_), ahead = clips_like(forward, x, "forward"), behind = clips_like(backward, x, "backward");
  const Clip dy = clips_like(grad, x, "grad");
  const std::array<bool, 3> needed = {need_x, need_forward, need_backward};
  std::array<Tensor, 3> result = {no_gradient(x.tensor), no_gradient(x.tensor), no_gradient(x.tensor)};
  if (!need_x && !need_forward && !need_backward) return {result[0], result[1], result[2]};
  const size_t some = need_x ? 0 : need_forward ? 1 : 2;  // stands in for those that are not needed
  std::array<Clip, 7> all = {x, x, x, dy, x, ahead, behind};
  all[some] = empty_like(x);
  for (size_t i = 0; i < 3; ++i) {
    all[i] = needed[i] && i != some ? empty_like(x) : all[some];
    if (needed[i]) result[i] = all[i].tensor;
  }
  if (x.empty()) return {result[0], result[1], result[2]};
  merge(all);
  const Frame frame(all[0], all[1], all[2], all[3], all[4], all[5], all[6]);
  by_dtype(x.dtype, [&](auto* type) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    by_width<scalar>(frame.width(all[0], all[1], all[2], all[3], all[4], all[5], all[6]), [&](auto V) {
      std::array<Runs<scalar>, 3> out = {frame.of<scalar>(all[0]), frame.of<scalar>(all[1]), frame.of<scalar>(all[2])};
      for (size_t i = 0; i < 3; ++i)
        if (!needed[i]) out[i].data = nullptr;
      launch(guard, attention_backward_kernel<scalar, V>, {frame.blocks(V), frame.N * frame.T}, out[0], out[1], out[2],
             frame.of<const scalar>(all[3]), frame.of<const scalar>(all[4]), frame.of<const scalar>(all[5]),
             frame.of<const scalar>(all[6]), frame, centered ? 0.5 : 1.);
    });
  });
  return {result[0], result[1], result[2]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tempops, CUDA, m) {
  m.impl("motion_attention", TORCH_BOX(&motion_attention));
  m.impl("motion_attention_backward", TORCH_BOX(&motion_attention_backward));
}

}  // namespace tempops
