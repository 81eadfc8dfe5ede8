// channel_motion_gate on the CPU. A clip is a few frames: the products of the forward read each weight once for all of
// them, which ATen's are not made for. Those of the backward are ATen's.
#include <limits>

#include "../sigmoid.h"
#include "../sums.h"
#include "gate.h"

namespace tempops {
namespace {

template <class acc>
TEMPOPS_INLINE inline acc dot(const acc* __restrict a, const acc* __restrict b, int64_t count) {
  acc sum[1] = {};
  add_up(sum, count, [=](int64_t i, acc& ab, acc&, acc&) TEMPOPS_INLINE { ab += a[i] * b[i]; });
  return sum[0];
}

template <class acc>
TEMPOPS_INLINE inline void add_scaled(acc* __restrict to, acc factor, const acc* __restrict from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += factor * from[i];
}

// mixing [T, T] = softmax over j of -k_t.k_j, for k [T, R].
template <class acc>
TEMPOPS_INLINE inline void mixing_of(acc* mixing, const acc* k, int64_t T, int64_t R) {
  for (int64_t t = 0; t < T; ++t)
    for (int64_t j = 0; j <= t; ++j) mixing[t * T + j] = mixing[j * T + t] = -dot(k + t * R, k + j * R, R);
  for (int64_t t = 0; t < T; ++t) {
    acc* row = mixing + t * T;
    const acc largest = *std::max_element(row, row + T);
    acc sum = 0;
    for (int64_t j = 0; j < T; ++j) sum += row[j] = std::exp(row[j] - largest);
    for (int64_t j = 0; j < T; ++j) row[j] /= sum;
  }
}

// mixed_t = z_t + sum_j mixing_tj z_j, all [N, T, R].
template <class acc>
void mix(acc* mixed, const acc* z, const acc* k, int64_t N, int64_t T, int64_t R) {
  parallel(N, 2 * T * T * R, [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    std::vector<acc> mixing(T * T);
    for (int64_t n = begin; n < end; ++n) {
      const acc* zn = z + n * T * R;
      mixing_of(mixing.data(), k + n * T * R, T, R);
      for (int64_t t = 0; t < T; ++t) {
        acc* row = mixed + (n * T + t) * R;
        std::copy(zn + t * R, zn + (t + 1) * R, row);
        for (int64_t j = 0; j < T; ++j) add_scaled(row, mixing[t * T + j], zn + j * R, R);
      }
    }
  });
}

template <class acc>
void mix_backward(acc* dz, acc* dk, const acc* dmixed, const acc* z, const acc* k, int64_t N, int64_t T, int64_t R) {
  parallel(N, 5 * T * T * R, [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    std::vector<acc> mixing(T * T), ds(T * T);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t at = n * T * R;
      mixing_of(mixing.data(), k + at, T, R);
      for (int64_t t = 0; t < T; ++t) {
        acc mean = 0;
        for (int64_t j = 0; j < T; ++j) {
          ds[t * T + j] = dot(dmixed + at + t * R, z + at + j * R, R);
          mean += mixing[t * T + j] * ds[t * T + j];
        }
        for (int64_t j = 0; j < T; ++j) ds[t * T + j] = mixing[t * T + j] * (ds[t * T + j] - mean);
      }
      for (int64_t t = 0; t < T; ++t) {
        acc* dz_t = dz + at + t * R;
        acc* dk_t = dk + at + t * R;
        std::copy(dmixed + at + t * R, dmixed + at + (t + 1) * R, dz_t);
        std::fill(dk_t, dk_t + R, acc(0));
        for (int64_t j = 0; j < T; ++j) {
          add_scaled(dz_t, mixing[j * T + t], dmixed + at + j * R, R);
          add_scaled(dk_t, -(ds[t * T + j] + ds[j * T + t]), k + at + j * R, R);
        }
      }
    }
  });
}

template <class F>
void by_accumulator(ScalarType dtype, const F& f) {
  dtype == ScalarType::Double ? f(static_cast<double*>(nullptr)) : f(static_cast<float*>(nullptr));
}

template <class acc>
acc* data(const Tensor& x) {
  return static_cast<acc*>(x.data_ptr());
}

// y [frames, M] = f(x [frames, K] W^T) for each of the weights. An element of W meets a vector of frames, so x is
// turned first: it is small. W's rows may be a power of two apart and push each other out of the first-level cache, so
// a tile of them is copied, a block at a time; sums of the blocks' sums keep float32 as exact as a pairwise sum.
template <bool wide, size_t products, class acc, class F>
void rows_times_rows(const std::array<acc*, products>& results, const acc* x,
                     const std::array<const acc*, products>& weights, int64_t frames, int64_t K, int64_t M,
                     const F& f) {
  constexpr int rows = wide ? 16 : 6, columns = 64 / sizeof(acc);  // a tile that stays in registers
  constexpr int64_t kBlock = 64, kLine = 64 / sizeof(acc);
  const int64_t panels = (frames + columns - 1) / columns, stride = panels * columns;
  Scratch<acc> turned(K * stride);
  for (int64_t k0 = 0; k0 < K; k0 += kLine)
    for (int64_t t = 0; t < frames; ++t)
      for (int64_t k = k0; k < std::min(K, k0 + kLine); ++k) turned[k * stride + t] = x[t * K + k];
  const acc* across = turned.data();
  const int64_t tiles = (M + rows - 1) / rows;
  parallel(products * tiles, rows * K * frames / 16, [=](int64_t begin, int64_t end) TEMPOPS_INLINE {
    Scratch<acc> totals(rows * stride);
    alignas(64) acc block[rows][kBlock] = {};
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t m = tile % tiles * rows, height = std::min<int64_t>(rows, M - m);
      const acc* weight = weights[tile / tiles];
      acc* y = results[tile / tiles];
      std::fill(totals.begin(), totals.end(), acc(0));
      for (int64_t k0 = 0; k0 < K; k0 += kBlock) {
        const int64_t depth = std::min(kBlock, K - k0);
        for (int64_t i = 0; i < height; ++i) {
          const acc* __restrict row = weight + (m + i) * K + k0;
          for (int64_t j = 0; j < kBlock; j += kLine) __builtin_prefetch(row + kBlock + j);
          if (depth == kBlock)
            _Pragma("omp simd") for (int k = 0; k < kBlock; ++k) block[i][k] = row[k];
          else
            for (int64_t k = 0; k < depth; ++k) block[i][k] = row[k];
        }
        for (int64_t t = 0; t < stride; t += columns) {
          const acc* __restrict many = across + k0 * stride + t;
          acc sum[rows][columns] = {};
          for (int64_t k = 0; k < depth; ++k)
            _Pragma("GCC unroll 16") for (int i = 0; i < rows; ++i)
                _Pragma("omp simd") for (int j = 0; j < columns; ++j) sum[i][j] += block[i][k] * many[k * stride + j];
          acc* __restrict total = &totals[t * rows];
          for (int i = 0; i < rows; ++i)
            _Pragma("omp simd") for (int j = 0; j < columns; ++j) total[i * columns + j] += sum[i][j];
        }
      }
      _Pragma("omp simd") for (int64_t i = 0; i < rows * stride; ++i) totals[i] = f(totals[i]);
      for (int64_t t = 0; t < frames; ++t) {
        const acc* total = &totals[t / columns * rows * columns + t % columns];
        for (int64_t i = 0; i < height; ++i) y[t * M + m + i] = total[i * columns];
      }
    }
  });
}

