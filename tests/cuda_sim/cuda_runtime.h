// Stands in for CUDA's header, so that a C++ compiler builds the kernels and this processor runs them, thread by
// thread.
//
// The threads of a block are fibers of one thread: each runs until it waits or ends, then the next one does. Where all
// that a barrier or a shuffle waits for have come, they go on. AddressSanitizer sees a bad index, UBSan a misaligned
// access; ThreadSanitizer takes fibers for threads and barriers for the only order among them, so that it sees a
// missing __syncthreads. What this cannot show: warps in lockstep, caches, the order of blocks (they run one after the
// other, so races between blocks pass), registers, occupancy, speed, and how tensor cores round.
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
// Calls f once for a warp, with what each lane passed.
void together(void* mine, void (*f)(void* const* lanes));
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

// Tensor cores. ldmatrix.x4: lane 8*m + j has the address of row j of matrix m, lane 4*i + j gets the j-th word of row
// i of each, or of column i with `transposed`.
inline void load_matrices(uint32_t (&to)[4], const void* row, bool transposed) {
  check_aligned(row, 16, "a row of ldmatrix");
  struct Lane {
    uint32_t* to;
    const void* row;
    bool transposed;
  } mine{to, row, transposed};
  together(&mine, [](void* const* lanes) {
    const auto lane = [&](int i) { return static_cast<Lane*>(lanes[i]); };
    for (int m = 0; m < 4; ++m)
      for (int i = 0; i < 8; ++i)
        for (int j = 0; j < 8; ++j) {
          uint32_t& word = lane(4 * i + j / 2)->to[m];
          const int from = lane(0)->transposed ? j : i, at = lane(0)->transposed ? i : j;
          const uint32_t element = static_cast<const uint16_t*>(lane(8 * m + from)->row)[at];
          word = j % 2 ? word | element << 16 : element;
        }
  });
}

// mma.m16n8k16, with float m16n8k8, in float32: the products are added up, and then to the sum. tf32 is not rounded.
template <class scalar>
void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    float* sum;
    uint32_t a[4], b[2];
  } mine{sum, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  together(&mine, [](void* const* lanes) {
    constexpr int of_word = 4 / sizeof(scalar), half = 4 * of_word;
    const auto lane = [&](int i) { return static_cast<Lane*>(lanes[i]); };
    float left[16][2 * half], right[8][2 * half];
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 2 * half; ++k) {
        const Lane* const from = lane(i % 8 * 4 + k % half / of_word);
        scalar element[of_word];
        __builtin_memcpy(element, &from->a[k / half * 2 + i / 8], 4);
        left[i][k] = static_cast<float>(element[k % of_word]);
        if (i >= 8) continue;
        __builtin_memcpy(element, &from->b[k / half], 4);
        right[i][k] = static_cast<float>(element[k % of_word]);
      }
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 8; ++j) {
        float total = 0;
        for (int k = 0; k < 2 * half; ++k) total += left[i][k] * right[j][k];
        lane(i % 8 * 4 + j / 2)->sum[i / 8 * 2 + j % 2] += total;
      }
  });
}
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
