// temporal_shift: which frame each channel group reads. Shared by the CPU and CUDA kernels.
#pragma once

#include <algorithm>
#include <array>
#include <string>
#include <utility>
#include <vector>

#include "../common.h"

namespace tempops {

// Channels [0, fold) read frame t + first, [fold, 2*fold) read t + second, the rest read t.
struct Shift {
  int64_t fold, first, second;

  // The transpose: what the gradient goes through.
  Shift transposed() const {
    return {fold, -first, -second};
  }
};

inline Shift shift_of(int64_t C, int64_t fold_div, const std::string& mode) {
  const bool bidirectional = mode == "bidirectional", reversed = mode == "reversed", causal = mode == "causal";
  TEMPOPS_CHECK(bidirectional || reversed || causal, "mode must be 'bidirectional', 'reversed' or 'causal', got '",
                mode, "'");
  const int64_t least = causal ? 1 : 2;
  TEMPOPS_CHECK(fold_div >= least, "fold_div must be at least ", least, " for mode='", mode, "', got ", fold_div);
  if (causal) return {C / fold_div, -1, 0};
  return {C / fold_div, bidirectional ? 1 : -1, bidirectional ? -1 : 1};
}

// Channels [begin, end) are those of frame t + offset.
struct Group {
  int64_t begin, end, offset;
};

// The three groups of C channels. Where one group has them all (causal, fold_div 1) the others are empty.
inline std::array<Group, 3> groups_of(const Shift& shift, int64_t C) {
  const int64_t rest = std::min(2 * shift.fold, C);
  return {Group{0, shift.fold, shift.first}, Group{shift.fold, rest, shift.second}, Group{rest, C, 0}};
}

// Raises unless the elements of x are known to lie apart: each stride past all that the smaller ones reach.
inline void check_apart(const Tensor& x) {
  std::vector<std::pair<int64_t, int64_t>> sides;  // stride, size
  for (int64_t d = 0; d < x.dim(); ++d)
    if (x.size(d) > 1) sides.emplace_back(x.stride(d), x.size(d));
  std::sort(sides.begin(), sides.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : sides) {
    TEMPOPS_CHECK(stride > reach || x.numel() == 0, "x must not overlap itself to be shifted in place");
    reach += stride * (size - 1);
  }
}

}  // namespace tempops
