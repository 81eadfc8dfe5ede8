// temporal_conv on CUDA: y[t] = sum_k w_k * gate[t+k-R] * x[t+k-R], R = K/2.
//
// A thread has some elements and walks T with the K frames of the window in registers, so that each frame is read once.
// The backward reads dy and x once, writes dx, and adds up q_k = sum_p x[t] * dy[t+R-k] by block; short kernels make of
// these partial sums the gradients to weight and gate: dweight_k = sum_t gate[t] * q_k, dgate[t] = sum_k w_k * q_k.
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
  bool wide_taps = false, wide_gates = false;  // whether those of a pack's channels are adjacent and aligned

  // The same for kernels whose threads have V elements.
  Coefficients for_packs(bool channels_last, int V) const {
    const auto aligned = [&](const scalar* p) { return reinterpret_cast<uintptr_t>(p) % (V * sizeof(scalar)) == 0; };
    Coefficients w = *this;
    const bool adjacent = channels_last && V > 1 && C % V == 0;
    w.wide_taps = adjacent && group == 1 && aligned(weight);
    w.wide_gates = adjacent && aligned(gate);
    return w;
  }

  __device__ acc_t<scalar> tap(int64_t n, int64_t c, int64_t k) const {
    return static_cast<acc_t<scalar>>(weight[(n * per_clip + (group == 1 ? c : quotient(c, group))) * K + k]);
  }
  // The taps of the channels c, backwards where `reversed`.
  template <int V, int taps>
  __device__ void read_taps(acc_t<scalar> (&into)[taps][V], int64_t n, const uint32_t (&c)[V], bool reversed) const {
    if (wide_taps) {
      Pack<scalar, V> raw[taps];
      for (int j = 0; j < taps; ++j) raw[j] = Pack<scalar, V>::load(weight + (n * per_clip + c[0]) * taps + j * V);
      for (int k = 0; k < taps; ++k)
        for (int v = 0; v < V; ++v) {
          const int there = v * taps + k, mirrored = v * taps + taps - 1 - k;
          const scalar forward = raw[there / V].v[there % V], backward = raw[mirrored / V].v[mirrored % V];
          into[k][v] = static_cast<acc_t<scalar>>(reversed ? backward : forward);
        }
    } else {
      for (int k = 0; k < taps; ++k)
        for (int v = 0; v < V; ++v) into[k][v] = tap(n, c[v], reversed ? taps - 1 - k : k);
    }
  }

  __device__ acc_t<scalar> gated(int64_t n, int64_t t, int64_t c) const {
    return static_cast<acc_t<scalar>>(gate[(n * T + t) * C + c]);
  }
  // The gates of the channels c; `row` is that of a frame.
  template <int V>
  __device__ void read_gates(acc_t<scalar> (&into)[V], const scalar* row, const uint32_t (&c)[V]) const {
    if (wide_gates) {
      const auto values = Pack<scalar, V>::load(row + c[0]);
      for (int v = 0; v < V; ++v) into[v] = static_cast<acc_t<scalar>>(values.v[v]);
    } else {
      into[0] = static_cast<acc_t<scalar>>(row[c[0]]);
      for (int v = 1; v < V; ++v) into[v] = c[v] == c[v - 1] ? into[v - 1] : static_cast<acc_t<scalar>>(row[c[v]]);
    }
  }
};

constexpr int kAhead = 3;  // frames that are loaded before they are needed

