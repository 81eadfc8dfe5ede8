// temporal_conv on CUDA: y[t] = sum_k w_k * gate[t+k-R] * x[t+k-R], R = K/2.
//
// A thread has some elements and walks T with the K frames of the window in registers, so that each frame is read once.
// The backward reads dy and x once, writes dx, and adds up q_k = sum_p x[t] * dy[t+R-k] by block; a second kernel makes
// of these partial sums the gradients to weight and gate: dweight_k = sum_t gate[t] * q_k, dgate[t] = sum_k w_k * q_k.
#include <algorithm>

#include "../cuda.h"
#include "arguments.h"

namespace tempops {
namespace {

// weight [G, K] or [N, C, K] and gate [N*T, C], null for none.
template <class scalar>
struct Coefficients {
  const scalar *weight, *gate;
  int64_t K, T, C, group, per_clip;  // channels that share a kernel; per_clip is C where each clip has its own, else 0

  __device__ acc_t<scalar> tap(int64_t n, int64_t c, int64_t k) const {
    return static_cast<acc_t<scalar>>(weight[(n * per_clip + quotient(c, group)) * K + k]);
  }
  __device__ acc_t<scalar> gated(int64_t n, int64_t t, int64_t c) const {
    return static_cast<acc_t<scalar>>(gate[(n * T + t) * C + c]);
  }
};

// y = the convolution of x, or its transpose: taps reversed, the gate of the frame written in place of those read.
template <class scalar, int V, int K>
__global__ void __launch_bounds__(kThreads)
    conv_kernel(Runs<scalar> y, Runs<const scalar> x, Frame frame, Coefficients<scalar> w, bool transposed) {
  using acc = acc_t<scalar>;
  constexpr int R = K / 2;
  const Place<V> at(frame);
  if (!at.inside) return;
  int64_t c[V];
  for (int v = 0; v < V; ++v) c[v] = frame.channel(at.run, at.i + v);
  for (int64_t n = blockIdx.y; n < frame.N; n += gridDim.y) {
    acc taps[K][V], window[K][V];  // frame t + k - R is window[k]
    for (int k = 0; k < K; ++k)
      for (int v = 0; v < V; ++v) taps[k][v] = w.tap(n, c[v], transposed ? K - 1 - k : k);
    const auto read = [&](acc(&into)[V], int64_t t) {
      if (t >= frame.T) return;
      const Pack<scalar, V> values = Pack<scalar, V>::load(x.at(n, t, at.run, at.i));
      for (int v = 0; v < V; ++v) {
        into[v] = static_cast<acc>(values.v[v]);
        if (w.gate && !transposed) into[v] *= w.gated(n, t, c[v]);
      }
    };
    for (int k = R; k < K - 1; ++k) read(window[k], k - R);  // of t = 0, all but the last
#pragma unroll 1
    for (int64_t t = 0; t < frame.T; ++t) {
      read(window[K - 1], t + R);
      acc sum[V] = {};
      for (int k = 0; k < K; ++k) {
        if (t + k < R || t + k - R >= frame.T) continue;
        for (int v = 0; v < V; ++v) sum[v] += taps[k][v] * window[k][v];
      }
      Pack<scalar, V> out;
      for (int v = 0; v < V; ++v) {
        if (w.gate && transposed) sum[v] *= w.gated(n, t, c[v]);
        out.v[v] = static_cast<scalar>(sum[v]);
      }
      out.store(y.at(n, t, at.run, at.i));
      for (int k = 0; k + 1 < K; ++k)
        for (int v = 0; v < V; ++v) window[k][v] = window[k + 1][v];
    }
  }
}

// The same for any K: taps are read from the cache.
template <class scalar>
__global__ void __launch_bounds__(kThreads, 4)
    long_conv_kernel(Runs<scalar> y, Runs<const scalar> x, Frame frame, Coefficients<scalar> w, bool transposed) {
  using acc = acc_t<scalar>;
  const Place<1> at(frame);
  if (!at.inside) return;
  const int64_t c = frame.channel(at.run, at.i), R = w.K / 2;
  for (int64_t n = blockIdx.y; n < frame.N; n += gridDim.y) {
#pragma unroll 1
    for (int64_t t = 0; t < frame.T; ++t) {
      acc sum = 0;
#pragma unroll 1
      for (int64_t k = 0; k < w.K; ++k) {
        const int64_t s = t + k - R;
        if (s < 0 || s >= frame.T) continue;
        acc value = static_cast<acc>(*x.at(n, s, at.run, at.i));
        if (w.gate && !transposed) value *= w.gated(n, s, c);
        sum += w.tap(n, c, transposed ? w.K - 1 - k : k) * value;
      }
      if (w.gate && transposed) sum *= w.gated(n, t, c);
      *y.at(n, t, at.run, at.i) = static_cast<scalar>(sum);
    }
  }
}

template <class scalar>
void conv(const DeviceGuard& guard, const Clip& y, const Clip& x, const Coefficients<scalar>& w, bool transposed) {
  const Frame frame(x, y);
  const auto run = [&](auto kernel, int V) {
    launch(guard, kernel, {frame.blocks(V), x.N}, frame.of<scalar>(y), frame.of<const scalar>(x), frame, w, transposed);
  };
  by_width<scalar>(frame.width(x, y), [&](auto V) {
    if (w.K == 3)
      run(conv_kernel<scalar, V, 3>, V);
    else if (w.K == 5)  // eight elements with five taps are more than the registers hold
      run(conv_kernel<scalar, std::min<int>(V, 4), 5>, std::min<int>(V, 4));
    else
      run(long_conv_kernel<scalar>, 1);
  });
}

// How the backward cuts frames: a block has `channel_lanes` groups of V channels (channels_last) or single channels
// (planar), and `pixel_lanes` single pixels or groups of V. Neighbouring threads have neighbouring elements.
struct Cut {
  int64_t N, T, C, P;
  bool channels_last;
  int V;
  int64_t channel_lanes, pixel_lanes, channel_blocks, chunks;

