// Stands in for CUDA's header, so that a C++ compiler builds the kernels and this processor runs them, thread by
// thread.
//
// The threads of a block are fibers of one thread: each runs until it waits or ends, then the next one does. Where all
// that a barrier or a shuffle waits for have come, they go on. AddressSanitizer sees a bad index, UBSan a misaligned
// access; ThreadSanitizer takes fibers for threads and barriers for the only order among them, so that it sees a
// missing __syncthreads. What this cannot show: warps in lockstep, caches, the order of blocks (they run one after the
// other, so races between blocks pass), registers, occupancy, speed, and how tensor cores round (mma.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

void __syncthreads();

namespace cuda_sim {
void run(dim3 grid, dim3 block, const std::function<void()>& kernel);
// What lane `from` of this warp passed at the same call.
uint64_t exchange(uint64_t bits, int from);
int lane();

template <class T>
T shuffle(T value, int from) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = exchange(bits, from);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace cuda_sim

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_sim::shuffle(value, cuda_sim::lane() ^ mask);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int delta) {
  const int from = cuda_sim::lane() + delta;
  return cuda_sim::shuffle(value, from < 32 ? from : cuda_sim::lane());
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  cuda_sim::run(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = -1;  // the index of the CPU device
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}
