// ATen ops, called through the stable dispatcher.
#pragma once

#include "common.h"

namespace tempops {

// Calls aten::`name`.`overload`; `outputs` is how many tensors it returns.
template <size_t outputs, class... Args>
std::array<Tensor, outputs> call_aten(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, std::max(outputs, sizeof...(Args))> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  std::array<Tensor, outputs> results;
  for (size_t i = 0; i < outputs; ++i) results[i] = torch::stable::detail::to<Tensor>(stack[i]);
  return results;
}

// The usual case of one result.
template <class... Args>
Tensor aten(const char* name, const char* overload, const Args&... args) {
  return call_aten<1>(name, overload, args...)[0];
}

}  // namespace tempops
