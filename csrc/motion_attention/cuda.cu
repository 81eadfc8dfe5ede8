// motion_attention on CUDA: one pass over memory.
#include "../cuda.h"
#include "arguments.h"

namespace tempops {
namespace {

// 2^x and 1 / x, each one instruction and off by a unit or two in the last place. exp2f and the division take several
// times as many, which 16-bit tensors have no time for.
__device__ inline float power_of_two(float x) {
#ifdef __CUDA_ARCH__
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x));
  return x;
#else
  return exp2f(x);
#endif
}
__device__ inline float inverse(float x) {
#ifdef __CUDA_ARCH__
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x));
  return x;
#else
  return 1.f / x;
#endif
}
__device__ inline double inverse(double x) {
  return 1. / x;
}

// e^-x, with x clamped so that neither it nor its inverse leaves the range; NaN stays NaN.
__device__ inline float exponential_of_minus(float x) {
  x = x < -87.f ? -87.f : x;
  return power_of_two(x * -1.44269504f);
}
__device__ inline double exponential_of_minus(double x) {
  return exp(x < -700. ? 700. : -x);
}

template <class scalar>
struct Sigmoid {
  using acc = acc_t<scalar>;
  acc value, slope;

  // With e = exp(-x): 1 / (1 + e) and its derivative e / (1 + e)^2, which loses no digits where the value is near 1.
  __device__ explicit Sigmoid(scalar x) {
    const acc e = exponential_of_minus(static_cast<acc>(x)), sum = acc(1) + e;
    value = inverse(sum);
    // Results in 16 bits do not show the last places.
    if constexpr (std::is_same_v<scalar, float>) value = fmaf(value, fmaf(-sum, value, 1.f), value);
    slope = e * value * value;
  }
};

// Calls f(n, t, run, i) wherever a thread has V elements. Clips that are `merged` are one run: looking for frames in
// them would take as many instructions as the op.
template <int V, bool merged, class F>
__device__ void at_each_place(const Frame& frame, const F& f) {
  if constexpr (merged) {
    const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V;
    if (i < frame.length) f(0, 0, 0, i);
  } else {
    const Place<V> at(frame);
    if (!at.inside) return;
    for (int64_t i = blockIdx.y; i < frame.N * frame.T; i += gridDim.y) {
      const int64_t n = quotient(i, frame.T);
      f(n, i - n * frame.T, at.run, at.i);
    }
  }
}

template <class scalar, int V, bool merged>
__global__ void __launch_bounds__(kThreads, 4)
    attention_kernel(Runs<scalar> y, Runs<const scalar> x, Runs<const scalar> forward, Runs<const scalar> backward,
                     Frame frame, acc_t<scalar> base) {
  using acc = acc_t<scalar>;
  at_each_place<V, merged>(frame, [&](int64_t n, int64_t t, int64_t run, int64_t i) {
    const auto source = Pack<scalar, V>::load(x.at(n, t, run, i));
    const auto ahead = Pack<scalar, V>::load(forward.at(n, t, run, i));
    const auto behind = Pack<scalar, V>::load(backward.at(n, t, run, i));
    Pack<scalar, V> out;
    for (int k = 0; k < V; ++k) {
      const Sigmoid<scalar> to_next(ahead.v[k]), to_previous(behind.v[k]);
      const acc sum = to_next.value + to_previous.value;
      out.v[k] = static_cast<scalar>(static_cast<acc>(source.v[k]) * (base + acc(0.5) * sum));
    }
    out.store(y.at(n, t, run, i));
  });
}