// f(x W^T) for each of the weights, which have one shape.
template <class F, class... Weights>
auto through(const F& f, const Tensor& x, const Weights&... weights) {
  constexpr size_t products = sizeof...(weights);
  const std::array<const Tensor*, products> given = {&weights...};
  const int64_t frames = x.size(0), K = x.size(1), M = given[0]->size(0);
  std::array<Tensor, products> results = {
      (static_cast<void>(weights), empty_contiguous(std::array<int64_t, 2>{frames, M}, x))...};
  by_accumulator(x.scalar_type(), [&](auto* type) {
    using acc = std::remove_pointer_t<decltype(type)>;
    const auto run_tiles =
        isa() == Isa::avx512 ? rows_times_rows<true, products, acc, F> : rows_times_rows<false, products, acc, F>;
    std::array<acc*, products> to;
    std::array<const acc*, products> from;
    for (size_t i = 0; i < products; ++i) to[i] = data<acc>(results[i]), from[i] = data<acc>(*given[i]);
    run_tiles(to, data<acc>(x), from, frames, K, M, f);
  });
  return results;
}

// Whether `through` was measured faster than ATen, which needs more frames to be at its best.
bool is_few(const Tensor& x) {
  return x.size(0) <= 32;
}

}  // namespace

std::array<Tensor, 2> features(const Tensor& x, const Tensor& w1, const Tensor& w2) {
  if (!is_few(x)) return {linear(x, w1), linear(x, w2)};
  return through([](auto sum) TEMPOPS_INLINE { return sum; }, x, w1, w2);
}

