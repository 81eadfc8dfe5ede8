// shift_conv1x1 on CUDA: a matrix product on tensor cores in which the shift is an address. The forward loads each
// block of channels from the frame that the shift names, the gradient of x is stored to it, and the gradient of the
// weight loads x as the forward does. Nothing but the results is written.
//
// Where ATen's convolution after a shift is expected to be faster, that is what runs: see is_fused.
#include <cuda_pipeline_primitives.h>
#include <mma.h>

#include "../cuda.h"
#include "convolution.h"

namespace tempops {
namespace {

namespace wmma = nvcuda::wmma;

// A block's part of a product, [kRows, kColumns], and how much of the summed dimension it takes at a time: 64 bytes.
constexpr int kRows = 64, kColumns = 128;
template <class scalar>
constexpr int kWide = kWidestBytes / sizeof(scalar);
template <class scalar>
constexpr int kDepth = 64 / sizeof(scalar);
constexpr int kStages = 3;  // of shared memory: two are on their way while one is multiplied

// What the tensor cores call the dtypes, and how much of the summed dimension one instruction takes.
template <class scalar>
struct Core;
template <>
struct Core<Half> {
  using type = __half;
  using memory = __half;
  static constexpr int depth = 16;
};
template <>
struct Core<BFloat16> {
  using type = __nv_bfloat16;
  using memory = __nv_bfloat16;
  static constexpr int depth = 16;
};
template <>
struct Core<float> {
  using type = wmma::precision::tf32;
  using memory = float;
  static constexpr int depth = 8;
};

// How clips are read or written: pixel q counts through all frames, and a channel's frame is moved by `shift`.
struct Pixels {
  int64_t count, T, C, P;
  Shift shift;

  __device__ int64_t offset(int64_t c) const {
    return c < shift.fold ? shift.first : c < 2 * shift.fold ? shift.second : 0;
  }
};

// 16 bytes from global to shared memory while the threads go on; zeros where `there` is false.
template <class scalar>
__device__ void load_async(scalar* shared, const scalar* from, bool there) {
  __pipeline_memcpy_async(shared, from, kWidestBytes, there ? 0 : kWidestBytes);
}

// A tile of clips in shared memory, its lines as in global memory: pixels of `length` adjacent channels (channels_last)
// or channels of `length` adjacent pixels. The padding keeps the lines on different banks.
template <class scalar, bool channels_last, int lines, int length>
struct ClipTile {
  static constexpr int pitch = length + kWide<scalar>;
  static constexpr int size = lines * pitch;

  __device__ static void load(scalar* shared, const Elements<const scalar>& x, const Pixels& pixels, int64_t c0,
                              int64_t q0) {
    constexpr int packs = length / kWide<scalar>;
    static_assert(lines * packs % kThreads == 0);
    for (int item = threadIdx.x; item < lines * packs; item += kThreads) {
      const int line = item / packs, at = item % packs * kWide<scalar>;
      const int64_t c = c0 + (channels_last ? at : line), q = q0 + (channels_last ? line : at);
      const int64_t frame = quotient(q, pixels.P), n = quotient(frame, pixels.T);
      const int64_t t = frame - n * pixels.T + pixels.offset(c);
      const bool there = c < pixels.C && q < pixels.count && t >= 0 && t < pixels.T;
      const scalar* from = there ? x.at(n, t, c, q - frame * pixels.P) : x.data;
      load_async(shared + line * pitch + at, from, there);
    }
  }
};

// The same of the weight [rows, depth].
template <class scalar>
struct WeightTile {
  static constexpr int pitch = kDepth<scalar> + kWide<scalar>;
  static constexpr int size = kRows * pitch;

