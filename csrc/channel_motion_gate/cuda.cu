// channel_motion_gate on CUDA. Everything is small: the products with the weights are cuBLAS's, and what lies between
// them, a chain of nine ops in PyTorch, is one kernel forward and two backward. A block has a row of a clip's mixing,
// [T, T], and keeps it in memory, so that a clip may have any number of frames.
#include "../cuda.h"
#include "gate.h"

namespace tempops {
namespace {

// a.b over R, by one warp; every lane gets it.
template <class acc>
__device__ acc dot(const acc* a, const acc* b, int64_t R) {
  acc sum = 0;
  for (int64_t r = threadIdx.x % kWarp; r < R; r += kWarp) sum += a[r] * b[r];
  for (int mask = kWarp / 2; mask; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  return sum;
}

// Row t of a clip's mixing, the softmax over j of -k_t.k_j. With it mixed_t = z_t + sum_j mixing_tj z_j; or, where the
// gradient dmixed is given, row t of the gradient of what the softmax is taken of.
template <class acc>
__global__ void __launch_bounds__(kThreads)
    row_kernel(acc* mixing, acc* out, const acc* dmixed, const acc* z, const acc* k, int64_t T, int64_t R) {
  constexpr int kWarps = kThreads / kWarp;
  const int64_t row = blockIdx.x, first = quotient(row, T) * T;
  const int warp = threadIdx.x / kWarp;
  const bool leads = threadIdx.x % kWarp == 0;
  acc* const mine = mixing + row * T;
  for (int64_t j = warp; j < T; j += kWarps) {
    const acc score = -dot(k + row * R, k + (first + j) * R, R);
    if (leads) mine[j] = score;
  }
  __syncthreads();
  acc largest = mine[0], sum = 0;
  for (int64_t j = 1; j < T; ++j) largest = mine[j] > largest || mine[j] != mine[j] ? mine[j] : largest;
  for (int64_t j = 0; j < T; ++j) sum += exp(mine[j] - largest);
  __syncthreads();
  for (int64_t j = threadIdx.x; j < T; j += kThreads) mine[j] = exp(mine[j] - largest) / sum;
  __syncthreads();
  if (!dmixed) {
    for (int64_t r = threadIdx.x; r < R; r += kThreads) {
      acc value = z[row * R + r];
      for (int64_t j = 0; j < T; ++j) value += mine[j] * z[(first + j) * R + r];
      out[row * R + r] = value;
    }
    return;
  }
  for (int64_t j = warp; j < T; j += kWarps) {
    const acc score = dot(dmixed + row * R, z + (first + j) * R, R);
    if (leads) out[row * T + j] = score;
  }
  __syncthreads();
  acc mean = 0;
  for (int64_t j = 0; j < T; ++j) mean += mine[j] * out[row * T + j];
  __syncthreads();
  for (int64_t j = threadIdx.x; j < T; j += kThreads) out[row * T + j] = mine[j] * (out[row * T + j] - mean);
}

// dz_t = dmixed_t + sum_j mixing_jt dmixed_j and dk_t = -sum_j (ds_tj + ds_jt) k_j.
template <class acc>
__global__ void __launch_bounds__(kThreads) column_kernel(acc* dz, acc* dk, const acc* dmixed, const acc* mixing,
                                                          const acc* ds, const acc* k, int64_t T, int64_t R) {
  const int64_t row = blockIdx.x, first = quotient(row, T) * T, t = row - first;
  for (int64_t r = threadIdx.x; r < R; r += kThreads) {
    acc through_z = dmixed[row * R + r], through_k = 0;
    for (int64_t j = 0; j < T; ++j) {
      through_z += mixing[(first + j) * T + t] * dmixed[(first + j) * R + r];
      through_k -= (ds[row * T + j] + ds[(first + j) * T + t]) * k[(first + j) * R + r];
    }
    dz[row * R + r] = through_z;
    dk[row * R + r] = through_k;
  }
}

template <class acc>
__global__ void __launch_bounds__(kThreads) add_kernel(acc* to, const acc* from, int64_t size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < size) to[i] += from[i];
}

template <class F>
void by_accumulator(const Tensor& x, const F& f) {
  x.scalar_type() == ScalarType::Double ? f(static_cast<double*>(nullptr)) : f(static_cast<float*>(nullptr));
}

template <class acc>
acc* data(const Tensor& x) {
  return static_cast<acc*>(x.data_ptr());
}

Tensor square(const Tensor& z, int64_t T) {
  return empty_contiguous(std::array<int64_t, 2>{z.size(0), T}, z);
}

}  // namespace

std::array<Tensor, 2> features(const Tensor& x, const Tensor& w1, const Tensor& w2) {
  return {linear(x, w1), linear(x, w2)};
}

Tensor gates(const Tensor& x, const Tensor& w) {
  return aten("aten::sigmoid_", "", linear(x, w));
}

void add(const Tensor& sum, const Tensor& more) {
  const DeviceGuard guard(sum);
  by_accumulator(sum, [&](auto* type) {
    using acc = std::remove_pointer_t<decltype(type)>;
    const int64_t size = sum.numel();
    launch(guard, add_kernel<acc>, {blocks_for(size)}, data<acc>(sum), data<acc>(more), size);
  });
}

Tensor mixed(const Tensor& z, const Tensor& k, int64_t T) {
  const DeviceGuard guard(z);
  const Tensor out = empty_contiguous(z.sizes(), z), mixing = square(z, T);
  by_accumulator(z, [&](auto* type) {
    using acc = std::remove_pointer_t<decltype(type)>;
    launch(guard, row_kernel<acc>, {z.size(0)}, data<acc>(mixing), data<acc>(out), nullptr, data<acc>(z), data<acc>(k),
           T, z.size(1));
  });
  return out;
}

std::array<Tensor, 2> mixed_backward(const Tensor& dmixed, const Tensor& z, const Tensor& k, int64_t T) {
  const DeviceGuard guard(z);
  const Tensor dz = empty_contiguous(z.sizes(), z), dk = empty_contiguous(z.sizes(), z);
  const Tensor mixing = square(z, T), ds = square(z, T);
  by_accumulator(z, [&](auto* type) {
    using acc = std::remove_pointer_t<decltype(type)>;
    launch(guard, row_kernel<acc>, {z.size(0)}, data<acc>(mixing), data<acc>(ds), data<acc>(dmixed), data<acc>(z),
           data<acc>(k), T, z.size(1));
    launch(guard, column_kernel<acc>, {z.size(0)}, data<acc>(dz), data<acc>(dk), data<acc>(dmixed), data<acc>(mixing),
           data<acc>(ds), data<acc>(k), T, z.size(1));
  });
  return {dz, dk};
}

STABLE_TORCH_LIBRARY_IMPL(tempops, CUDA, m) {
  m.impl("channel_motion_gate", TORCH_BOX(&channel_motion_gate));
  m.impl("channel_motion_gate_forward", TORCH_BOX(&channel_motion_gate_forward));
  m.impl("channel_motion_gate_backward", TORCH_BOX(&channel_motion_gate_backward));
}

}  // namespace tempops