  Cut(const Clip& x, int V_) : N(x.N), T(x.T), C(x.C), P(x.P), channels_last(x.channels_last), V(V_) {
    const auto lanes = [](int64_t n) {
      int64_t power = 1;
      while (power < n && power < kThreads) power *= 2;
      return power;
    };
    if (channels_last) {
      channel_lanes = lanes(C / V);
      pixel_lanes = kThreads / channel_lanes;
    } else {
      pixel_lanes = lanes(P / V);
      channel_lanes = kThreads / pixel_lanes;
    }
    channel_blocks = blocks_for(C, channel_lanes * (channels_last ? V : 1));
    chunks = blocks_for(P, pixel_lanes * (channels_last ? 1 : V));
  }
};

// Partial sums [slots, chunks, K, C] of q. A slot is a frame where there is a gate, a clip where each has its own
// kernel, and else what one row of the grid adds up.
enum class Slot { frame, clip, row };

// For taps first .. first + M - 1 of the kernel: partial sums, and dx where M is K and dx is wanted.
template <class scalar, int V, int M>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(Elements<scalar> dx, Elements<const scalar> dy, Elements<const scalar> x, Cut cut,
                    Coefficients<scalar> w, acc_t<scalar>* partial, Slot slot, int64_t first, bool with_dx) {
  using acc = acc_t<scalar>;
  __shared__ acc shared[kThreads];
  const int64_t block = quotient(blockIdx.x, cut.chunks), chunk = blockIdx.x - block * cut.chunks;
  const int channel_lanes = static_cast<int>(cut.channel_lanes), pixel_lanes = static_cast<int>(cut.pixel_lanes);
  const int thread = threadIdx.x;
  const int lane_c = cut.channels_last ? thread % channel_lanes : thread / pixel_lanes;
  const int lane_p = cut.channels_last ? thread / channel_lanes : thread % pixel_lanes;
  const int per_c = cut.channels_last ? V : 1, per_p = cut.channels_last ? 1 : V;
  const int64_t c = (block * channel_lanes + lane_c) * per_c, p = (chunk * pixel_lanes + lane_p) * per_p;
  const bool inside = c < cut.C && p < cut.P;
  const int64_t R = w.K / 2;
  const auto channel = [&](int v) { return cut.channels_last ? c + v : c; };

  // Adds q over the threads of each channel, in a fixed order, and writes what the block has.
  const auto write = [&](const acc(&q)[M][V], int64_t at) {
    for (int j = 0; j < M; ++j) {
      for (int v = 0; v < V; ++v) {
        if (v >= per_c) continue;
        acc own = q[j][v];
        if (!cut.channels_last)
          for (int u = 1; u < V; ++u) own += q[j][u];
        shared[thread] = own;
        __syncthreads();
        for (int half = pixel_lanes / 2; half > 0; half /= 2) {
          const int other = thread + half * (cut.channels_last ? channel_lanes : 1);
          if (lane_p < half) shared[thread] += shared[other];
          __syncthreads();
        }
        if (lane_p == 0 && c < cut.C)
          partial[((at * cut.chunks + chunk) * w.K + first + j) * cut.C + channel(v)] = shared[thread];
        __syncthreads();
      }
    }
  };

  acc total[M][V] = {};
  for (int64_t n = blockIdx.y; n < cut.N; n += gridDim.y) {
    acc taps[M][V], window[M][V], q[M][V] = {};  // window[j] is dy of frame t + R - first - j
    for (int j = 0; j < M; ++j)
      for (int v = 0; v < V; ++v) taps[j][v] = inside ? w.tap(n, channel(v), first + j) : acc(0);
    const auto read = [&](acc(&into)[V], int64_t t) {
      if (!inside || t < 0 || t >= cut.T) return;
      const Pack<scalar, V> values = Pack<scalar, V>::load(dy.at(n, t, c, p));
      for (int v = 0; v < V; ++v) into[v] = static_cast<acc>(values.v[v]);
    };
    for (int j = 1; j < M; ++j) read(window[j - 1], R - first - j);
#pragma unroll 1
    for (int64_t t = 0; t < cut.T; ++t) {
      for (int j = M - 1; j > 0; --j)
        for (int v = 0; v < V; ++v) window[j][v] = window[j - 1][v];
      read(window[0], t + R - first);
      if (inside) {
        const Pack<scalar, V> here = Pack<scalar, V>::load(x.at(n, t, c, p));
        acc sum[V] = {};
        for (int j = 0; j < M; ++j) {
          const int64_t s = t + R - first - j;
          if (s < 0 || s >= cut.T) continue;
          for (int v = 0; v < V; ++v) {
            sum[v] += taps[j][v] * window[j][v];
            q[j][v] += static_cast<acc>(here.v[v]) * window[j][v];
          }
        }
        if (with_dx) {
          Pack<scalar, V> out;
          for (int v = 0; v < V; ++v)
            out.v[v] = static_cast<scalar>(w.gate ? sum[v] * w.gated(n, t, channel(v)) : sum[v]);
          out.store(dx.at(n, t, c, p));
        }
      }
      if (slot == Slot::frame) {
        write(q, n * cut.T + t);
        for (int j = 0; j < M; ++j)
          for (int v = 0; v < V; ++v) q[j][v] = 0;
      }
    }
    if (slot == Slot::clip) write(q, n);
    if (slot == Slot::row)
      for (int j = 0; j < M; ++j)
        for (int v = 0; v < V; ++v) total[j][v] += q[j][v];
  }
  if (slot == Slot::row) write(total, blockIdx.y);
}

// dweight, of `kernels` times K elements: a warp adds up each one, the lanes in a fixed order.
template <class scalar>
__global__ void __launch_bounds__(kThreads)
    weight_kernel(scalar* dweight, const acc_t<scalar>* partial, Coefficients<scalar> w, int64_t kernels, int64_t slots,
                  int64_t chunks, Slot slot) {
  const int64_t element = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int64_t i = quotient(element, w.K), k = element - i * w.K;
  double sum = 0;
  if (i < kernels) {
    // Of kernel i: its slots, and its channels.
    const int64_t clip = w.per_clip ? quotient(i, w.C) : 0, c0 = w.per_clip ? i - clip * w.C : i * w.group;
    const int64_t of_clip = slot == Slot::frame ? w.T : 1;
    const int64_t first = w.per_clip ? clip * of_clip : 0, count = w.per_clip ? of_clip : slots;
    for (int64_t term = lane; term < count * chunks * w.group; term += kWarp) {
      const int64_t part = quotient(term, w.group), c = c0 + term - part * w.group;
      const int64_t s = first + quotient(part, chunks), chunk = part - quotient(part, chunks) * chunks;
      double value = partial[((s * chunks + chunk) * w.K + k) * w.C + c];
      if (slot == Slot::frame) value *= static_cast<double>(static_cast<acc_t<scalar>>(w.gate[s * w.C + c]));
      sum += value;
    }
  }
  for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  if (i < kernels && lane == 0) dweight[element] = static_cast<scalar>(static_cast<acc_t<scalar>>(sum));
}

// dgate [N*T, C].
template <class scalar>
__global__ void __launch_bounds__(kThreads)
    gate_kernel(scalar* dgate, const acc_t<scalar>* partial, Coefficients<scalar> w, int64_t count, int64_t chunks) {
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (element >= count) return;
  const int64_t frame = quotient(element, w.C), c = element - frame * w.C, n = quotient(frame, w.T);
  double sum = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t k = 0; k < w.K; ++k)
      sum += static_cast<double>(partial[((frame * chunks + chunk) * w.K + k) * w.C + c]) * w.tap(n, c, k);
  dgate[element] = static_cast<scalar>(static_cast<acc_t<scalar>>(sum));
}

template <class scalar>
Coefficients<scalar> coefficients(const Clip& x, const Arguments& args) {
  const bool per_clip = args.weight.dim() == 3;
  return {static_cast<const scalar*>(args.weight.data_ptr()),
          args.gated ? static_cast<const scalar*>(args.gate.data_ptr()) : nullptr,
          args.weight.size(args.weight.dim() - 1),
          x.T,
          x.C,
          per_clip ? 1 : std::max<int64_t>(1, x.C / args.weight.size(0)),
          per_clip ? x.C : 0};
}

Tensor temporal_conv(const Tensor& x_, const Tensor& weight, Segments n_segment, const std::optional<Tensor>& gate) {
  const DeviceGuard guard(x_);
  const Clip x = clips(x_, n_segment);
  const Arguments args = check_arguments(x, weight, gate);
  const Clip y = empty_like(x);
  if (y.empty()) return y.tensor;
  by_dtype(x.dtype, [&](auto* type) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    conv(guard, y, x, coefficients<scalar>(x, args), false);
  });
  return y.tensor;
}

