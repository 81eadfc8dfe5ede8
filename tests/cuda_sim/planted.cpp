// Kernels with a fault on request: what the simulator has to find, or to pass.
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <vector>

namespace {

constexpr int kThreads = 256;

__global__ void reverse(float* out, const float* in, bool first_barrier, bool second_barrier, int index_off_by,
                        int bytes_off_by) {
  __shared__ float shared[kThreads];
  const int block = blockIdx.x * kThreads;
  const char* from = reinterpret_cast<const char*>(in + block + threadIdx.x + index_off_by) + bytes_off_by;
  for (int round = 0; round < 2; ++round) {
    shared[threadIdx.x] = *reinterpret_cast<const float*>(from);
    if (first_barrier) __syncthreads();
    out[block + threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
    if (second_barrier) __syncthreads();
  }
}

__global__ void copy(float* out, const float* in, bool wait, int index_off_by) {
  alignas(16) __shared__ float shared[4 * kThreads];
  float* const mine = shared + 4 * threadIdx.x;
  __pipeline_memcpy_async(mine, in + 4 * threadIdx.x + index_off_by, 16);
  __pipeline_commit();
  if (wait) __pipeline_wait_prior(0);
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = mine[i];
}

// Each thread passes its neighbour a number through shared memory. The threads from `end` on are gone before.
__global__ void pass(float* out, bool barrier, unsigned end) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = 1;
  if (threadIdx.x >= end) return;
  if (barrier) __syncwarp();
  __shfl_xor_sync(0xffffffffu, 0, 1);  // no barrier
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
}

}  // namespace

int main(int, char** argv) {
  const auto asked = [&](const char* fault) { return std::strcmp(argv[1], fault) == 0; };
  std::vector<float> in(2 * kThreads + asked("misaligned")), out(2 * kThreads);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(2);
  config.blockDim = dim3(kThreads);
  const bool first_barrier = !asked("no first barrier"), second_barrier = !asked("no second barrier");
  const int index_off_by = asked("off by one"), bytes_off_by = asked("misaligned");
  cudaLaunchKernelEx(&config, reverse, out.data(), static_cast<const float*>(in.data()), first_barrier, second_barrier,
                     index_off_by, bytes_off_by);

  std::vector<float> source(4 * kThreads + 1, 1), copied(4 * kThreads);
  config.gridDim = dim3(1);
  cudaLaunchKernelEx(&config, copy, copied.data(), static_cast<const float*>(source.data()), !asked("no wait"),
                     static_cast<int>(asked("misaligned copy")));
  std::vector<float> passed(kThreads);
  cudaLaunchKernelEx(&config, pass, passed.data(), !asked("shuffle for a barrier"),
                     asked("part of a warp") ? kThreads - 1u : kThreads);
  for (float value : copied) {
    if (value == 1) continue;
    std::fputs("wrong result\n", stderr);
    return 1;
  }
}