// Gradients that nobody asked for have no data.
template <class scalar, int V, bool merged>
__global__ void __launch_bounds__(kThreads, 3)
    attention_backward_kernel(Runs<scalar> dx, Runs<scalar> dforward, Runs<scalar> dbackward, Runs<const scalar> dy,
                              Runs<const scalar> x, Runs<const scalar> forward, Runs<const scalar> backward,
                              Frame frame, acc_t<scalar> base) {
  using acc = acc_t<scalar>;
  at_each_place<V, merged>(frame, [&](int64_t n, int64_t t, int64_t run, int64_t i) {
    const auto grad = Pack<scalar, V>::load(dy.at(n, t, run, i));
    const auto source = Pack<scalar, V>::load(x.at(n, t, run, i));
    const auto ahead = Pack<scalar, V>::load(forward.at(n, t, run, i));
    const auto behind = Pack<scalar, V>::load(backward.at(n, t, run, i));
    Pack<scalar, V> to_x, to_forward, to_backward;
    for (int k = 0; k < V; ++k) {
      const Sigmoid<scalar> to_next(ahead.v[k]), to_previous(behind.v[k]);
      const acc g = static_cast<acc>(grad.v[k]), half = acc(0.5) * g * static_cast<acc>(source.v[k]);
      to_x.v[k] = static_cast<scalar>(g * (base + acc(0.5) * (to_next.value + to_previous.value)));
      to_forward.v[k] = static_cast<scalar>(half * to_next.slope);
      to_backward.v[k] = static_cast<scalar>(half * to_previous.slope);
    }
    if (dx.data) to_x.store(dx.at(n, t, run, i));
    if (dforward.data) to_forward.store(dforward.at(n, t, run, i));
    if (dbackward.data) to_backward.store(dbackward.at(n, t, run, i));
  });
}

// Where all clips lie in memory as the first does, which is dense, they are one run each: their frames need not be a
// multiple of 16 bytes then. Not where that run has more elements than a frame may have. Returns whether it did.
template <size_t count>
bool merge(std::array<Clip, count>& clips) {
  const Clip& like = clips[0];
  if (like.N * like.T * like.C * like.P > 0xffffffff) return false;
  for (const Clip& x : clips)
    if ((x.sn != like.sn && x.N > 1) || (x.st != like.st && x.T > 1) || (x.sc != like.sc && x.C > 1) ||
        (x.sp != like.sp && x.P > 1))
      return false;
  for (Clip& x : clips) {
    x.P *= x.N * x.T * x.C;
    x.sc = x.P;
    x.sp = x.N = x.T = x.C = 1;
    x.channels_last = false;
  }
  return true;
}

// Calls f with the elements of an access and whether clips are merged, both as constants.
template <class scalar, class F>
void by_pass(int width, bool merged, const F& f) {
  by_width<scalar>(width, [&](auto V) { merged ? f(V, std::true_type()) : f(V, std::false_type()); });
}

Tensor motion_attention(const Tensor& x_, const Tensor& forward, const Tensor& backward, bool centered) {
  const DeviceGuard guard(x_);
  const Clip x = frames_of(x_), ahead = clips_like(forward, x, "forward"), behind = clips_like(backward, x, "backward");
  std::array<Clip, 4> all = {empty_like(x), x, ahead, behind};
  if (x.empty()) return all[0].tensor;
  const bool merged = merge(all);
  const Frame frame(all[0], all[1], all[2], all[3]);
  by_dtype(x.dtype, [&](auto* type) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    by_pass<scalar>(frame.width(all[0], all[1], all[2], all[3]), merged, [&](auto V, auto merged) {
      launch(guard, attention_kernel<scalar, V, merged>, {frame.blocks(V), frame.N * frame.T}, frame.of<scalar>(all[0]),
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
  const bool merged = merge(all);
  const Frame frame(all[0], all[1], all[2], all[3], all[4], all[5], all[6]);
  const int width = frame.width(all[0], all[1], all[2], all[3], all[4], all[5], all[6]);
  by_dtype(x.dtype, [&](auto* type) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    by_pass<scalar>(width, merged, [&](auto V, auto merged) {
      std::array<Runs<scalar>, 3> out = {frame.of<scalar>(all[0]), frame.of<scalar>(all[1]), frame.of<scalar>(all[2])};
      for (size_t i = 0; i < 3; ++i)
        if (!needed[i]) out[i].data = nullptr;
      launch(guard, attention_backward_kernel<scalar, V, merged>, {frame.blocks(V), frame.N * frame.T}, out[0], out[1],
             out[2], frame.of<const scalar>(all[3]), frame.of<const scalar>(all[4]), frame.of<const scalar>(all[5]),
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