// The elements of one access in the backward: 16 bytes, but four at most, which leaves the sums in registers.
template <class scalar>
constexpr int kBackwardWidth = sizeof(scalar) == 8 ? 2 : 4;

// Fills dweight and dgate (null for neither), and dx where it is given.
template <class scalar>
void backward(const DeviceGuard& guard, const Clip* dx, const Tensor* dweight, const Tensor* dgate, const Clip& dy,
              const Clip& x, const Coefficients<scalar>& w) {
  constexpr int kWide = kBackwardWidth<scalar>;
  const auto wide = [](const Clip& clip) { return whole_packs(clip, kWide, clip.P); };
  const bool by_one = !(wide(dy) && wide(x) && (!dx || wide(*dx)));
  const Cut cut(x, by_one ? 1 : kWide);
  const Slot slot = w.gate ? Slot::frame : w.per_clip ? Slot::clip : Slot::row;
  // Rows of the grid: enough blocks to fill a GPU, and no more sums than that.
  const int64_t blocks = cut.channel_blocks * cut.chunks;
  const int64_t rows =
      slot == Slot::row ? std::min<int64_t>(x.N, blocks_for(2048, blocks)) : std::min<int64_t>(x.N, 65535);
  const int64_t slots = slot == Slot::frame ? x.N * x.T : slot == Slot::clip ? x.N : rows;
  using acc = acc_t<scalar>;
  const Tensor partial = torch::stable::new_empty(x.tensor, std::array<int64_t, 1>{slots * cut.chunks * w.K * x.C},
                                                  sizeof(acc) == 8 ? ScalarType::Double : ScalarType::Float);
  acc* sums = static_cast<acc*>(partial.data_ptr());
  const bool fast = w.K == 3 || w.K == 5;
  const auto run = [&](auto kernel, int64_t first) {
    launch(guard, kernel, {blocks, rows}, Elements<scalar>(dx ? *dx : x), Elements<const scalar>(dy),
           Elements<const scalar>(x), cut, w, sums, slot, first, fast && dx);
  };
  if (w.K == 3) {
    by_one ? run(backward_kernel<scalar, 1, 3>, 0) : run(backward_kernel<scalar, kWide, 3>, 0);
  } else if (w.K == 5) {
    by_one ? run(backward_kernel<scalar, 1, 5>, 0) : run(backward_kernel<scalar, kWide, 5>, 0);
  } else {
    for (int64_t k = 0; k < w.K; ++k)
      by_one ? run(backward_kernel<scalar, 1, 1>, k) : run(backward_kernel<scalar, kWide, 1>, k);
    if (dx) conv(guard, *dx, dy, w, true);
  }
  if (dweight) {
    const int64_t kernels = dweight->numel() / w.K;
    launch(guard, weight_kernel<scalar>, {blocks_for(dweight->numel() * kWarp)},
           static_cast<scalar*>(dweight->data_ptr()), sums, w, kernels, slots, cut.chunks, slot);
  }
  if (dgate)
    launch(guard, gate_kernel<scalar>, {blocks_for(dgate->numel())}, static_cast<scalar*>(dgate->data_ptr()), sums, w,
           dgate->numel(), cut.chunks);
}