  __device__ static void load(scalar* shared, const scalar* weight, int64_t rows, int64_t depth, int64_t row0,
                              int64_t k0) {
    constexpr int packs = kDepth<scalar> / kWide<scalar>;
    static_assert(kRows * packs == kThreads);
    const int line = threadIdx.x / packs, at = threadIdx.x % packs * kWide<scalar>;
    const bool there = row0 + line < rows && k0 + at < depth;
    load_async(shared + line * pitch + at, there ? weight + (row0 + line) * depth + k0 + at : weight, there);
  }
};

// The product of a block: eight warps, each a 32x32 part of it. A is [kRows, depth] and B [depth, kColumns]; `rows`
// says that the lines of a tile are the rows of the matrix.
template <class scalar, bool a_rows, int a_pitch, bool b_rows, int b_pitch>
class Product {
  using Type = typename Core<scalar>::type;
  using Memory = typename Core<scalar>::memory;
  template <bool rows>
  using Major = std::conditional_t<rows, wmma::row_major, wmma::col_major>;
  static constexpr int kStep = Core<scalar>::depth;

  wmma::fragment<wmma::accumulator, 16, 16, kStep, float> sum_[2][2];
  const int row_ = threadIdx.x / kWarp / 4 * 32, column_ = threadIdx.x / kWarp % 4 * 32;

  template <class Fragment>
  __device__ static void load(Fragment& fragment, const scalar* from, int pitch) {
    wmma::load_matrix_sync(fragment, reinterpret_cast<const Memory*>(from), pitch);
    if constexpr (std::is_same_v<scalar, float>)
      for (int i = 0; i < fragment.num_elements; ++i) fragment.x[i] = wmma::__float_to_tf32(fragment.x[i]);
  }

 public:
  // From a row (or column) to the next in what `put` writes.
  template <bool by_columns>
  static constexpr int kPitch = by_columns ? kRows + 4 : kColumns + 4;

  __device__ Product() {
    for (auto& row : sum_)
      for (auto& sum : row) wmma::fill_fragment(sum, 0.0f);
  }

  __device__ void add(const scalar* a, const scalar* b) {
#pragma unroll
    for (int k = 0; k < kDepth<scalar>; k += kStep) {
      wmma::fragment<wmma::matrix_a, 16, 16, kStep, Type, Major<a_rows>> left[2];
      wmma::fragment<wmma::matrix_b, 16, 16, kStep, Type, Major<b_rows>> right[2];
      for (int i = 0; i < 2; ++i) {
        const int row = row_ + 16 * i, column = column_ + 16 * i;
        load(left[i], a + (a_rows ? row * a_pitch + k : k * a_pitch + row), a_pitch);
        load(right[i], b + (b_rows ? k * b_pitch + column : column * b_pitch + k), b_pitch);
      }
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j) wmma::mma_sync(sum_[i][j], left[i], right[j], sum_[i][j]);
    }
  }

  // The result in shared memory: row by row, or column by column.
  template <bool by_columns>
  __device__ void put(float* shared) const {
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j) {
        const int row = row_ + 16 * i, column = column_ + 16 * j;
        if constexpr (by_columns)
          wmma::store_matrix_sync(shared + column * kPitch<true> + row, sum_[i][j], kPitch<true>, wmma::mem_col_major);
        else
          wmma::store_matrix_sync(shared + row * kPitch<false> + column, sum_[i][j], kPitch<false>,
                                  wmma::mem_row_major);
      }
  }
};

// Calls `load(stage, step)` for each step ahead of `multiply(stage)`, through kStages stages of shared memory.
template <class Load, class Multiply>
__device__ void pipelined(int64_t steps, const Load& load, const Multiply& multiply) {
  for (int64_t step = 0; step < kStages - 1; ++step) {
    if (step < steps) load(step, step);
    __pipeline_commit();
  }
  for (int64_t step = 0; step < steps; ++step) {
    __pipeline_wait_prior(kStages - 2);
    __syncthreads();  // this stage is there, and the one before has been multiplied by all
    const int64_t next = step + kStages - 1;
    if (next < steps) load(next % kStages, next);
    __pipeline_commit();
    multiply(step % kStages);
  }
  __pipeline_wait_prior(0);
  __syncthreads();
}