// y = the convolution of x, or its transpose: taps reversed, the gate of the frame written in place of those read.
template <class scalar, int V, int K, bool gated>
__global__ void __launch_bounds__(kThreads, 2)
    conv_kernel(Runs<scalar> y, Runs<const scalar> x, Frame frame, Coefficients<scalar> w, bool transposed) {
  using acc = acc_t<scalar>;
  constexpr int R = K / 2;
  const Place<V> at(frame);
  if (!at.inside) return;
  const int T = static_cast<int>(frame.T);
  for (int64_t n = blockIdx.y; n < frame.N; n += gridDim.y) {
    const scalar* from = x.at(n, 0, at.run, at.i);
    scalar* to = y.at(n, 0, at.run, at.i);
    Pack<scalar, V> ahead[kAhead]{};
    for (int j = 0; j < kAhead; ++j)
      if (j < T) ahead[j] = Pack<scalar, V>::load(from + j * x.st);
    from += kAhead * x.st;

    uint32_t c[V];
    frame.channels(at.run, at.i, c);
    acc taps[K][V], sums[K - 1][V] = {};  // of y[t - R], y[t - R + 1], ... what the frames before t give
    w.template read_taps<V>(taps, n, c, transposed);
    const scalar* gate = gated ? w.gate + n * T * w.C : nullptr;  // of the frame that is read, or written
    const auto write = [&](const acc(&sum)[V]) {
      acc gates[V];
      if (gated && transposed) {
        w.template read_gates<V>(gates, gate, c);
        gate += w.C;
      }
      Pack<scalar, V> out;
      for (int v = 0; v < V; ++v) out.v[v] = static_cast<scalar>(gated && transposed ? sum[v] * gates[v] : sum[v]);
      out.store(to);
      to += y.st;
    };

#pragma unroll 1
    for (int t = 0; t < T; ++t) {
      acc value[V];
      for (int v = 0; v < V; ++v) value[v] = static_cast<acc>(ahead[0].v[v]);
      for (int j = 0; j + 1 < kAhead; ++j) ahead[j] = ahead[j + 1];
      if (t + kAhead < T) ahead[kAhead - 1] = Pack<scalar, V>::load(from);
      from += x.st;
      if (gated && !transposed) {
        acc gates[V];
        w.template read_gates<V>(gates, gate, c);
        gate += w.C;
        for (int v = 0; v < V; ++v) value[v] *= gates[v];
      }
      for (int k = 0; k < K - 1; ++k)
        for (int v = 0; v < V; ++v) sums[k][v] += taps[K - 1 - k][v] * value[v];
      if (t >= R) write(sums[0]);
      for (int v = 0; v < V; ++v) {
        for (int k = 0; k + 2 < K; ++k) sums[k][v] = sums[k + 1][v];
        sums[K - 2][v] = taps[0][v] * value[v];
      }
    }
    for (int k = 0; k < R; ++k)
      if (T - R + k >= 0) write(sums[k]);
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
    launch(guard, kernel, {frame.blocks(V), x.N}, frame.of<scalar>(y), frame.of<const scalar>(x), frame,
           w.for_packs(frame.channels_last, V), transposed);
  };
  by_width<scalar>(frame.width(x, y), [&](auto V) {
    constexpr int kSmall = std::min<int>(V, 4);  // eight elements with five taps are more than the registers hold
    if (w.K == 3)
      w.gate ? run(conv_kernel<scalar, V, 3, true>, V) : run(conv_kernel<scalar, V, 3, false>, V);
    else if (w.K == 5)
      w.gate ? run(conv_kernel<scalar, kSmall, 5, true>, kSmall) : run(conv_kernel<scalar, kSmall, 5, false>, kSmall);
    else
      run(long_conv_kernel<scalar>, 1);
  });
}

// What a block of the backward has of a frame. channels_last: `lanes` times V channels of the pixels that the other
// threads make; planar: `length` adjacent pixels of `lines` channels, which are whole where there are several. A pack
// may go from one channel into the next where nothing lies between them.
struct Tile {
  int64_t N, T, C, P;
  bool channels_last, spans;  // whether packs go from channel to channel
  int lanes = 1, lines = 1, length = 0;
  int64_t channel_blocks, chunks;