Tensor gates(const Tensor& x, const Tensor& w) {
  const auto gate = [](auto sum) TEMPOPS_INLINE {
    using acc = decltype(sum);
    const acc value = Sigmoid<acc>(sum).value;
    return value < std::numeric_limits<acc>::min() ? 0 : value;  // arithmetic with subnormals is slow
  };
  if (is_few(x)) return through(gate, x, w)[0];
  const Tensor out = linear(x, w);
  by_accumulator(x.scalar_type(), [&](auto* type) {
    using acc = std::remove_pointer_t<decltype(type)>;
    parallel(out.numel(), 4, [y = data<acc>(out), gate](int64_t begin, int64_t end) TEMPOPS_INLINE {
      _Pragma("omp simd") for (int64_t i = begin; i < end; ++i) y[i] = gate(y[i]);
    });
  });
  return out;
}

void add(const Tensor& sum, const Tensor& more) {
  by_accumulator(sum.scalar_type(), [&](auto* type) {
    using acc = std::remove_pointer_t<decltype(type)>;
    parallel(sum.numel(), 1, [to = data<acc>(sum), from = data<acc>(more)](int64_t begin, int64_t end) TEMPOPS_INLINE {
      add_scaled(to + begin, acc(1), from + begin, end - begin);
    });
  });
}

Tensor mixed(const Tensor& z, const Tensor& k, int64_t T) {
  Tensor out = empty_contiguous(z.sizes(), z);
  by_accumulator(z.scalar_type(), [&](auto* type) {
    using acc = std::remove_pointer_t<decltype(type)>;
    mix(data<acc>(out), data<acc>(z), data<acc>(k), z.size(0) / T, T, z.size(1));
  });
  return out;
}

std::array<Tensor, 2> mixed_backward(const Tensor& dmixed, const Tensor& z, const Tensor& k, int64_t T) {
  Tensor dz = empty_contiguous(z.sizes(), z), dk = empty_contiguous(k.sizes(), k);
  by_accumulator(z.scalar_type(), [&](auto* type) {
    using acc = std::remove_pointer_t<decltype(type)>;
    mix_backward(data<acc>(dz), data<acc>(dk), data<acc>(dmixed), data<acc>(z), data<acc>(k), z.size(0) / T, T,
                 z.size(1));
  });
  return {dz, dk};
}

STABLE_TORCH_LIBRARY_FRAGMENT(tempops, m) {
  m.def("channel_motion_gate(Tensor pooled, Tensor w1, Tensor w2, Tensor w3, int n_segment) -> Tensor");
  m.def(
      "channel_motion_gate_forward(Tensor pooled, Tensor w1, Tensor w2, Tensor w3, int n_segment) -> (Tensor, Tensor, "
      "Tensor)");
  m.def(
      "channel_motion_gate_backward(Tensor grad, Tensor pooled, Tensor w1, Tensor w2, Tensor w3, Tensor output, "
      "Tensor z, Tensor k, int n_segment, bool need_pooled, bool need_w1, bool need_w2, bool need_w3) -> (Tensor, "
      "Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(tempops, CPU, m) {
  m.impl("channel_motion_gate", TORCH_BOX(&channel_motion_gate));
  m.impl("channel_motion_gate_forward", TORCH_BOX(&channel_motion_gate_forward));
  m.impl("channel_motion_gate_backward", TORCH_BOX(&channel_motion_gate_backward));
}

}  // namespace tempops