// y [rows, pixels] = weight [rows, depth] x [depth, pixels] + bias, clamped at 0 with `relu`. `in` moves the frames
// that x is read from, `out` those that y is written to, where the frames that nothing moves to become zero.
template <class scalar, bool channels_last>
__global__ void __launch_bounds__(kThreads, 2)
    convolution_kernel(Elements<scalar> y, Elements<const scalar> x, const scalar* weight, const scalar* bias,
                       Pixels out, Pixels in, bool relu) {
  constexpr int depth = kDepth<scalar>;
  using A = WeightTile<scalar>;
  using B = ClipTile<scalar, channels_last, channels_last ? kColumns : depth, channels_last ? depth : kColumns>;
  using Sum = Product<scalar, true, A::pitch, !channels_last, B::pitch>;
  constexpr int kStage = (A::size + B::size) * sizeof(scalar);
  constexpr int kPitch = Sum::template kPitch<channels_last>;
  constexpr int kResult = (channels_last ? kColumns : kRows) * kPitch * sizeof(float);
  alignas(128) __shared__ char shared[kStages * kStage > kResult ? kStages * kStage : kResult];
  const auto a = [&](int64_t stage) { return reinterpret_cast<scalar*>(shared + stage * kStage); };
  const auto b = [&](int64_t stage) { return a(stage) + A::size; };

  // The blocks that share pixels are neighbours, so that the second-level cache serves all but one of them.
  const int64_t row_tiles = (out.C + kRows - 1) / kRows, tile = quotient(blockIdx.x, row_tiles);
  const int64_t row0 = (blockIdx.x - tile * row_tiles) * kRows, q0 = tile * kColumns;
  Sum sum;
  pipelined((in.C + depth - 1) / depth, [&](int64_t stage, int64_t step) {
    A::load(a(stage), weight, out.C, in.C, row0, step * depth);
    B::load(b(stage), x, in, step * depth, q0);
  }, [&](int64_t stage) { sum.add(a(stage), b(stage)); });

  float* const result = reinterpret_cast<float*>(shared);
  sum.template put<channels_last>(result);
  __syncthreads();
  constexpr int V = kWide<scalar>, lines = channels_last ? kColumns : kRows, length = channels_last ? kRows : kColumns;
  for (int item = threadIdx.x; item < lines * (length / V); item += kThreads) {
    const int line = item / (length / V), at = item % (length / V) * V;
    const int64_t c = row0 + (channels_last ? at : line), q = q0 + (channels_last ? line : at);
    if (c >= out.C || q >= out.count) continue;
    const int64_t frame = quotient(q, out.P), n = quotient(frame, out.T);
    int64_t t = frame - n * out.T + out.offset(c);
    const bool there = t >= 0 && t < out.T;
    if (!there) t += t < 0 ? out.T : -out.T;
    Pack<scalar, V> values{};
    for (int k = 0; k < V && there; ++k) {
      float value = result[line * kPitch + at + k];
      if (bias) value += static_cast<float>(bias[channels_last ? c + k : c]);
      values.v[k] = static_cast<scalar>(relu && value < 0 ? 0 : value);
    }
    values.store(y.at(n, t, c, q - frame * out.P));
  }
}

// partials [slots, rows, columns]: dy [rows, pixels] x [columns, pixels]^T over the slot's pixels.
template <class scalar, bool channels_last>
__global__ void __launch_bounds__(kThreads, 2)
    weight_kernel(float* partials, Elements<const scalar> dy, Elements<const scalar> x, Pixels rows, Pixels columns,
                  int64_t slots, int64_t steps) {
  constexpr int depth = kDepth<scalar>;
  using A = ClipTile<scalar, channels_last, channels_last ? depth : kRows, channels_last ? kRows : depth>;
  using B = ClipTile<scalar, channels_last, channels_last ? depth : kColumns, channels_last ? kColumns : depth>;
  using Sum = Product<scalar, !channels_last, A::pitch, channels_last, B::pitch>;
  constexpr int kStage = (A::size + B::size) * sizeof(scalar);
  constexpr int kPitch = Sum::template kPitch<false>;
  constexpr int kResult = kRows * kPitch * sizeof(float);
  alignas(128) __shared__ char shared[kStages * kStage > kResult ? kStages * kStage : kResult];
  const auto a = [&](int64_t stage) { return reinterpret_cast<scalar*>(shared + stage * kStage); };
  const auto b = [&](int64_t stage) { return a(stage) + A::size; };

  const int64_t row_tiles = (rows.C + kRows - 1) / kRows, tile = quotient(blockIdx.x, row_tiles);
  const int64_t row0 = (blockIdx.x - tile * row_tiles) * kRows, column0 = tile * kColumns;
  for (int64_t slot = blockIdx.y; slot < slots; slot += gridDim.y) {
    const int64_t q0 = slot * steps * depth;
    Sum sum;
    pipelined(steps, [&](int64_t stage, int64_t step) {
      A::load(a(stage), dy, rows, row0, q0 + step * depth);
      B::load(b(stage), x, columns, column0, q0 + step * depth);
    }, [&](int64_t stage) { sum.add(a(stage), b(stage)); });
    float* const result = reinterpret_cast<float*>(shared);
    sum.template put<false>(result);
    __syncthreads();
    for (int item = threadIdx.x; item < kRows * kColumns; item += kThreads) {
      const int64_t row = item / kColumns, column = item % kColumns;
      if (row0 + row < rows.C && column0 + column < columns.C)
        partials[(slot * rows.C + row0 + row) * columns.C + column0 + column] = result[row * kPitch + column];
    }
    __syncthreads();
  }
}