  Tile(const Clip& x, int V)
      : N(x.N), T(x.T), C(x.C), P(x.P), channels_last(x.channels_last), spans(!channels_last && P % V != 0) {
    if (channels_last) {
      const int widest = V == 1 ? kWarp : 8;  // a pixel's channels in a block: 128 bytes, and few partial sums
      while (lanes < widest && lanes * V < C) lanes *= 2;
      channel_blocks = blocks_for(C, lanes * V);
      chunks = blocks_for(P, kThreads / lanes);
    } else {
      const int64_t elements = kThreads * V;
      length = static_cast<int>(std::min(P, elements));
      lines = static_cast<int>(elements / length);
      int whole = V;  // so many channels are whole packs
      for (int64_t left = P; left % 2 == 0 && whole > 1; left /= 2) whole /= 2;
      lines -= spans ? lines % whole : 0;
      channel_blocks = lines == 0 ? 0 : blocks_for(C, lines);
      chunks = blocks_for(P, length);
    }
  }

  // Whether packs of V elements of these tensors can be read at once.
  template <class... Clips>
  bool suits(int V, const Clips&... clips) const {
    const auto dense = [&](const Clip& x) { return x.dense_frames() && whole_packs(x, V, 0, C * P); };
    if (spans) return lines > 0 && chunks == 1 && (dense(clips) && ...);
    return (whole_packs(clips, V, P) && ...);
  }
};

// Partial sums [slots, chunks, K, C] of q. A slot is a frame where there is a gate, a clip where each has its own
// kernel, and else what one row of the grid adds up.
enum class Slot { frame, clip, row };

