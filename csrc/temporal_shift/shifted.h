// temporal_shift for other ops: what its cpu.cpp and its cuda.cu each define for their library.
#pragma once

#include "arguments.h"

namespace tempops {

// x with its channels moved, in a new tensor of x's layout.
Tensor shifted(const Clip& x, const Shift& shift);

// The same in place, touching only the channels that move.
void shift_in_place(const Clip& x, const Shift& shift);

}  // namespace tempops
