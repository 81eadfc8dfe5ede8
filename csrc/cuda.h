// What the CUDA kernels share: launching, wide loads, where a thread's elements are.
//
// A .cu file holds kernels and launchers, and no <<<>>>: `launch` goes through the runtime's C++ interface, so that a
// plain C++ compiler can read the same source (tests/cuda_sim).
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include <cstring>

#include "common.h"

namespace tempops {

constexpr int kThreads = 256;  // of a block
constexpr int kWarp = 32;
constexpr int kWidestBytes = 16;  // of one load or store

// Makes the device of x current, and afterwards the one that was.
class DeviceGuard {
  int before_ = 0;
  int device_;

 public:
  explicit DeviceGuard(const Tensor& x) : device_(x.get_device_index()) {
    STD_CUDA_CHECK(cudaGetDevice(&before_));
    if (device_ != before_) STD_CUDA_CHECK(cudaSetDevice(device_));
  }
  ~DeviceGuard() {
    if (device_ != before_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  int device() const {
    return device_;
  }
};

struct Grid {
  int64_t x, y = 1;             // blocks; kernels loop over y, so that it may be cut to what a grid can have
  unsigned threads = kThreads;  // of a block
  size_t shared = 0;            // bytes of dynamic_memory
};

// The shared memory that the launch gave the block.
__device__ inline char* dynamic_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(128) char memory[];
  return memory;
#else
  return cuda_sim::dynamic_memory();
#endif
}

inline int64_t blocks_for(int64_t items, int64_t of_block = kThreads) {
  return (items + of_block - 1) / of_block;
}

// Runs a kernel on the current stream of the device; nothing where there is nothing to do.
template <class... Parameters, class... Arguments>
void launch(const DeviceGuard& guard, void (*kernel)(Parameters...), Grid grid, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0) return;
  TEMPOPS_CHECK(grid.x <= 0x7fffffff, "tensor too large: ", grid.x, " blocks");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(guard.device(), &stream));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y < 65535 ? grid.y : 65535));
  config.blockDim = dim3(grid.threads);
  config.stream = static_cast<cudaStream_t>(stream);
  config.dynamicSmemBytes = grid.shared;
  if (grid.shared > 48 * 1024)  // what a kernel may have without asking
    STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared)));
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

// The type in which a dtype is added up: float64 for float64, else float32.
template <class scalar>
using acc_t = std::conditional_t<std::is_same_v<scalar, double>, double, float>;

// What one instruction loads or stores, by its bytes.
template <size_t bytes>
using word_t =
    std::conditional_t<bytes == 16, uint4,
                       std::conditional_t<bytes == 8, uint2, std::conditional_t<bytes == 4, uint32_t, uint16_t>>>;

// *to = word in one instruction; nvcc 13.0 splits wide stores in loops when left to itself.
template <class word>
__device__ void store_word(word* to, word bits) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(word) == 16)
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(bits.x), "r"(bits.y), "r"(bits.z),
                 "r"(bits.w)
                 : "memory");
  else if constexpr (sizeof(word) == 8)
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(bits.x), "r"(bits.y) : "memory");
  else
#endif
    *to = bits;
}

// Makes of v a value that the compiler keeps in a register; it would compute it again in each round of a loop.
template <class number>
__device__ void keep(number& v) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(number) == 8)
    asm volatile("" : "+l"(v));
  else
    asm volatile("" : "+r"(v));
#endif
}

// V adjacent elements of global memory: one load, one store.
template <class scalar, int V>
struct alignas(sizeof(scalar) * V) Pack {
  scalar v[V];
  using word = word_t<sizeof(scalar) * V>;
  static_assert(sizeof(word) == sizeof(scalar) * V);

  __device__ static Pack load(const scalar* from) {
    const word bits = *reinterpret_cast<const word*>(from);
    Pack pack;
    memcpy(&pack, &bits, sizeof(word));
    return pack;
  }
  __device__ void store(scalar* to) const {
    word bits;
    memcpy(&bits, this, sizeof(word));
    store_word(reinterpret_cast<word*>(to), bits);
  }
};