// The sum over the slots, in their order.
template <class scalar>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(scalar* dweight, const float* partials, int64_t slots, int64_t size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) return;
  double total = 0;
  for (int64_t slot = 0; slot < slots; ++slot) total += partials[slot * size + i];
  dweight[i] = static_cast<scalar>(total);
}

// Operations a byte above which the product is bound by arithmetic, and cuDNN's is faster than what is here: stages 3
// and 4 of a ResNet-50. Not measured yet: the bytes of both tensors against what the tensor cores do without wgmma.
constexpr int64_t kLargestIntensity = 128;

Pixels pixels_of(const Clip& x, const Shift& shift) {
  return {x.N * x.T * x.P, x.T, x.C, x.P, shift};
}

// Whether the kernels take these clips: a dtype that tensor cores multiply, and nothing but whole 16-byte accesses
// within one frame and one group of channels.
bool is_possible(const Clip& x, const Clip& y, const Shift& shift, bool allow_tf32) {
  if (x.dtype == ScalarType::Double || (x.dtype == ScalarType::Float && !allow_tf32)) return false;
  const int64_t V = kWidestBytes / x.tensor.element_size();
  return !x.empty() && !y.empty() && whole_packs(x, V, x.P) && whole_packs(y, V, y.P) && x.C % V == 0 && y.C % V == 0 &&
         (!x.channels_last || shift.fold % V == 0) && x.N * x.T * x.P + kColumns <= 0xffffffff;
}

bool is_fused(const Clip& x, const Clip& y, const Shift& shift, bool allow_tf32) {
  return is_possible(x, y, shift, allow_tf32) && x.C * y.C <= kLargestIntensity * (x.C + y.C);
}

// Calls f with a null pointer of the element type and whether the clips are channels_last.
template <class F>
void by_kernel(const Clip& x, const F& f) {
  const auto by_layout = [&](auto* type) { x.channels_last ? f(type, std::true_type()) : f(type, std::false_type()); };
  switch (x.dtype) {
    case ScalarType::Half: return by_layout(static_cast<Half*>(nullptr));
    case ScalarType::BFloat16: return by_layout(static_cast<BFloat16*>(nullptr));
    default: return by_layout(static_cast<float*>(nullptr));
  }
}

void convolve(const DeviceGuard& guard, const Clip& y, const Shift& out, const Clip& x, const Shift& in,
              const Tensor& weight, const std::optional<Tensor>& bias, bool relu) {
  by_kernel(x, [&](auto* type, auto channels_last) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    const Pixels pixels = pixels_of(y, out);
    const int64_t tiles = blocks_for(pixels.count, kColumns) * blocks_for(y.C, kRows);
    launch(guard, convolution_kernel<scalar, channels_last>, {tiles}, Elements<scalar>(y), Elements<const scalar>(x),
           static_cast<const scalar*>(weight.data_ptr()),
           bias ? static_cast<const scalar*>(bias->data_ptr()) : static_cast<const scalar*>(nullptr), pixels,
           pixels_of(x, in), relu);
  });
}

