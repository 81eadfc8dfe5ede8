// channel_motion_gate on the CPU. A clip is a few frames, so each product with a weight streams that weight once past
// all frames; what lies between the products is one loop over the clips.
#include "../aten.h"
#include "../gemm.h"

namespace tempops {
namespace {

template <class acc>
TEMPOPS_INLINE inline acc dot(const acc* __restrict a, const acc* __restrict b, int64_t count) {
  acc sum = 0;
  _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
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

// dz and dk from the gradient of `mixed`: dz = dmixed + mixing^T dmixed, and through the softmax
// dmixing_tj = dmixed_t.z_j, ds_tj = mixing_tj (dmixing_tj - sum_i mixing_ti dmixing_ti), dk = -(ds + ds^T) k.
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

// The op's arguments, dense and in the type they are computed in.
struct Gate {
  Tensor pooled, w1, w2, w3;
  ScalarType dtype;
  int64_t frames, T, C, R;
};

Tensor widened(const Tensor& x, const Tensor& like, const char* name) {
  const Tensor dense = dense_argument(x, like, name);
  const bool half = x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16;
  return half ? torch::stable::to(dense, ScalarType::Float) : dense;
}

Gate gate_of(const Tensor& pooled, const Tensor& w1, const Tensor& w2, const Tensor& w3, int64_t n_segment) {
  TEMPOPS_CHECK(is_supported(pooled.scalar_type()), "pooled must be float32, float16, bfloat16 or float64");
  TEMPOPS_CHECK(pooled.dim() == 2, "pooled must be [N*T, C], got ", pooled.dim(), "-D");
  TEMPOPS_CHECK(n_segment >= 1, "n_segment must be at least 1, got ", n_segment);
  const int64_t frames = pooled.size(0), C = pooled.size(1);
  TEMPOPS_CHECK(frames % n_segment == 0, "n_segment=", n_segment, " does not divide ", frames, " frames");
  TEMPOPS_CHECK(w1.dim() == 2 && w1.size(1) == C, "w1 must be [C/r, C] with C = ", C);
  const int64_t R = w1.size(0);
  TEMPOPS_CHECK(w2.dim() == 2 && w2.size(0) == R && w2.size(1) == C, "w2 must be [", R, ", ", C, "] as w1 is");
  TEMPOPS_CHECK(w3.dim() == 2 && w3.size(0) == C && w3.size(1) == R, "w3 must be [", C, ", ", R, "]");
  return {widened(pooled, pooled, "pooled"),
          widened(w1, pooled, "w1"),
          widened(w2, pooled, "w2"),
          widened(w3, pooled, "w3"),
          pooled.scalar_type(),
          frames,
          n_segment,
          C,
          R};
}

template <class F>
void by_accumulator(ScalarType dtype, const F& f) {
  dtype == ScalarType::Double ? f(static_cast<double*>(nullptr)) : f(static_cast<float*>(nullptr));
}

template <class acc>
acc* data(const Tensor& x) {
  return static_cast<acc*>(x.data_ptr());
}

// x W^T for x [frames, K] and W [M, K]. A row of weights meets all frames at once, so x is turned first: it is small.
Tensor linear(const Tensor& x, const Tensor& weight) {
  const int64_t frames = x.size(0), K = x.size(1), M = weight.size(0);
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

// a^T b for a [frames, M] and b [frames, N].
Tensor over_frames(const Tensor& a, const Tensor& b) {
  const int64_t frames = a.size(0), M = a.size(1), N = b.size(1);
  const Tensor out = torch::stable::new_empty(a, std::array<int64_t, 2>{M, N});
  by_accumulator(a.scalar_type(), [&](auto* type) {
    using acc = std::remove_pointer_t<decltype(type)>;
    product(data<acc>(out), N, 1, data<acc>(a), 1, M, data<acc>(b), N, M, N, frames);
  });
  return out;
}

// x W for x [frames, K] and W [K, N], added to `to` where that is given.
Tensor times(const Tensor& x, const Tensor& weight, const Tensor* to = nullptr) {
  const int64_t frames = x.size(0), K = x.size(1), N = weight.size(1);
  const Tensor out = to ? *to : torch::stable::new_empty(x, std::array<int64_t, 2>{frames, N});
  by_accumulator(x.scalar_type(), [&](auto* type) {
    using acc = std::remove_pointer_t<decltype(type)>;
    product(data<acc>(out), N, 1, data<acc>(x), K, 1, data<acc>(weight), N, frames, N, K, to != nullptr);
  });
  return out;
}

Tensor rounded(const Tensor& x, const Gate& g) {
  return x.scalar_type() == g.dtype ? x : torch::stable::to(x, g.dtype);
}

Tensor mixed(const Gate& g, const Tensor& z, const Tensor& k) {
  Tensor out = torch::stable::empty_like(z);
  by_accumulator(g.dtype, [&](auto* type) {
    using acc = std::remove_pointer_t<decltype(type)>;
    mix(data<acc>(out), data<acc>(z), data<acc>(k), g.frames / g.T, g.T, g.R);
  });
  return out;
}

Tensor channel_motion_gate(const Tensor& pooled, const Tensor& w1, const Tensor& w2, const Tensor& w3,
                           int64_t n_segment) {
  const Gate g = gate_of(pooled, w1, w2, w3, n_segment);
  const Tensor logits = linear(mixed(g, linear(g.pooled, g.w1), linear(g.pooled, g.w2)), g.w3);
  return rounded(aten("aten::sigmoid_", "", logits), g);
}

// z, k and what they are mixed to are computed again: the forward keeps nothing but its result.
std::tuple<Tensor, Tensor, Tensor, Tensor> channel_motion_gate_backward(const Tensor& grad, const Tensor& pooled,
                                                                        const Tensor& w1, const Tensor& w2,
                                                                        const Tensor& w3, const Tensor& output,
                                                                        int64_t n_segment, bool need_pooled,
                                                                        bool need_w1, bool need_w2, bool need_w3) {
  const Gate g = gate_of(pooled, w1, w2, w3, n_segment);
  for (const Tensor* x : {&grad, &output})
    TEMPOPS_CHECK(x->dim() == 2 && x->size(0) == g.frames && x->size(1) == g.C, "grad and output must be [", g.frames,
                  ", ", g.C, "] as pooled is");
  const Tensor z = linear(g.pooled, g.w1), k = linear(g.pooled, g.w2);
  // A result rounded to half the bits says too little of its slope a (1 - a).
  const bool exact = output.scalar_type() == z.scalar_type();
  const Tensor gate =
      exact ? dense_argument(output, pooled, "output") : aten("aten::sigmoid_", "", linear(mixed(g, z, k), g.w3));
  const Tensor dlogits = aten("aten::sigmoid_backward", "", widened(grad, pooled, "grad"), gate);
  Tensor dpooled = no_gradient(pooled), dw1 = no_gradient(w1), dw2 = no_gradient(w2), dw3 = no_gradient(w3);
  if (need_w3) dw3 = rounded(over_frames(dlogits, mixed(g, z, k)), g);
  if (need_pooled || need_w1 || need_w2) {
    const Tensor dmixed = times(dlogits, g.w3), dz = torch::stable::empty_like(z), dk = torch::stable::empty_like(k);
    by_accumulator(g.dtype, [&](auto* type) {
      using acc = std::remove_pointer_t<decltype(type)>;
      mix_backward(data<acc>(dz), data<acc>(dk), data<acc>(dmixed), data<acc>(z), data<acc>(k), g.frames / g.T, g.T,
                   g.R);
    });
    if (need_w1) dw1 = rounded(over_frames(dz, g.pooled), g);
    if (need_w2) dw2 = rounded(over_frames(dk, g.pooled), g);
    if (need_pooled) {
      const Tensor through_z = times(dz, g.w1);
      dpooled = rounded(times(dk, g.w2, &through_z), g);
    }
  }
  return {dpooled, dw1, dw2, dw3};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tempops, m) {
  m.def("channel_motion_gate(Tensor pooled, Tensor w1, Tensor w2, Tensor w3, int n_segment) -> Tensor");
  m.def(
      "channel_motion_gate_backward(Tensor grad, Tensor pooled, Tensor w1, Tensor w2, Tensor w3, Tensor output, "
      "int n_segment, bool need_pooled, bool need_w1, bool need_w2, bool need_w3) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(tempops, CPU, m) {
  m.impl("channel_motion_gate", TORCH_BOX(&channel_motion_gate));
  m.impl("channel_motion_gate_backward", TORCH_BOX(&channel_motion_gate_backward));
}

}  // namespace tempops