// For taps first .. first + M - 1 of the kernel: partial sums, and dx where M is K and dx is wanted.
template <class scalar, int V, int M>
__global__ void __launch_bounds__(kThreads, 2)
    backward_kernel(Elements<scalar> dx, Elements<const scalar> dy, Elements<const scalar> x, Tile tile,
                    Coefficients<scalar> w, acc_t<scalar>* partial, Slot slot, int first, bool with_dx) {
  using acc = acc_t<scalar>;
  using Values = Pack<scalar, V>;
  __shared__ acc shared[M * V * kThreads];
  const int64_t block = quotient(blockIdx.x, tile.chunks), chunk = blockIdx.x - block * tile.chunks;
  const int thread = threadIdx.x, T = static_cast<int>(tile.T), ahead = static_cast<int>(w.K / 2) - first;
  int64_t c0, p;
  bool inside;
  if (tile.channels_last) {
    c0 = (block * tile.lanes + thread % tile.lanes) * V;
    p = chunk * (kThreads / tile.lanes) + thread / tile.lanes;
    inside = c0 < tile.C && p < tile.P;
  } else {
    const int line = thread * V / tile.length;
    c0 = block * tile.lines + line;
    p = chunk * tile.length + thread * V - line * tile.length;
    inside = line < tile.lines && c0 < tile.C && p < tile.P;
  }
  uint32_t c[V];
  c[0] = static_cast<uint32_t>(c0);
  for (int v = 1; v < V; ++v) c[v] = c[v - 1] + (tile.channels_last || (tile.spans && (p + v) % tile.P == 0));

  // Adds q over the threads of each channel, in a fixed order, and writes what the block has.
  acc q[M][V] = {};
  const auto write = [&](int64_t at) {
    const auto target = [&](int j, int64_t channel) -> acc& {
      return partial[((at * tile.chunks + chunk) * w.K + first + j) * tile.C + channel];
    };
    if (tile.channels_last) {
      for (int j = 0; j < M; ++j)
        for (int v = 0; v < V; ++v) shared[(j * kThreads + thread) * V + v] = q[j][v];
      __syncthreads();
      const int across = tile.lanes * V;
      for (int o = thread; o < M * across; o += kThreads) {
        const int j = o / across, channel = o - j * across;
        acc sum = 0;
        for (int i = channel; i < V * kThreads; i += across) sum += shared[j * V * kThreads + i];
        if (block * across + channel < tile.C) target(j, block * across + channel) = sum;
      }
    } else {
      const int each = tile.spans ? V : 1, count = tile.length * each / V;  // sums of a thread, and of a line
      for (int j = 0; j < M; ++j) {
        if (tile.spans) {
          for (int v = 0; v < V; ++v) shared[(j * kThreads + thread) * V + v] = q[j][v];
        } else {
          acc own = q[j][0];
          for (int v = 1; v < V; ++v) own += q[j][v];
          shared[j * kThreads + thread] = own;
        }
      }
      __syncthreads();
      int team = 1;  // threads that add up a line
      while (team < count && team < kWarp) team *= 2;
      for (int start = 0; start < M * tile.lines; start += kThreads / team) {
        const int o = start + thread / team, j = o / tile.lines, line = o - j * tile.lines;
        acc sum = 0;
        for (int i = thread % team; i < count && j < M; i += team)
          sum += shared[j * each * kThreads + line * count + i];
        for (int mask = team / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
        if (thread % team == 0 && j < M && block * tile.lines + line < tile.C)
          target(j, block * tile.lines + line) = sum;
      }
    }
    __syncthreads();
    for (int j = 0; j < M; ++j)
      for (int v = 0; v < V; ++v) q[j][v] = 0;
  };

  for (int64_t n = blockIdx.y; n < tile.N; n += gridDim.y) {
    const scalar *from_dy = dy.at(n, ahead, c0, p), *from_x = x.at(n, 0, c0, p);  // frames t + ahead and t
    Values window[M]{}, next_dy{}, next_x{};  // window[j] is dy of frame t + ahead - j
    const auto read = [&](int t) {            // those of t
      if (inside && t + ahead >= 0 && t + ahead < T) next_dy = Values::load(from_dy + t * dy.st);
      if (inside && t < T) next_x = Values::load(from_x + t * x.st);
    };
    for (int j = 1; j < M; ++j)
      if (inside && ahead - j >= 0 && ahead - j < T) window[j - 1] = Values::load(from_dy - j * dy.st);
    read(0);
    acc taps[M][V] = {};
    if (inside && with_dx) {
      if constexpr (M > 1) w.template read_taps<V>(taps, n, c, false);
    }
#pragma unroll 1
    for (int t = 0; t < T; ++t) {
      for (int j = M - 1; j > 0; --j) window[j] = window[j - 1];
      window[0] = next_dy;
      const Values here = next_x;
      read(t + 1);
      acc sum[V] = {};
      for (int j = 0; j < M; ++j) {
        const int s = t + ahead - j;
        if (s < 0 || s >= T) continue;
        for (int v = 0; v < V; ++v) {
          const acc grad = static_cast<acc>(window[j].v[v]);
          sum[v] += taps[j][v] * grad;
          q[j][v] += static_cast<acc>(here.v[v]) * grad;
        }
      }
      if (inside && with_dx) {
        if (w.gate) {
          acc gates[V];
          w.template read_gates<V>(gates, w.gate + (n * T + t) * w.C, c);
          for (int v = 0; v < V; ++v) sum[v] *= gates[v];
        }
        Values out;
        for (int v = 0; v < V; ++v) out.v[v] = static_cast<scalar>(sum[v]);
        out.store(dx.at(n, t, c0, p));
      }
      const bool last = t + 1 == T;
      if (slot == Slot::frame || (last && (slot == Slot::clip || n + gridDim.y >= tile.N)))
        write(slot == Slot::frame ? n * T + t : slot == Slot::clip ? n : blockIdx.y);
    }
  }
}

// How a block adds up `terms` numbers for each of its columns, of which there are `all`: by `rows` threads, neighbours
// in neighbouring columns. More rows than a warp has lanes are for few columns.
struct Split {
  int rows = 1, columns;

  Split(int64_t terms, int64_t all) {
    while (rows < terms && (rows < kWarp || kThreads / rows > all)) rows *= 2;
    columns = kThreads / rows;
  }
};

// The sum over the threads t, t + stop, t + 2*stop, ... of a block, for its threads below `stop`.
__device__ inline double sum_over(double value, int stop) {
  __shared__ double shared[kThreads];
  const int thread = threadIdx.x;
  shared[thread] = value;
  __syncthreads();
  for (int half = kThreads / 2; half >= stop; half /= 2) {
    if (thread < half) shared[thread] += shared[thread + half];
    __syncthreads();
  }
  return shared[thread];
}

// [slots, all] = the sums over chunks of [slots, chunks, all].
template <class acc>
__global__ void __launch_bounds__(kThreads)
    fold_kernel(acc* folded, const acc* partial, Split split, int64_t all, int64_t slots, int64_t chunks) {
  const int columns = split.columns, row = threadIdx.x / columns;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * columns + threadIdx.x % columns;
  for (int64_t slot = blockIdx.y; slot < slots; slot += gridDim.y) {
    double sum = 0;
#pragma unroll 4
    for (int64_t chunk = row; chunk < chunks && i < all; chunk += split.rows)
      sum += static_cast<double>(partial[(slot * chunks + chunk) * all + i]);
    sum = sum_over(sum, columns);
    if (row == 0 && i < all) folded[slot * all + i] = static_cast<acc>(sum);
    __syncthreads();
  }
}

// dweight [clips, C / group, K] of sums [clips, count, K, C], which are frames where there is a gate: a block has tap k
// of as many kernels as it has columns.
template <class scalar>
__global__ void __launch_bounds__(kThreads, 4)
    weight_kernel(scalar* dweight, const acc_t<scalar>* sums, Coefficients<scalar> w, Split split, int64_t clips,
                  int64_t count) {
  const int columns = split.columns, row = threadIdx.x / columns;
  const int64_t block = quotient(blockIdx.x, w.K), k = blockIdx.x - block * w.K;
  const int64_t kernels = quotient(w.C, w.group), i = block * columns + threadIdx.x % columns;
  for (int64_t clip = blockIdx.y; clip < clips; clip += gridDim.y) {
    double total = 0;
#pragma unroll 4
    for (int64_t term = row; term < count * w.group && i < kernels; term += split.rows) {
      const int64_t of_clip = quotient(term, w.group), at = clip * count + of_clip;
      const int64_t c = i * w.group + term - of_clip * w.group;
      double value = sums[(at * w.K + k) * w.C + c];
      if (w.gate) value *= static_cast<double>(static_cast<acc_t<scalar>>(w.gate[at * w.C + c]));
      total += value;
    }
    total = sum_over(total, columns);
    if (row == 0 && i < kernels)
      dweight[(clip * kernels + i) * w.K + k] = static_cast<scalar>(static_cast<acc_t<scalar>>(total));
    __syncthreads();
  }
}

// dgate [N*T, C] of sums [N*T, K, C].
template <class scalar>
__global__ void __launch_bounds__(kThreads)
    gate_kernel(scalar* dgate, const acc_t<scalar>* sums, Coefficients<scalar> w, int64_t frames) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= w.C) return;
  for (int64_t frame = blockIdx.y; frame < frames; frame += gridDim.y) {
    double total = 0;
    for (int64_t k = 0; k < w.K; ++k)
      total += static_cast<double>(sums[(frame * w.K + k) * w.C + c]) * w.tap(quotient(frame, w.T), c, k);
    dgate[frame * w.C + c] = static_cast<scalar>(static_cast<acc_t<scalar>>(total));
  }
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