// A tensor that begins at a multiple of 16 bytes.
Tensor aligned(const Tensor& x) {
  const bool is_aligned = reinterpret_cast<uintptr_t>(x.data_ptr()) % kWidestBytes == 0;
  return is_aligned ? x : torch::stable::clone(x);
}

Tensor weight_gradient(const DeviceGuard& guard, const Clip& dy, const Clip& x, const Shift& shift) {
  const Tensor dweight = torch::stable::new_empty(x.tensor, std::array<int64_t, 2>{dy.C, x.C});
  by_kernel(x, [&](auto* type, auto channels_last) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    constexpr int64_t kBlocks = 264;  // two for each multiprocessor of an H200: more would only be more partial sums
    const Pixels rows = pixels_of(dy, {0, 0, 0}), columns = pixels_of(x, shift);
    const int64_t tiles = blocks_for(dy.C, kRows) * blocks_for(x.C, kColumns);
    const int64_t all_steps = blocks_for(rows.count, kDepth<scalar>);
    const int64_t steps = blocks_for(all_steps, blocks_for(kBlocks, tiles)), slots = blocks_for(all_steps, steps);
    const Tensor partials =
        torch::stable::empty({slots, dy.C, x.C}, ScalarType::Float, std::nullopt, x.tensor.device());
    float* const sums = static_cast<float*>(partials.data_ptr());
    launch(guard, weight_kernel<scalar, channels_last>, {tiles, slots}, sums, Elements<const scalar>(dy),
           Elements<const scalar>(x), rows, columns, slots, steps);
    launch(guard, sum_kernel<scalar>, {blocks_for(dy.C * x.C)}, static_cast<scalar*>(dweight.data_ptr()), sums, slots,
           dy.C * x.C);
  });
  return dweight;
}

Tensor shift_conv1x1(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, Segments n_segment,
                     int64_t fold_div, const std::string& mode, const std::optional<std::string>& activation,
                     bool allow_tf32) {
  const DeviceGuard guard(x);
  const Convolution c(x, weight, bias, n_segment, fold_div, mode, activation);
  if (c.x.empty() || c.Cout == 0) return c.empty_result().tensor;
  const Clip y = c.empty_result();
  if (!is_fused(c.x, y, c.shift, allow_tf32)) return by_aten(c);
  convolve(guard, y, Shift{0, 0, 0}, c.x, c.shift, aligned(c.weight), c.bias, c.relu);
  return y.tensor;
}

std::tuple<Tensor, Tensor, Tensor> shift_conv1x1_backward(const Tensor& grad, const std::optional<Tensor>& x,
                                                          const std::optional<Tensor>& weight, Segments n_segment,
                                                          int64_t fold_div, const std::string& mode, bool channels_last,
                                                          bool need_bias, bool allow_tf32) {
  const DeviceGuard guard(grad);
  const ConvolutionBackward b(grad, x, weight, n_segment, fold_div, mode, channels_last);
  const auto fused_dx = [&]() -> std::optional<Tensor> {
    const Clip dx = b.empty_dx();
    if (!is_fused(b.dy, dx, b.shift, allow_tf32)) return std::nullopt;
    const Tensor flat = torch::stable::view(b.weight, std::array<int64_t, 2>{b.Cout, b.C});
    const Tensor transposed = aligned(torch::stable::contiguous(torch::stable::transpose(flat, 0, 1)));
    convolve(guard, dx, b.shift, b.dy, Shift{0, 0, 0}, transposed, std::nullopt, false);
    return dx.tensor;
  };
  // At every size: cuDNN's may add up in another order each time.
  const auto fused_dweight = [&]() -> std::optional<Tensor> {
    if (!is_possible(*b.x, b.dy, b.shift, allow_tf32)) return std::nullopt;
    return weight_gradient(guard, b.dy, *b.x, b.shift);
  };
  return b.gradients(fused_dx, fused_dweight, need_bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tempops, CUDA, m) {
  m.impl("shift_conv1x1", TORCH_BOX(&shift_conv1x1));
  m.impl("shift_conv1x1_backward", TORCH_BOX(&shift_conv1x1_backward));
}

}  // namespace tempops
