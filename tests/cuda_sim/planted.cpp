// A kernel with a fault on request: what the simulator has to find, or to pass.
#include <cuda_runtime.h>

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
}
