// channel_motion_gate: the order of its products, which every back end shares. They are in float32 or float64; what
// lies between the products with the weights is one function of a back end.
#pragma once

#include "../aten.h"

namespace tempops {

// a b by ATen. Under autocast it would answer in another type than what is allocated here is of.
inline Tensor matrix_product(const Tensor& a, const Tensor& b) {
  const Tensor out = torch::stable::matmul(a, b);
  TEMPOPS_CHECK(out.scalar_type() == a.scalar_type(), "autocast must be off where this op is called");
  return out;
}

// x W^T for x [frames, K] and W [M, K].
inline Tensor linear(const Tensor& x, const Tensor& weight) {
  return matrix_product(x, torch::stable::transpose(weight, 0, 1));
}

// a^T b for a [frames, M] and b [frames, N].
inline Tensor over_frames(const Tensor& a, const Tensor& b) {
  return matrix_product(torch::stable::transpose(a, 0, 1), b);
}

// --- what cpu.cpp and cuda.cu each define for their library; dense tensors of one type ---

// z = linear(x, w1) and k = linear(x, w2), weights of one shape.
std::array<Tensor, 2> features(const Tensor& x, const Tensor& w1, const Tensor& w2);

// sigmoid(linear(x, w)).
Tensor gates(const Tensor& x, const Tensor& w);

// sum += more.
void add(const Tensor& sum, const Tensor& more);

// z_t + sum_j d_tj z_j with d_t the softmax over j of -k_t.k_j, j over the T frames of t's clip; z and k [frames, R].
Tensor mixed(const Tensor& z, const Tensor& k, int64_t T);

// dz and dk from the gradient of `mixed`: dz_t = dmixed_t + sum_j d_jt dmixed_j, and through the softmax, with
// dd_tj = dmixed_t.z_j and ds_tj = d_tj (dd_tj - sum_i d_ti dd_ti), dk_t = -sum_j (ds_tj + ds_jt) k_j.
std::array<Tensor, 2> mixed_backward(const Tensor& dmixed, const Tensor& z, const Tensor& k, int64_t T);

// --- the op ---

// The op's arguments, dense and in the type they are computed in.
struct Gate {
  Tensor pooled, w1, w2, w3;
  ScalarType dtype;
  int64_t frames, T, C;
};

inline Tensor widened(const Tensor& x, const Tensor& like, const char* name) {
  const Tensor dense = dense_argument(x, like, name);
  const bool half = x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16;
  return half ? torch::stable::to(dense, ScalarType::Float) : dense;
}

inline Gate gate_of(const Tensor& pooled, const Tensor& w1, const Tensor& w2, const Tensor& w3, int64_t n_segment) {
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
          C};
}

inline Tensor rounded(const Tensor& x, const Gate& g) {
  return x.scalar_type() == g.dtype ? x : torch::stable::to(x, g.dtype);
}

// The gate, and z and k for the backward: [frames, R], small beside what it takes to make them.
inline std::tuple<Tensor, Tensor, Tensor> channel_motion_gate_forward(const Tensor& pooled, const Tensor& w1,
                                                                      const Tensor& w2, const Tensor& w3,
                                                                      int64_t n_segment) {
  const Gate g = gate_of(pooled, w1, w2, w3, n_segment);
  const auto [z, k] = features(g.pooled, g.w1, g.w2);
  return {rounded(gates(mixed(z, k, g.T), g.w3), g), z, k};
}

inline Tensor channel_motion_gate(const Tensor& pooled, const Tensor& w1, const Tensor& w2, const Tensor& w3,
                                  int64_t n_segment) {
  return std::get<0>(channel_motion_gate_forward(pooled, w1, w2, w3, n_segment));
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> channel_motion_gate_backward(
    const Tensor& grad, const Tensor& pooled, const Tensor& w1, const Tensor& w2, const Tensor& w3,
    const Tensor& output, const Tensor& z_, const Tensor& k_, int64_t n_segment, bool need_pooled, bool need_w1,
    bool need_w2, bool need_w3) {
  const Gate g = gate_of(pooled, w1, w2, w3, n_segment);
  for (const Tensor* x : {&grad, &output})
    TEMPOPS_CHECK(x->dim() == 2 && x->size(0) == g.frames && x->size(1) == g.C, "grad and output must be [", g.frames,
                  ", ", g.C, "] as pooled is");
  for (const Tensor* x : {&z_, &k_})
    TEMPOPS_CHECK(x->dim() == 2 && x->size(0) == g.frames && x->size(1) == g.w1.size(0), "z and k must be [", g.frames,
                  ", ", g.w1.size(0), "]");
  const Tensor z = dense_argument(z_, g.pooled, "z"), k = dense_argument(k_, g.pooled, "k");
  // A result rounded to half the bits says too little of its slope a (1 - a).
  const bool exact = output.scalar_type() == z.scalar_type();
  const Tensor gate = exact ? dense_argument(output, pooled, "output") : gates(mixed(z, k, g.T), g.w3);
  const Tensor dlogits = aten("aten::sigmoid_backward", "", widened(grad, pooled, "grad"), gate);
  Tensor dpooled = no_gradient(pooled), dw1 = no_gradient(w1), dw2 = no_gradient(w2), dw3 = no_gradient(w3);
  if (need_w3) dw3 = rounded(over_frames(dlogits, mixed(z, k, g.T)), g);
  if (need_pooled || need_w1 || need_w2) {
    const auto [dz, dk] = mixed_backward(matrix_product(dlogits, g.w3), z, k, g.T);
    if (need_w1) dw1 = rounded(over_frames(dz, g.pooled), g);
    if (need_w2) dw2 = rounded(over_frames(dk, g.pooled), g);
    if (need_pooled) {
      const Tensor sum = matrix_product(dz, g.w1);
      add(sum, matrix_product(dk, g.w2));
      dpooled = rounded(sum, g);
    }
  }
  return {dpooled, dw1, dw2, dw3};
}

}  // namespace tempops
