// Stands in for CUDA's header, so that a C++ compiler builds the kernels and this processor runs them, thread by
// thread.
//
// The threads of a block are fibers of one thread: each runs until it waits or ends, then the next one does. Where all
// that a barrier or a shuffle waits for have come, they go on. AddressSanitizer sees a bad index, UBSan a misaligned
// access; ThreadSanitizer takes fibers for threads and barriers for the only order among them, so that it sees a
// missing __syncthreads; shuffles order nothing, and need the whole warp. What this cannot show: warps in lockstep,
// caches, the order of blocks (they run one after the other, so races between blocks pass), registers, occupancy,
// speed, and how tensor cores round.
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

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

void __syncthreads();
void __syncwarp();

namespace cuda_sim {
void run(dim3 grid, dim3 block, size_t dynamic_bytes, const std::function<void()>& kernel);
char* dynamic_memory();
// What lane `from` of this warp passed at the same call.
uint64_t exchange(uint64_t bits, int from);
// Ends the program where `address` is no multiple of `size`.
void check_aligned(const void* address, size_t size, const char* what);
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

// Tensor cores. ldmatrix.x4: lane 8*m + j has row j of matrix m, lane 4*i + j gets the j-th word of row i of each, or
// of column i with `transposed`.
void distribute(uint32_t (&to)[4], const uint16_t (&row)[8], bool transposed);
inline void load_matrices(uint32_t (&to)[4], const void* row, bool transposed) {
  check_aligned(row, 16, "a row of ldmatrix");
  uint16_t elements[8];
  __builtin_memcpy(elements, row, sizeof elements);
  distribute(to, elements, transposed);
}

// mma.m16n8k16, with float m16n8k8, in float32: the products are added up, and then to the sum. tf32 is not rounded.
template <class scalar>
void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
}  // namespace cuda_sim

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_sim::shuffle(value, cuda_sim::lane() ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const int from = cuda_sim::lane() - delta;
  return cuda_sim::shuffle(value, from >= 0 ? from : cuda_sim::lane());
}
template <class T>
T __shfl_down_sync(unsigned, T value, int delta) {
  const int from = cuda_sim::lane() + delta;
  return cuda_sim::shuffle(value, from < 32 ? from : cuda_sim::lane());
}

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
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
  cuda_sim::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
// Two multiprocessors, so that a block has several things to do where a kernel has as many blocks as fit; shared memory
// as in 9.0.
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount ? 2 : 227 * 1024;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = -1;  // the index of the CPU device
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}
