// channel_motion_gate on the CPU. The products with the weights are ATen's; what lies between them, for which eager
// PyTorch takes a call for each step of a few thousand elements, is one loop over the clips.
#include "../aten.h"
#include "../cpu.h"

namespace tempops {
namespace {

template <class acc>
TEMPOPS_INLINE inline acc dot(const acc* __restrict a, const acc* __restrict b, int64_t count) {
  acc sum = 0;
  _Pragma("omp simd reduction(+ : sum)")
  for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
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

template <class acc>
void add(acc* to, const acc* from, int64_t count) {
  parallel(count, 1, [=](int64_t begin, int64_t end)
                         TEMPOPS_INLINE { add_scaled(to + begin, acc(1), from + begin, end - begin); });
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
void by_accumulator(const Gate& g, const F& f) {
  g.dtype == ScalarType::Double ? f(static_cast<double*>(nullptr)) : f(static_cast<float*>(nullptr));
}

Tensor transposed(const Tensor& x) {
  return torch::stable::transpose(x, 0, 1);
}

Tensor linear(const Tensor& x, const Tensor& weight) {
  return aten("aten::linear", "", x, weight, std::optional<Tensor>());
}

Tensor product(const Tensor& a, const Tensor& b) {
  return aten("aten::mm", "", a, b);
}

Tensor rounded(const Tensor& x, const Gate& g) {
  return x.scalar_type() == g.dtype ? x : torch::stable::to(x, g.dtype);
}

Tensor mixed(const Gate& g, const Tensor& z, const Tensor& k) {
  Tensor out = torch::stable::empty_like(z);
  by_accumulator(g, [&](auto* type) {
    using acc = std::remove_pointer_t<decltype(type)>;
    mix(static_cast<acc*>(out.data_ptr()), static_cast<const acc*>(z.data_ptr()),
        static_cast<const acc*>(k.data_ptr()), g.frames / g.T, g.T, g.R);
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
std::tuple<Tensor, Tensor, Tensor, Tensor> channel_motion_gate_backward(
    const Tensor& grad, const Tensor& pooled, const Tensor& w1, const Tensor& w2, const Tensor& w3,
    const Tensor& output, int64_t n_segment, bool need_pooled, bool need_w1, bool need_w2, bool need_w3) {
  const Gate g = gate_of(pooled, w1, w2, w3, n_segment);
  for (const Tensor* x : {&grad, &output})
    TEMPOPS_CHECK(x->dim() == 2 && x->size(0) == g.frames && x->size(1) == g.C, "grad and output must be [", g.frames,
                  ", ", g.C, "] as pooled is");
  const Tensor z = linear(g.pooled, g.w1), k = linear(g.pooled, g.w2);
  // A result rounded to half the bits says too little of its slope a (1 - a).
  const bool exact = output.scalar_type() == z.scalar_type();
  const Tensor gate = exact ? dense_argument(output, pooled, "output")
                            : aten("aten::sigmoid_", "", linear(mixed(g, z, k), g.w3));
  const Tensor dlogits = aten("aten::sigmoid_backward", "", widened(grad, pooled, "grad"), gate);
  Tensor dpooled = no_gradient(pooled), dw1 = no_gradient(w1), dw2 = no_gradient(w2), dw3 = no_gradient(w3);
  if (need_w3) dw3 = rounded(product(transposed(dlogits), mixed(g, z, k)), g);
  if (need_pooled || need_w1 || need_w2) {
    const Tensor dmixed = product(dlogits, g.w3), dz = torch::stable::empty_like(z), dk = torch::stable::empty_like(k);
    by_accumulator(g, [&](auto* type) {
      using acc = std::remove_pointer_t<decltype(type)>;
      const auto data = [](const Tensor& x) { return static_cast<acc*>(x.data_ptr()); };
      mix_backward(data(dz), data(dk), data(dmixed), data(z), data(k), g.frames / g.T, g.T, g.R);
    });
    if (need_w1) dw1 = rounded(product(transposed(dz), g.pooled), g);
    if (need_w2) dw2 = rounded(product(transposed(dk), g.pooled), g);
    if (need_pooled) {
      const Tensor sum = product(dz, g.w1), other = product(dk, g.w2);
      by_accumulator(g, [&](auto* type) {
        using acc = std::remove_pointer_t<decltype(type)>;
        add(static_cast<acc*>(sum.data_ptr()), static_cast<const acc*>(other.data_ptr()), g.frames * g.C);
      });
      dpooled = rounded(sum, g);
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
