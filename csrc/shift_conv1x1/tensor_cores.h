// Tensor cores by the instructions that all GPUs since 8.0 have, which wmma gives up: through it bfloat16 and float32
// are loaded from shared memory one word at a time.
//
// A warp multiplies blocks of 16 lines by 32 bytes of the dimension that is summed.
#pragma once

#include "../cuda.h"

namespace tempops {

// A lane's part of a block, as four times 8 lines by 16 bytes: of each, lane 4*i + j has the j-th word of line i. A
// left factor is in the order of its lines, first 16 bytes of all, then the last; of a right one both halves of its
// first 8 lines come first.
struct alignas(16) Block {
  uint32_t words[4];

  // From shared memory. `along` says that the lines of the block are lines of memory, else those are along them.
  template <class scalar, bool left, bool along, int pitch>
  __device__ static Block load(const scalar* from) {
    // What lanes 8 * m on are to give the address of, or have a word of: the line and the place in it of matrix m.
    const auto line = [](int m) { return (left ? m % 2 : m / 2) * 8; };
    const auto at = [](int m) { return (left ? m / 2 : m % 2) * (16 / static_cast<int>(sizeof(scalar))); };
    const int lane = threadIdx.x % kWarp, m = lane / 8;
    Block block;
    if constexpr (along) {
      block.read<false>(from + (line(m) + lane % 8) * pitch + at(m));
    } else if constexpr (sizeof(scalar) == 2) {
      block.read<true>(from + (at(m) + lane % 8) * pitch + line(m));
    } else {
      for (int i = 0; i < 4; ++i)
        block.words[i] = *reinterpret_cast<const uint32_t*>(from + (at(i) + lane % 4) * pitch + line(i) + lane / 4);
    }
    return block;
  }

  // float32 as it comes from memory to the nearest number that tensor cores read, which leave the last 13 bits out.
  __device__ void round() {
#ifdef __CUDACC__
    for (uint32_t& word : words)
      asm("{.reg .pred finite; .reg .f32 size; abs.f32 size, %1; setp.lt.f32 finite, size, 0f7F800000;\n"
          "@finite add.u32 %0, %0, 0x1000;}"
          : "+r"(word)
          : "f"(__uint_as_float(word)));
#endif
  }

 private:
  // Lane 8*i + j has the address of 16 bytes, row j of matrix i; the lane gets a word of each, of the transpose with
  // `transposed`.
  template <bool transposed, class scalar>
  __device__ void read(const scalar* row) {
#ifdef __CUDACC__
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    if constexpr (transposed)
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                   : "r"(address)
                   : "memory");
    else
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                   : "r"(address)
                   : "memory");
#else
    cuda_sim::load_matrices(words, row, transposed);
#endif
  }
};

// sum += a b^T, with the first or the last eight lines of b. Of the sum, lane 4*i + j has columns 2*j and 2*j + 1 of
// row i, and then of row i + 8.
template <class scalar, int half>
__device__ void multiply(float (&sum)[4], const Block& a, const Block& b) {
#ifdef __CUDACC__
#define TEMPOPS_MULTIPLY(shape, type)                                                                        \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type                                       \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                        \
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                      \
               : "r"(a.words[0]), "r"(a.words[1]), "r"(a.words[2]), "r"(a.words[3]), "r"(b.words[2 * half]), \
                 "r"(b.words[2 * half + 1]))
  if constexpr (std::is_same_v<scalar, Half>)
    TEMPOPS_MULTIPLY("m16n8k16", "f16");
  else if constexpr (std::is_same_v<scalar, BFloat16>)
    TEMPOPS_MULTIPLY("m16n8k16", "bf16");
  else
    TEMPOPS_MULTIPLY("m16n8k8", "tf32");
#undef TEMPOPS_MULTIPLY
#else
  cuda_sim::multiply<scalar>(sum, a.words, b.words[2 * half], b.words[2 * half + 1]);
#endif
}

// Two adjacent elements in one word, or in two with float32.
template <class scalar>
__device__ auto pair(float first, float second) {
  if constexpr (std::is_same_v<scalar, float>) {
    return uint2{__float_as_uint(first), __float_as_uint(second)};
  } else {
#ifdef __CUDACC__
    uint32_t word;
    if constexpr (std::is_same_v<scalar, Half>)
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    else
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
#else
    const auto bits = [](float value) { return static_cast<uint32_t>(static_cast<scalar>(value).x); };
    return bits(first) | bits(second) << 16;
#endif
  }
}

}  // namespace tempops
