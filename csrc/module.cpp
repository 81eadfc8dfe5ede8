// tempops._C: what was built. Nothing here touches a tensor, so it loads with any PyTorch, or none.
#include <pybind11/pybind11.h>

#include "isa.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of tempops.";
#if defined(__clang__)
  m.attr("compiler") = "clang " __clang_version__;
#else
  m.attr("compiler") = "gcc " __VERSION__;
#endif
  m.attr("torch_version") = TEMPOPS_TORCH_VERSION;  // the one whose headers it was built against
#if defined(__x86_64__)
  m.attr("instruction_sets") = pybind11::make_tuple("baseline", "avx2", "avx512");
#else
  m.attr("instruction_sets") = pybind11::make_tuple("baseline");
#endif
  m.def("instruction_set", [] { return tempops::name(tempops::isa()); },
        "The instruction set in use on this processor; ATEN_CPU_CAPABILITY lowers it.");
  m.attr("cuda_architectures") = TEMPOPS_CUDA_ARCHITECTURES;  // empty where there are no CUDA kernels
  m.attr("why_no_cuda") = TEMPOPS_WHY_NO_CUDA;
}