// Quotient of two numbers below 2^32: what is divided is always a position in one frame, or a number of frames. In 64
// bits it would be a function call, and the registers around it spilled.
__device__ inline int64_t quotient(int64_t a, int64_t b) {
  return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

// Frame t of clip n, and the next ones.
struct FrameAt {
  int n, t;

  __device__ FrameAt(int64_t frame, int T)
      : n(static_cast<int>(quotient(frame, T))), t(static_cast<int>(frame) - n * T) {}
  __device__ void advance(int T) {
    if (++t == T) {
      t = 0;
      ++n;
    }
  }
};

// Whether accesses of V elements may be used in a tensor: it begins at a multiple of them, and frames, runs (`pitch`
// apart) and what is in a run (`length` elements) are multiples too.
inline bool whole_packs(const Clip& x, int64_t V, int64_t pitch, int64_t length) {
  const auto whole = [&](int64_t elements) { return elements % V == 0; };
  return reinterpret_cast<uintptr_t>(x.address) % (V * x.tensor.element_size()) == 0 && (x.N <= 1 || whole(x.sn)) &&
         (x.T <= 1 || whole(x.st)) && whole(pitch) && whole(length);
}
// The same for runs along the layout: a channel's `length` adjacent pixels (planar), a pixel's channels
// (channels_last).
inline bool whole_packs(const Clip& x, int64_t V, int64_t length) {
  return whole_packs(x, V, x.channels_last ? x.sp : x.sc, x.channels_last ? x.C : length);
}

// A tensor of clips by strides: element (n, t, c, p); `row` is from a row of pixels to the next.
template <class scalar>
struct Elements {
  scalar* data;
  int64_t sn, st, sc, sp, row;

  explicit Elements(const Clip& x)
      : data(x.data<std::remove_const_t<scalar>>()), sn(x.sn), st(x.st), sc(x.sc), sp(x.sp), row(x.W * x.sp) {}

  __device__ scalar* at(int64_t n, int64_t t, int64_t c, int64_t p) const {
    return data + n * sn + t * st + c * sc + p * sp;
  }
};

// A tensor of clips as a kernel reads and writes it: run r of frame t of clip n begins at data + n*sn + t*st + r*pitch.
template <class scalar>
struct Runs {
  scalar* data;
  int64_t sn, st, pitch;

  __device__ scalar* at(int64_t n, int64_t t, int64_t run, int64_t i) const {
    return data + n * sn + t * st + run * pitch + i;
  }
};

// How the frames of some tensors of one shape are cut: `runs` runs of `length` adjacent elements each. A frame that is
// one run of memory in all tensors is one run, else a run is a channel's pixels (planar) or a pixel's channels
// (channels_last).
struct Frame {
  int64_t N, T, C, P, runs, length;
  bool channels_last;

  template <class... Clips>
  explicit Frame(const Clip& x, const Clips&... others)
      : N(x.N), T(x.T), C(x.C), P(x.P), channels_last(x.channels_last) {
    const bool dense = (x.dense_frames() && ... && others.dense_frames());
    runs = dense ? 1 : channels_last ? P : C;
    length = dense ? C * P : channels_last ? C : P;
    TEMPOPS_CHECK(C * P <= 0xffffffff && N * T <= 0x7fffffff,
                  "frames of more than 2^32 elements, or more than 2^31 of them, are not supported");
  }

  template <class scalar>
  Runs<scalar> of(const Clip& x) const {
    return {x.data<std::remove_const_t<scalar>>(), x.sn, x.st, runs == 1 ? 0 : channels_last ? x.sp : x.sc};
  }
  // The channel of element i of a run.
  __device__ int64_t channel(int64_t run, int64_t i) const {
    if (channels_last) return runs == 1 ? i - quotient(i, C) * C : i;
    return runs == 1 ? quotient(i, P) : run;
  }

  // The channels of elements i, i + 1, ... of a run.
  template <int V>
  __device__ void channels(int64_t run, int64_t i, uint32_t (&c)[V]) const {
    c[0] = static_cast<uint32_t>(channel(run, i));
    const uint32_t count = static_cast<uint32_t>(C), pixels = static_cast<uint32_t>(P);
    uint32_t pixel = static_cast<uint32_t>(runs == 1 ? i - c[0] * P : i);  // planar
    for (int v = 1; v < V; ++v) {
      if (channels_last) {
        c[v] = c[v - 1] + 1 == count ? 0 : c[v - 1] + 1;
      } else {
        pixel = pixel + 1 == pixels ? 0 : pixel + 1;
        c[v] = c[v - 1] + (pixel == 0);
      }
    }
  }

  // How many elements one access may have: as many as fit 16 bytes where every run of every tensor begins at a multiple
  // of that and has a multiple of that, else one.
  template <class... Clips>
  int width(const Clips&... clips) const {
    const Clip* first[] = {&clips...};
    const int V = kWidestBytes / first[0]->tensor.element_size();
    const auto pitch = [&](const Clip& x) { return runs == 1 ? 0 : channels_last ? x.sp : x.sc; };
    return (whole_packs(clips, V, pitch(clips), length) && ...) ? V : 1;
  }
  // Blocks of threads that each take V elements of a frame.
  int64_t blocks(int V) const {
    return blocks_for(runs * (length / V));
  }
};

// The V elements of a frame that a thread has.
template <int V>
struct Place {
  int64_t run, i;
  bool inside;

  __device__ explicit Place(const Frame& frame) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, packs = frame.length / V;
    run = frame.runs == 1 ? 0 : quotient(at, packs);
    i = (at - run * packs) * V;
    inside = at < frame.runs * packs;
  }
};

// Calls f with the width as a constant: 1, or 16 bytes of the scalar.
template <class scalar, class F>
void by_width(int width, const F& f) {
  constexpr int kWide = kWidestBytes / sizeof(scalar);
  width == 1 ? f(std::integral_constant<int, 1>()) : f(std::integral_constant<int, kWide>());
}

}  // namespace tempops