// Fills dweight and dgate (null for neither), and dx where it is given.
template <class scalar>
void backward(const DeviceGuard& guard, const Clip* dx, const Tensor* dweight, const Tensor* dgate, const Clip& dy,
              const Clip& x, const Coefficients<scalar>& w) {
  using acc = acc_t<scalar>;
  constexpr int kWide = kWidestBytes / sizeof(scalar), kSmall = std::min(kWide, 4);
  const bool fast = w.K == 3 || w.K == 5;
  const int widest = w.K == 5 ? kSmall : kWide;  // as in the forward
  const bool by_one = !Tile(x, widest).suits(widest, dy, x, dx ? *dx : x);
  const int V = by_one ? 1 : widest;
  const Tile tile(x, V);
  const Slot slot = w.gate ? Slot::frame : w.per_clip ? Slot::clip : Slot::row;
  const int64_t blocks = tile.channel_blocks * tile.chunks;
  // Rows of the grid: enough blocks to fill a GPU, no more sums than that, and the same number of clips for each.
  int64_t rows = std::min<int64_t>(x.N, 65535);
  if (slot == Slot::row) rows = blocks_for(x.N, blocks_for(x.N, std::min(x.N, blocks_for(1024, blocks))));
  const int64_t slots = slot == Slot::frame ? x.N * x.T : slot == Slot::clip ? x.N : rows;
  const auto scratch = [&](int64_t count) {
    return torch::stable::new_empty(x.tensor, std::array<int64_t, 1>{count},
                                    sizeof(acc) == 8 ? ScalarType::Double : ScalarType::Float);
  };
  const int64_t all = w.K * x.C;
  Tensor partial = scratch(slots * tile.chunks * all);
  acc* sums = static_cast<acc*>(partial.data_ptr());
  const Coefficients<scalar> of_packs = w.for_packs(x.channels_last, V);
  const auto run = [&](auto kernel, int first) {
    launch(guard, kernel, {blocks, rows}, Elements<scalar>(dx ? *dx : x), Elements<const scalar>(dy),
           Elements<const scalar>(x), tile, of_packs, sums, slot, first, fast && dx);
  };
  if (w.K == 3) {
    by_one ? run(backward_kernel<scalar, 1, 3>, 0) : run(backward_kernel<scalar, kWide, 3>, 0);
  } else if (w.K == 5) {
    by_one ? run(backward_kernel<scalar, 1, 5>, 0) : run(backward_kernel<scalar, kSmall, 5>, 0);
  } else {
    for (int k = 0; k < w.K; ++k)
      by_one ? run(backward_kernel<scalar, 1, 1>, k) : run(backward_kernel<scalar, kWide, 1>, k);
    if (dx) conv(guard, *dx, dy, w, true);
  }
  int64_t count = slots * tile.chunks;
  if (slot == Slot::frame && tile.chunks > 1) {
    const Split split(tile.chunks, all);
    const Tensor folded = scratch(slots * all);
    launch(guard, fold_kernel<acc>, {blocks_for(all, split.columns), slots}, static_cast<acc*>(folded.data_ptr()), sums,
           split, all, slots, tile.chunks);
    partial = folded;
    sums = static_cast<acc*>(folded.data_ptr());
    count = slots;
  }
  if (dweight) {
    const int64_t clips = w.per_clip ? x.N : 1, kernels = w.C / w.group;
    const Split split(count / clips * w.group, kernels);
    launch(guard, weight_kernel<scalar>, {blocks_for(kernels, split.columns) * w.K, clips},
           static_cast<scalar*>(dweight->data_ptr()), sums, w, split, clips, count / clips);
  }
  if (dgate)
    launch(guard, gate_kernel<scalar>, {blocks_for(w.C, kThreads), x.N * x.T}, static_cast<scalar*>(dgate->data_ptr()),
           sums, w, x.N * x.T);
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
  Tensor dweight = need_weight ? empty_contiguous(args.weight.sizes(), args.weight) : no_gradient(weight);
  Tensor dgate = need_gate ? empty_contiguous(args.gate.sizes(), args.gate) : no_gradient(weight);
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
