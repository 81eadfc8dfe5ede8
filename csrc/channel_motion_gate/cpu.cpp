// channel_motion_gate on the CPU. A clip is a few frames, so a product with a small weight takes less time than ATen
// takes to begin: those are made here, the others by ATen. What lies between the products is one loop over the clips.
#include "../gemm.h"
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

// Whether a product with this weight, or whose result it is, was measured faster here than in ATen.
bool is_small(int64_t rows, int64_t columns) {
  return rows * columns <= (1 << 15);
}

}  // namespace

// A row of weights meets all frames at once, so x is turned first: it is small.
Tensor linear(const Tensor& x, const Tensor& weight) {
  const int64_t frames = x.size(0), K = x.size(1), M = weight.size(0);
  if (!is_small(M, K)) return matrix_product(x, torch::stable::transpose(weight, 0, 1));
  const Tensor out = torch::stable::new_empty(x, std::array<int64_t, 2>{frames, M});
  by_accumulator(x.scalar_type(), [&](auto* type) {
    using acc = std::remove_pointer_t<decltype(type)>;
    const acc* from = data<acc>(x);
    std::vector<acc> turned(K * frames);
    for (int64_t t = 0; t < frames; ++t)
      for (int64_t k = 0; k < K; ++k) turned[k * frames + t] = from[t * K + k];
    product(data<acc>(out), 1, M, data<acc>(weight), K, 1, turned.data(), frames, M, frames, K);
  });
  return out;
}

Tensor over_frames(const Tensor& a, const Tensor& b) {
  const int64_t frames = a.size(0), M = a.size(1), N = b.size(1);
  if (!is_small(M, N)) return matrix_product(torch::stable::transpose(a, 0, 1), b);
  const Tensor out = torch::stable::new_empty(a, std::array<int64_t, 2>{M, N});
  by_accumulator(a.scalar_type(), [&](auto* type) {
    using acc = std::remove_pointer_t<decltype(type)>;
    product(data<acc>(out), N, 1, data<acc>(a), 1, M, data<acc>(b), N, M, N, frames);
  });
  return out;
}

Tensor times(const Tensor& x, const Tensor& weight, const Tensor* to) {
  const int64_t frames = x.size(0), K = x.size(1), N = weight.size(1);
  if (!is_small(K, N)) {
    const Tensor out = matrix_product(x, weight);
    if (to)
      by_accumulator(x.scalar_type(), [&](auto* type) {
        using acc = std::remove_pointer_t<decltype(type)>;
        parallel(frames, N,
                 [sum = data<acc>(out), more = data<acc>(*to), N](int64_t begin, int64_t end)
                     TEMPOPS_INLINE { add_scaled(sum + begin * N, acc(1), more + begin * N, (end - begin) * N); });
      });
    return out;
  }
  const Tensor out = to ? *to : torch::stable::new_empty(x, std::array<int64_t, 2>{frames, N});
  by_accumulator(x.scalar_type(), [&](auto* type) {
    using acc = std::remove_pointer_t<decltype(type)>;
    product(data<acc>(out), N, 1, data<acc>(x), K, 1, data<acc>(weight), N, frames, N, K, to != nullptr);
  });
  return out;
}

Tensor mixed(const Tensor& z, const Tensor& k, int64_t T) {
  Tensor out = torch::stable::empty_like(z);
  by_accumulator(z.scalar_type(), [&](auto* type) {
    using acc = std::remove_pointer_t<decltype(type)>;
    mix(data<acc>(out), data<acc>(z), data<acc>(k), z.size(0) / T, T, z.size(1));
  });
  return out;
}

std::array<Tensor, 2> mixed_backward(const Tensor& dmixed, const Tensor& z, const Tensor& k, int64_t T) {
  Tensor dz = torch::stable::empty_like(z), dk = torch::stable::empty_like(k);
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