std::tuple<Tensor, Tensor, Tensor> temporal_conv_backward(const Tensor& grad, const Tensor& x_, const Tensor& weight,
                                                          Segments n_segment, const std::optional<Tensor>& gate,
                                                          bool need_x, bool need_weight, bool need_gate) {
  const DeviceGuard guard(x_);
  const Clip x = clips(x_, n_segment);
  const Arguments args = check_arguments(x, weight, gate);
  const Clip dy = clips_like(grad, x, "grad");
  TEMPOPS_CHECK(args.gated || !need_gate, "gate is None, so it has no gradient");
  const Clip dx = need_x ? empty_like(x) : x;
  Tensor dweight = need_weight ? torch::stable::new_empty(args.weight, args.weight.sizes()) : no_gradient(weight);
  Tensor dgate = need_gate ? torch::stable::new_empty(args.gate, args.gate.sizes()) : no_gradient(weight);
  if (x.empty()) {
    torch::stable::zero_(dweight);
    torch::stable::zero_(dgate);
  } else {
    by_dtype(x.dtype, [&](auto* type) {
      using scalar = std::remove_pointer_t<decltype(type)>;
      const Coefficients<scalar> w = coefficients<scalar>(x, args);
      if (need_weight || need_gate)
        backward(guard, need_x ? &dx : nullptr, need_weight ? &dweight : nullptr, need_gate ? &dgate : nullptr, dy, x,
                 w);
      else if (need_x)
        conv(guard, dx, dy, w, true);
    });
  }
  return {need_x ? dx.tensor : no_gradient(x.tensor), dweight, dgate};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tempops, CUDA, m) {
  m.impl("temporal_conv", TORCH_BOX(&temporal_conv));
  m.impl("temporal_conv_backward", TORCH_BOX(&temporal_conv_backward));
}

}  // namespace tempops
